"""HTML of a chat page -> Markdown, which is what the model wrote before the page rendered it."""

from __future__ import annotations

import re
from typing import Any

from bs4 import BeautifulSoup
from markdownify import MarkdownConverter

from longalign.data.messages import BadSample

# An answer is HTML if it begins with a block. People paste HTML into questions, which is theirs and stays as it is:
# a question is HTML only if it begins with a box of the chat page.
BLOCK = re.compile(r"\s*<(?:div|p|pre|ol|ul|h[1-6]|table|blockquote|hr)\b[^<>]*>", re.IGNORECASE)
PAGE_BOX = re.compile(r"""\s*<div\b[^<>]*\bclass=["'][^"'<>]*\b(?:whitespace-pre-wrap|markdown|prose)\b""")

LANGUAGE = r"[\w+#.-]*"  # of a code block: python, c++, objective-c
# What is left of the button above a code block: `pythonCopy code`, within a fence or alone on a line.
IN_FENCE = re.compile(rf"^([ \t]*```)[ \t]*\n?[ \t]*({LANGUAGE})Copy code[ \t]*\n?", re.MULTILINE)
ALONE = re.compile(rf"^[ \t]*{LANGUAGE}Copy code[ \t]*(?:\n|\Z)", re.MULTILINE)
BUTTON = re.compile(rf"\s*({LANGUAGE})Copy code\n?")
ANSWER_COUNTER = re.compile(r"\d+ / \d+\s*\n")  # "2 / 3": which of several answers the page showed


class Converter(MarkdownConverter):
    """Markdown with literal punctuation: the text is read by a model, not rendered again."""

    def convert_pre(self, el: Any, text: str, parent_tags: set[str]) -> str:
        """The code alone, without the header and the button of its box."""
        code = el.find("code")
        text = (code or el).get_text()
        button = None if code else BUTTON.match(text)
        language = next((c.removeprefix("language-") for c in _classes(code) if c.startswith("language-")), "")
        if button:
            language, text = button[1], text[button.end() :]
        text = text.strip("\n")
        fence = "`" * max(3, 1 + max(map(len, re.findall(r"`{3,}", text)), default=0))
        return f"\n\n{fence}{language}\n{text}\n{fence}\n\n"

    def convert_span(self, el: Any, text: str, parent_tags: set[str]) -> str:
        """A formula stands on the page three times: as MathML, as TeX and as boxes. The TeX is kept."""
        if "katex" not in _classes(el):
            return text
        tex = el.find("annotation")
        mark = "$$" if "katex-display" in _classes(el.parent) else "$"
        return f"{mark}{tex.get_text().strip()}{mark}" if tex else text

    def convert_div(self, el: Any, text: str, parent_tags: set[str]) -> str:
        """Where the page keeps line ends, as it does in questions, so do we."""
        if "whitespace-pre-wrap" in _classes(el) and not el.find(True):
            text = el.get_text()
        return f"\n\n{text}\n\n" if text.strip() else ""

    def convert_br(self, el: Any, text: str, parent_tags: set[str]) -> str:
        return " " if "_inline" in parent_tags else "\n"

    def convert_button(self, el: Any, text: str, parent_tags: set[str]) -> str:
        return ""

    convert_svg = convert_button


CONVERTER = Converter(
    heading_style="ATX", bullets="-", escape_asterisks=False, escape_underscores=False, escape_misc=False
)


def _classes(element: Any) -> list[str]:
    return element.get("class", []) if element is not None else []


def is_html(text: str, role: str) -> bool:
    return bool((BLOCK if role == "assistant" else PAGE_BOX).match(text))


def to_markdown(text: str) -> str:
    """The text of a page's piece of HTML, which may be broken. Raises BadSample if it is nested absurdly deep."""
    try:
        text = CONVERTER.convert_soup(BeautifulSoup(text, "html.parser")).strip()
    except RecursionError:
        raise BadSample("HTML nested too deep") from None
    counter = ANSWER_COUNTER.match(text)
    return text[counter.end() :].lstrip() if counter else text


def without_buttons(text: str) -> str:
    """Take away what copying from the page left: `Copy code` where a code block begins."""
    return ALONE.sub("", IN_FENCE.sub(r"\1\2\n", text)) if "Copy code" in text else text
