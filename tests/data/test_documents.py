"""Documents of any kind become the text that a reader sees, or a reason; cutting them loses nothing."""

from __future__ import annotations

import codecs
import itertools
import random
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from longalign.data.documents import Unreadable, find_documents, read_document, split
from tests.conftest import TINY


def read(folder: Path, name: str, data: bytes) -> str:
    (folder / name).write_bytes(data)
    return read_document(folder / name)


def pdf(*pages: str) -> bytes:
    """A PDF written by hand, each page with the lines of a text."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    for page in pages:
        shown = "".join(f"({line}) Tj 0 -14 Td " for line in page.splitlines())
        stream = f"BT /F1 12 Tf 72 720 Td {shown}ET"
        content = len(objects) + 2
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {content} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(pages)))
    objects[1] = f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"
    out, places = "%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    start = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    out += f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n"
    return out.encode()


# -- text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "README", "a.unknown"])
def test_text_stands_as_it_is(name: str, tmp_path: Path) -> None:
    assert read(tmp_path, name, b"# <b>x</b> &amp;\n\tdef f():\n") == "# <b>x</b> &amp;\n\tdef f():"


@pytest.mark.parametrize("bom", [codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE], ids=["8", "16le", "16be"])
def test_byte_order_marks(bom: bytes, tmp_path: Path) -> None:
    encoding = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}[bom]
    assert read(tmp_path, "a.txt", bom + "déjà 长文\r\nend".encode(encoding)) == "déjà 长文\nend"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("长文".encode("gb18030"), "not utf-8 text; save it as UTF-8"),
        ("déjà".encode("latin-1"), "not utf-8 text; save it as UTF-8"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not text"),
        (b"plain\0text", "not text"),
        ("utf-32".encode("utf-32"), "not text"),
    ],
)
def test_never_guessed(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(Unreadable) as error:
        read(tmp_path, "a.txt", data)
    assert str(error.value) == reason


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.txt", tmp_path / "absent.pdf"):
        with pytest.raises(Unreadable, match=r"directory|No such file"):
            read_document(path)


# -- HTML -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>One\n  two.</p><p>Three</p>tail", "One two.\n\nThree\n\ntail"),
        ("<p>a <b>bold</b>, <i>x</i>&amp;&lt;y&gt;&nbsp;z", "a bold, x&<y> z"),
        ("a<br>b<br/>c", "a\nb\nc"),
        ("<p>x</p><pre>if a:\n    b\n\n\nc</pre>", "x\n\nif a:\n    b\n\n\nc"),
        ("<pre>\nif a:\n\n    <b>b</b>\n  c\n</pre>d", "if a:\n\n    b\n  c\n\nd"),
        ("a<br><br>b <p> c", "a\n\nb\n\nc"),
        ("<ul><li>one<li>two</ul>", "one\n\ntwo"),
        ("<head><title>t</title><style>p{}</style></head><p>x</p><script>y()</script><svg><text>z</text></svg>", "x"),
        ("<html><head><meta charset=utf-8><title>t</title><body>optional tags", "optional tags"),
        ("<title>t</title>x", "x"),
        ("<!DOCTYPE html><!-- no --><p>x<!-- no --></p><?xml no ?>", "x"),
        ("<div>" * 2000 + "deep", "deep"),
        ("<p>never closed <b>x", "never closed x"),
        ("", ""),
    ],
)
def test_html_as_it_is_seen(page: str, text: str, tmp_path: Path) -> None:
    assert read(tmp_path, "a.html", page.encode()) == text


def test_html_of_many_paragraphs_takes_as_long_as_they_are(tmp_path: Path) -> None:
    seconds = []
    for n in (1000, 8000):
        start = time.perf_counter()
        assert read(tmp_path, "a.html", b"<p>some <b>text</b></p>\n" * n).count("\n\n") == n - 1
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < 30 * seconds[0], "eight times the paragraphs; 64 if quadratic"


def test_html_tables_keep_cells_apart(tmp_path: Path) -> None:
    page = b"<table><tr><th>year<th>sum<tr><td>1901</td><td>7</td></tr></table>"
    assert read(tmp_path, "a.htm", page).split() == ["year", "sum", "1901", "7"]


@pytest.mark.parametrize(
    ("declared", "encoding", "text"),
    [
        ("gb2312", "gb18030", "镕𠮷"),  # beyond GB 2312, as pages that declare it often are
        ("GBK", "gb18030", "长文"),
        ("iso-8859-1", "cp1252", "“déjà” €"),
        ("big5", "big5", "長文"),
        ("utf-16", "utf-8", "déjà"),  # a meta tag that could be read says that it is none
        ("utf-8", "utf-8", "長文"),
    ],
)
def test_html_in_the_encoding_that_it_declares(declared: str, encoding: str, text: str, tmp_path: Path) -> None:
    assert read(tmp_path, "a.html", f'<meta charset="{declared}"><p>{text}'.encode(encoding)) == text


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (b'<meta charset="nonsense">x', "unknown encoding nonsense"),
        (b'<meta charset="big5">\xff\xff', "not big5 text; save it as UTF-8"),
        (b"<![foo <p>x", "HTML with a broken declaration (<![...)"),
        (b"<p>\xff</p>", "not utf-8 text; save it as UTF-8"),
    ],
)
def test_html_that_cannot_be_read(page: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(Unreadable) as error:
        read(tmp_path, "a.html", page)
    assert str(error.value) == reason


# -- PDF ------------------------------------------------------------------------------------------------------


def test_pdf_pages_in_order(tmp_path: Path) -> None:
    text = read(tmp_path, "A.PDF", pdf("First line\nsecond line", "", "Third page"))
    assert text == "First line\nsecond line\n\nThird page"


def test_pdfs_that_cannot_be_read(tmp_path: Path) -> None:
    from pypdf import PdfReader, PdfWriter

    whole = pdf("Secret")
    with pytest.raises(Unreadable, match="scanned pages"):
        read(tmp_path, "scan.pdf", pdf("", ""))
    for broken in (b"", b"%PDF-1.4\n", b"no PDF at all", whole[:120]):
        with pytest.raises(Unreadable, match="PDF"):
            read(tmp_path, "broken.pdf", broken)
    (tmp_path / "open.pdf").write_bytes(whole)
    writer = PdfWriter(clone_from=PdfReader(tmp_path / "open.pdf"))
    writer.encrypt("password", algorithm="RC4-128")
    writer.write(tmp_path / "locked.pdf")
    with pytest.raises(Unreadable, match=r"PDF: .*decrypted"):
        read_document(tmp_path / "locked.pdf")


# -- folders --------------------------------------------------------------------------------------------------


def test_documents_of_a_folder(tmp_path: Path) -> None:
    for name in ["b.txt", "a/z.md", "a/.hidden.txt", ".git/config", "c"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [str(file.relative_to(tmp_path)) for file in find_documents(tmp_path)] == ["a/z.md", "b.txt", "c"]
    assert find_documents(tmp_path / "b.txt") == [tmp_path / "b.txt"]
    assert find_documents(tmp_path / "absent") == []


# -- cutting --------------------------------------------------------------------------------------------------


def words_of(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def random_text(rng: random.Random) -> str:
    marks = [" ", " ", " ", "\n", "\n\n", "\n\n\n", ". ", "。", "? ", "  "]
    return "".join(rng.choice(["a", "word", "长", "x" * 30]) + rng.choice(marks) for _ in range(rng.randrange(200)))


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_the_text_and_fit(seed: int) -> None:
    rng = random.Random(seed)
    text, limit = random_text(rng), rng.randrange(1, 60)
    for count in (words_of, lambda texts: [len(text) for text in texts]):
        spans = split(text, limit, count)
        assert [stop for _, stop in spans[:-1]] == [start for start, _ in spans[1:]]
        assert "".join(text[slice(*span)] for span in spans) == text
        assert all(count([text[slice(*span)]])[0] <= limit for span in spans)


def test_pieces_are_as_long_as_they_can_be() -> None:
    rng = random.Random(0)
    paragraphs = [" ".join(["w"] * rng.randint(1, 20)) + "\n\n" for _ in range(100)]
    text, limit = "".join(paragraphs), 50
    pieces = [text[slice(*span)] for span in split(text, limit, words_of)]
    ends = set(itertools.accumulate(map(len, paragraphs)))
    assert set(itertools.accumulate(map(len, pieces))) <= ends, "cut between paragraphs only"
    for piece, following in itertools.pairwise(pieces):
        assert len(piece.split()) + len(following.split("\n\n")[0].split()) > limit


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a b c\nd e f", ["a b c\n", "d e f"]),
        ("a b c. d e f", ["a b c. ", "d e f"]),
        ("a b c d e", ["a b c ", "d e"]),
        ("", []),
    ],
)
def test_a_paragraph_that_is_too_long(text: str, pieces: list[str]) -> None:
    assert [text[slice(*span)] for span in split(text, 3, words_of)] == pieces


def test_a_character_is_never_cut() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    count = lambda texts: [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    text = "😀長" * 5
    assert count(["😀"])[0] > 1
    assert "".join(text[slice(*span)] for span in split(text, 1, count)) == text
    long = "The quiet lantern near the mill keeps amber. " * 200
    assert all(count([long[slice(*span)].strip()])[0] <= 100 for span in split(long, 100, count))
