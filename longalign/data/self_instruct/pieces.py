"""The user's documents as pieces of the wanted length, and the order in which they are drawn."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longalign.data.documents import Unreadable, find_documents, read_document, split
from longalign.errors import UserError
from longalign.progress import Bar
from longalign.schema import SelfInstruct

TASKS = ("general", "summary", "reasoning", "extraction")

Count = Callable[[list[str]], list[int]]  # the tokens of texts


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one. Its text is read again when needed: thousands of books would not fit in memory."""

    path: Path
    document: str  # the path below source.documents
    number: int  # of the piece in its document, from 1
    span: tuple[int, int]
    digest: str
    tokens: int
    language: str

    def text(self) -> str:
        """Raises UserError if the file is not what it was."""
        try:
            text = read_document(self.path)[slice(*self.span)].strip()
        except Unreadable:
            text = ""
        if digest_of(text) != self.digest:
            raise UserError(f"{self.path} was changed during the run; run again")
        return text


@dataclass
class Survey:
    """What source.documents holds."""

    found: int = 0
    pieces: list[Piece] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)  # document, reason, detail


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def cjk_share(text: str) -> float:
    """The share of Chinese characters among those that are not white space."""
    characters = "".join(text.split())
    return len(re.findall(r"[\u3400-\u9fff\U00020000-\U0003ffff]", characters)) / max(len(characters), 1)


def survey(source: SelfInstruct, count: Count) -> Survey:
    """Read every document and cut it into pieces. Raises UserError if there is none."""
    root = Path(source.documents)
    files = find_documents(root) if root.exists() else []
    if not files:
        raise UserError(f"source.documents={root}: {'no file in it' if root.exists() else 'no such folder or file'}")
    result = Survey(len(files))
    first: dict[str, str] = {}  # digest of a piece -> where it stood first
    with Bar("documents", total=len(files), unit="documents") as bar:
        for file in files:
            name = str(file.relative_to(root)) if root.is_dir() else file.name
            _cut(file, name, source, count, result, first)
            bar.advance(1)
    if not result.pieces:
        raise UserError(
            f"source.documents={root}: none of {result.found:,} documents can be used "
            f"({counted(result.left_out)}); source.min_tokens={source.min_tokens} decides what is too short"
        )
    return result


def _cut(file: Path, name: str, source: SelfInstruct, count: Count, result: Survey, first: dict[str, str]) -> None:
    """Add the pieces of one document to `result`, or why it has none."""

    def leave_out(reason: str, detail: str) -> None:
        result.left_out.append({"document": name, "reason": reason, "detail": detail})

    try:
        text = read_document(file)
    except Unreadable as error:
        return leave_out("unreadable", str(error))
    spans = split(text, source.max_tokens, count) or [(0, 0)]
    for number, span in enumerate(spans, start=1):
        part = text[slice(*span)].strip()
        tokens, digest = count([part])[0], digest_of(part)
        if tokens < source.min_tokens:
            leave_out("too short" if len(spans) == 1 else "rest too short", f"{tokens:,} tokens")
        elif digest in first:
            leave_out("duplicate", f"of {first[digest]}")
        else:
            first[digest] = name
            own = "zh" if cjk_share(part) > 0.3 else "en"
            language = own if own in source.languages else source.languages[0]
            result.pieces.append(Piece(file, name, number, span, digest, tokens, language))


def candidates(pieces: list[Piece], length_weight: float, seed: int) -> list[tuple[Piece, str]]:
    """All pieces with a task each, longer ones sooner; then all with a second task, and so on.

    The order is a weighted draw without replacement (Efraimidis and Spirakis 2006): by u**(1/weight), u uniform.
    """
    rng = random.Random(f"self_instruct {seed}")
    drawn = [
        (math.log(1 - rng.random()) / piece.tokens**length_weight, rng.sample(TASKS, len(TASKS))) for piece in pieces
    ]
    order = sorted(range(len(pieces)), key=lambda i: drawn[i][0], reverse=True)
    return [(pieces[i], drawn[i][1][turn]) for turn in range(len(TASKS)) for i in order]


def reasons(rows: list[dict[str, Any]]) -> dict[str, int]:
    return dict(sorted(Counter(row["reason"] for row in rows).items()))


def counted(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in reasons(rows).items())
