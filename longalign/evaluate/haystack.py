"""Documents of a wanted length with facts hidden at wanted depths, for needle and retrieval."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from longalign.data.documents import Unreadable, find_documents, read_document
from longalign.data.synthetic import filler
from longalign.errors import UserError
from longalign.progress import warn

MISSES = 20  # sentences that do not fit any more, after which a document is full
Hidden = tuple[float, str]  # depth (0 = first, 1 = last) and the sentence that is put there


def sentences(setting: str, haystack: str | None, seed: str) -> Iterator[str]:
    """Endless sentences of the texts in `haystack`, from a random place on, or generated ones.

    Raises UserError naming `setting` if there are none.
    """
    if haystack is None:
        yield from filler(random.Random(seed))
        return
    found = _sentences_of(setting, haystack)
    start = random.Random(seed).randrange(len(found))
    while True:
        yield from found[start:]
        start = 0


@functools.cache
def _sentences_of(setting: str, haystack: str) -> list[str]:
    """The sentences of every document in a folder, or of one."""
    found = []
    for file in find_documents(Path(haystack)):
        try:
            found += [s for s in re.split(r"(?<=[.!?])\s+", read_document(file)) if s.strip()]
        except Unreadable as error:
            warn(f"{setting}: {file} is left out: {error}")
    if not found:
        raise UserError(f"{setting}={haystack}: no text there; null generates sentences")
    return found


def tokens_within(count_tokens: Callable[[str], int]) -> Callable[[str], int]:
    """The tokens that a text adds to one before it: without those that a tokenizer puts before every text alone."""
    alone = count_tokens(".")
    return functools.cache(lambda text: count_tokens("." + text) - alone)


def build_document(hidden: Sequence[Hidden], room: int, source: Iterator[str], count: Callable[[str], int]) -> str:
    """Sentences of `source` and the hidden ones among them, at most `room` tokens as `count` counts them."""
    left = room - sum(count(" " + sentence) for _, sentence in hidden)
    text: list[str] = []
    too_long = 0
    for sentence in source:
        need = count(" " + sentence)
        if need <= left:
            text.append(sentence)
            left -= need
        else:  # a shorter one may fit
            too_long += 1
            if too_long == MISSES:
                break
    among = len(text)
    for depth, sentence in sorted(hidden, reverse=True):  # from the end, so that earlier places stay where they are
        text.insert(round(depth * among), sentence)
    return " ".join(text)


def document_of(
    tokens: int,
    hidden: Sequence[Hidden],
    source: Callable[[], Iterator[str]],
    count: Callable[[str], int],
    prompt_tokens: Callable[[str], int],
) -> str | None:
    """A document with which the whole prompt has `tokens` tokens, or a few less; None if the hidden do not fit.

    count: tokens of a sentence within a text. A prompt may have a few more than their sum, which is corrected.
    source: begins the same sentences anew.
    """
    room = tokens - prompt_tokens("")
    need = sum(count(" " + sentence) for _, sentence in hidden)
    while room >= need:
        document = build_document(hidden, room, source(), count)
        over = prompt_tokens(document) - tokens
        if over <= 0:
            return document
        room -= over
    return None
