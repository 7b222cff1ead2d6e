"""Documents of any kind as plain text: found in a folder, read, and cut into pieces at paragraph borders."""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# What pages declare and what they hold, as browsers take it: supersets; and whose declaration can be read is no UTF-16.
DECLARED = {"gb2312": "gb18030", "gbk": "gb18030", "iso-8859-1": "cp1252", "ascii": "cp1252", "us-ascii": "cp1252"}
DECLARED |= dict.fromkeys(("utf-16", "utf-16le", "utf-16be"), "utf-8")
HTML, PDF = (".html", ".htm", ".xhtml"), (".pdf",)
UNSEEN = ("title", "script", "style", "template", "noscript", "svg")  # not <head>, which few pages close
BLOCKS = "address article aside blockquote div dl dt dd figcaption footer form h1 h2 h3 h4 h5 h6 header hr li main nav"
BLOCKS += " ol p pre section table tr ul"
EDGES = {**dict.fromkeys(BLOCKS.split(), "\n\n"), "td": " ", "th": " ", "br": "\n"}  # white space around an element


class Unreadable(ValueError):
    """A document without text for us; the message is the reason."""


def find_documents(path: Path) -> list[Path]:
    """Every file below a folder in a fixed order, without hidden ones; a file is itself."""
    if path.is_file():
        return [path]
    hidden = lambda file: any(part.startswith(".") for part in file.relative_to(path).parts)
    return sorted(file for file in path.rglob("*") if file.is_file() and not hidden(file))


def read_document(path: Path) -> str:
    """The text of a document: pages and PDFs by their suffix, everything else (prose, Markdown, code) as it stands.

    Raises Unreadable with the reason.
    """
    try:
        if path.suffix.lower() in PDF:
            text = _pdf(path)
        else:
            data = path.read_bytes()
            text = _html(data) if path.suffix.lower() in HTML else decode(data)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error
    if "\0" in text:
        raise Unreadable("not text")
    return text.replace("\r\n", "\n").strip()


def decode(data: bytes, declared: str | None = None) -> str:
    """The text of a file. Never guesses: a wrong guess gives letters that no one wrote. Raises Unreadable."""
    marked = next((encoding for bom, encoding in BOMS.items() if data.startswith(bom)), None)
    encoding = marked or DECLARED.get((declared or "").lower(), declared) or "utf-8"
    try:
        return data.decode(encoding)
    except LookupError:
        raise Unreadable(f"unknown encoding {encoding}") from None
    except UnicodeError:
        raise Unreadable("not text" if b"\0" in data else f"not {encoding} text; save it as UTF-8") from None


def _html(data: bytes) -> str:
    """What a reader of the page sees, its blocks as paragraphs. Raises Unreadable."""
    from bs4 import BeautifulSoup
    from bs4.dammit import EncodingDetector
    from bs4.element import NavigableString, PreformattedString, Tag
    from bs4.exceptions import ParserRejectedMarkup

    try:
        soup = BeautifulSoup(decode(data, EncodingDetector.find_declared_encoding(data, is_html=True)), "html.parser")
    except ParserRejectedMarkup:
        raise Unreadable("HTML with a broken declaration (<![...)") from None
    parts: list[str] = []
    gap = ""  # white space since the last part
    todo: list[tuple[Any, bool]] = [(soup, False)]  # what, and whether it is within <pre>
    while todo:
        node, pre = todo.pop()
        if isinstance(node, Tag) and node.name not in UNSEEN:
            around = EDGES.get(node.name, "")
            inside: list[Any] = [around, *node.contents, around] if node.contents else [around]
            todo += [(child, pre or node.name == "pre") for child in reversed(inside)]
        elif isinstance(node, NavigableString) and not isinstance(node, PreformattedString):  # comments and the like
            text = str(node) if pre else " ".join(node.split())
            if text:
                gap += " " if not pre and node[0].isspace() else ""
                lines = "\n" * min(gap.count("\n"), 2)
                if lines and parts:
                    parts[-1] = parts[-1].rstrip()
                parts.append((lines or gap[:1]) + (text.strip("\n") if lines else text))
                gap = ""
            gap += " " if not pre and node[-1:].isspace() else ""
        elif isinstance(node, str) and not isinstance(node, NavigableString):
            gap += node
    return "".join(parts)


def _pdf(path: Path) -> str:
    """The text layer, a page after the other. Raises Unreadable; scans have none."""
    from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of every small fault that it gets over
    try:
        pages = [page.extract_text().strip() for page in PdfReader(path).pages]
    except OSError:
        raise
    except Exception as error:  # damaged files raise anything, locked ones a FileNotDecryptedError
        raise Unreadable(f"PDF: {str(error) or type(error).__name__}") from error
    if not any(pages):
        raise Unreadable("PDF without text (scanned pages?)")
    text = "\n\n".join(page for page in pages if page)
    return text.replace("\0", "").encode(errors="replace").decode()  # wrong font tables give halves of characters


# Where a text may be cut, best first: behind a paragraph, a line, a sentence, a word.
BORDERS = [re.compile(border) for border in (r"(?<=\n\n)(?!\n)", r"(?<=\n)", r"(?<=[.!?] )|(?<=[。！？])", r"(?<=\s)")]


def split(text: str, limit: int, count: Callable[[list[str]], list[int]]) -> list[tuple[int, int]]:
    """Cut a text into pieces of up to `limit` tokens, as long as they can be: their (start, stop) in it.

    `count` gives the tokens of texts. They are counted paragraph by paragraph, which a tokenizer may count one or two
    higher than their joined text. A paragraph over the limit is cut at lines, then sentences, words, anywhere.
    """
    pieces: list[tuple[int, int]] = []
    start = stop = room = 0
    for part, tokens in paragraphs(text, limit, count):
        if tokens > room:
            if stop > start:
                pieces.append((start, stop))
            start, room = stop, limit
        stop, room = stop + len(part), room - tokens
    return [*pieces, (start, stop)] if stop > start else pieces


def paragraphs(text: str, limit: int, count: Callable[[list[str]], list[int]]) -> Iterator[tuple[str, int]]:
    """All of a text in parts of up to `limit` tokens, with their tokens: paragraphs, and parts of longer ones."""
    return _parts(text, limit, count, BORDERS)


def _parts(
    text: str, limit: int, count: Callable[[list[str]], list[int]], borders: list[re.Pattern[str]]
) -> Iterator[tuple[str, int]]:
    if borders:
        parts = [part for part in borders[0].split(text) if part]
    else:
        parts = [text[: len(text) // 2], text[len(text) // 2 :]]
    for part, tokens in zip(parts, count(parts), strict=True):
        if tokens <= limit or len(part) == 1:
            yield part, tokens
        else:
            yield from _parts(part, limit, count, borders[1:])
