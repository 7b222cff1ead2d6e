"""Sentencepiece's BPE word by word: the same ids, many times faster, whatever the length of the text.

Llama's and ChatGLM's tokenizers merge a whole text as if it were one word. In nearly all of them no piece of the
vocabulary has a space mark behind another character ("x▁"). Every merge makes a piece of the vocabulary, so none
reaches over such a place, and the ids of a text are those of its words, one after the other. A text has few different
words, so most are found among those met before.

A very long word, such as a text without spaces, is cut likewise where no piece has the two characters side by side, so
that memory does not grow with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer

MARK = "▁"
OVER_A_BORDER = re.compile(f"[^{MARK}]{MARK}")
FIRST = re.compile(f"[ {MARK}]*[^ {MARK}]*")
WORD = re.compile(f"[ {MARK}]+[^ {MARK}]*")
KEPT, LONGEST = 1 << 17, 64  # words remembered, characters of such a word
PART = 1 << 14  # characters after which a word is cut

BYTE = re.compile("<0x[0-9A-F]{2}>")
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
PREFIX = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": MARK}, SPACES]}


class Words(dict[str, Iterable[int]]):
    """`words(text)`: the ids of a text. A word met for the first time goes through the tokenizer's model."""

    def __init__(self, tokenizer: Tokenizer, added: list[str]):
        self.tokenizer, self.model = tokenizer, tokenizer.model
        self.added, self.needed = added, re.compile("|".join(map(re.escape, added)) or "(?!)")
        pairs = (pairwise(piece.replace(MARK, " ")) for piece in tokenizer.get_vocab())
        self.beside = {a + b for a, b in chain.from_iterable(pairs)}  # characters that a piece has side by side

    def __reduce__(self) -> tuple[Any, ...]:
        return Words, (self.tokenizer, self.added)

    def __missing__(self, word: str) -> Iterable[int]:
        if len(word) > PART:
            return chain.from_iterable(map(self._ids, self._parts(word)))
        ids = tuple(self._ids(word))
        if len(self) < KEPT and len(word) <= LONGEST:
            self[word] = ids
        return ids

    def _ids(self, word: str) -> list[int]:
        return [token.id for token in self.model.tokenize(word.replace(" ", MARK))]

    def _parts(self, word: str) -> Iterator[str]:
        """A word, cut after PART characters or as soon then as no piece can reach over the border."""
        start = 0
        while start < len(word):
            stop = min(start + PART, len(word))
            while stop < len(word) and word[stop - 1 : stop + 1].replace(MARK, " ") in self.beside:
                stop += 1
            yield word[start:stop]
            start = stop

    def can(self, text: str, start: int = 0) -> bool:
        """Not if a token such as `</s>`, which is no word, is spelled in it. start: behind its BOS."""
        return not self.needed.search(text, start)

    def __call__(self, text: str) -> np.ndarray:
        """The first word is the tokenizer's own: it may get a dummy prefix, or a BOS stands before it."""
        border = FIRST.match(text).end()  # type: ignore[union-attr]  # it always matches
        head = next(self._parts(text[:border]), "")
        first = self.tokenizer.encode(head, add_special_tokens=False).ids
        others = chain([text[len(head) : border]], WORD.findall(text, border))
        rest = chain.from_iterable(map(self.__getitem__, others))
        return np.fromiter(chain(first, rest), np.int32)


def words_of(tokenizer: Tokenizer) -> Words | None:
    """None unless ids word by word are provably those of the whole text."""
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    model, steps, before = state["model"], state["normalizer"], state["pre_tokenizer"]
    if model["type"] != "BPE" or not model["byte_fallback"]:  # else a run of unknown characters may become one token
        return None
    if any(model[key] for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")):
        return None
    marks_alone = before and [
        (one["type"], one.get("split"), one.get("prepend_scheme")) for one in before.get("pretokenizers", [before])
    ] == [("Metaspace", False, "first"), ("Metaspace", False, "never")]
    if not (steps == PREFIX and before is None) and not (steps == SPACES and marks_alone):
        return None
    added = [token["content"] for token in state["added_tokens"]]
    if MARK not in model["vocab"] or any(" " in one or MARK in one for one in added):
        return None
    if any(OVER_A_BORDER.search(piece) for piece in model["vocab"]):
        return None
    if any(BYTE.fullmatch(piece) for merge in model["merges"] for piece in merge):  # bytes of characters that it lacks
        return None
    return Words(tokenizer, added)
