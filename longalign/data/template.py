"""Messages <-> token ids: the one encoder of training, evaluation and chat.

A template turns a conversation into segments, each a piece of text that is a target (an answer) or not. Every
segment is encoded on its own, so the ids of a conversation's beginning do not depend on what follows, and what a
model is asked with is what it was trained on. `golden` cases of the LongAlign reference fix the details:

    ids     [BOS] prompt_1  answer_1  prompt_2  answer_2  EOS
    labels   -100   -100    answer_1   EOS -100 answer_2  EOS

labels[t] is the id scored with the logits of position t-1. The EOS after an inner answer is a label only: the
input there is already the next round's first token. The Jinja templates of other models need no such EOS: their
assistant turns end with a token of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from longalign.data.chat_template import ChatTemplate, Segment, special_tokens
from longalign.data.messages import BadSample, Messages, merge_system
from longalign.data.words import words_of
from longalign.errors import UserError

IGNORE = -100


@dataclass(frozen=True, eq=False)
class Row:
    """One training sample of T tokens, not padded: `ids` and `targets`, int32 [T]; targets[0] is always -100.

    `input_ids` and `labels` are the same as lists.
    """

    ids: np.ndarray
    targets: np.ndarray

    @property
    def input_ids(self) -> list[int]:
        return self.ids.tolist()

    @property
    def labels(self) -> list[int]:
        return self.targets.tolist()

    @property
    def n_target(self) -> int:
        return int((self.targets != IGNORE).sum())


class Piece(NamedTuple):
    """A text to encode. literal: special tokens spelled in it are text; the first `skip` ids are not the piece's."""

    text: str
    literal: bool = False
    skip: int = 0


BATCH = 1 << 20  # characters that are encoded at a time: their encodings take a hundred times the room of the ids
SHIELD = "\ufdd0"  # a code point that no text has; within a special token's spelling it says: only text


class Template:
    """`name` is longalign-llama, longalign-chatglm, chatglm3, chat_template or text (see schema.Config.template).

    arguments: for chat_template, passed on to it. Raises UserError if the tokenizer lacks what the template needs.
    """

    def __init__(self, name: str, tokenizer: Any, arguments: dict[str, Any] | None = None):
        self.name, self.tokenizer = name, tokenizer
        self.jinja = ChatTemplate(tokenizer, arguments or {}) if name == "chat_template" else None
        self.has_system = name == "chatglm3" or (self.jinja is not None and self.jinja.has_system)
        if name == "chatglm3" and "<|assistant|>" not in tokenizer.get_vocab():
            raise UserError("template=chatglm3: the tokenizer lacks ChatGLM3's role tokens; choose another template")
        # A Jinja template may end answers with nothing of its own: then EOS ends them, as in the others.
        self.eos_after_answer = self.jinja is None or self.jinja.end_of_turn is None
        # ChatGLM's tokenizer never reads a special token from text.
        spellings = [] if tokenizer.split_special_tokens else [t for t in special_tokens(tokenizer) if len(t) > 1]
        self.special = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")
        self.ids_of_special = {t: tokenizer.convert_tokens_to_ids(t) for t in special_tokens(tokenizer)}
        self.eos, self.bos = tokenizer.eos_token_id, tokenizer.bos_token or ""
        self.always_literal = bool(tokenizer.split_special_tokens)
        self.backend = getattr(tokenizer, "backend_tokenizer", None)
        self.words = words_of(self.backend) if self.backend is not None else None
        if self.backend is not None:  # a tokenizer.json may ask for either
            self.backend.no_truncation()
            self.backend.no_padding()
        self.start = self._start()
        behind, alone, line_break = self._encode([Piece(self.bos + "x"), Piece("x"), Piece("\n", literal=True)])
        self.prefix_at_start_only = bool(self.bos) and behind[1:].tolist() != alone.tolist()
        self.line_break = len(line_break)

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes, which encode: that takes no transformers, whose import costs seconds and 200 MB."""
        needed = self.jinja is not None or self.backend is None
        return {**self.__dict__, "tokenizer": self.tokenizer if needed else None}

    # -- training ---------------------------------------------------------------------------------

    def rows(self, messages: Messages) -> list[Row]:
        """Encode a conversation for training, one row unless the template rewrites earlier turns.

        Raises BadSample if no target comes of it.
        """
        rows = [row for row in self.encode(self.segments(messages)) if row.n_target]
        if not rows:
            raise BadSample("no target")
        return rows

    def segments(self, messages: Messages) -> list[list[Segment]]:
        """The segments of every row of a conversation. Raises BadSample."""
        messages = self._prepared(messages)
        return self.jinja.rows(messages) if self.jinja else [self._segments(messages)]

    def text_segments(self, text: str) -> list[Segment]:
        """A document for continued training: every token of its row will be a target."""
        return [Segment(self._shielded(text), True)]

    def encode(self, rows: list[list[Segment]], asking: bool = False) -> list[Row]:
        """Many rows from their segments, all texts in few calls of the tokenizer.

        asking: prompts, with no end; else rows for training, which may lack targets.
        """
        pieces = [
            [list(self._pieces(segment, first=place == 0)) for place, segment in enumerate(segments)]
            for segments in rows
        ]
        encoded = iter(self._encode([p for row in pieces for segment in row for p in segment if isinstance(p, Piece)]))
        done = []
        for segments, of_row in zip(rows, pieces, strict=True):
            ids = [
                _joined([next(encoded) if isinstance(p, Piece) else np.array([p], np.int32) for p in of_segment])
                for of_segment in of_row
            ]
            done.append(self._assemble(segments, ids, asking))
        return done

    # -- asking -----------------------------------------------------------------------------------

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Encode a conversation that ends with a user turn, up to where the answer begins."""
        if messages[-1]["role"] != "user":
            raise ValueError("a prompt ends with a user message")
        messages = self._prepared(messages)
        if self.jinja:
            segments = self.jinja.asked(messages)
        elif self.name == "text":
            segments = [Segment(messages[-1]["content"], False)]
        else:
            segments = self._segments(messages)
        return self.encode([segments], asking=True)[0].input_ids

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: EOS, the end-of-turn token of a Jinja template, ChatGLM3's next role."""
        ends = ["<|user|>", "<|observation|>"] if self.name == "chatglm3" else []
        if self.jinja and self.jinja.end_of_turn:
            ends = [self.jinja.end_of_turn]
        return sorted({self.tokenizer.eos_token_id, *self.tokenizer.convert_tokens_to_ids(ends)})

    # -- segments ---------------------------------------------------------------------------------

    def _prepared(self, messages: Messages) -> Messages:
        messages = messages if self.has_system else merge_system(messages)
        return [{**message, "content": self._shielded(message["content"])} for message in messages]

    def _shielded(self, text: str) -> str:
        """What people write stays text, also `</s>` in a web page or `<|im_end|>` in a prompt."""
        return self.special.sub(lambda found: found[0][0] + SHIELD + found[0][1:], text)

    def _segments(self, messages: Messages) -> list[Segment]:
        """longalign-llama and longalign-chatglm: rounds joined by a blank line. chatglm3: see _roles."""
        if self.name == "chatglm3":
            return self._roles(messages)
        segments = []
        for place, message in enumerate(messages):
            content = message["content"]
            if message["role"] == "assistant":
                segments.append(Segment(content, True))
                continue
            blank = "\n\n" if place else ""
            if self.name == "longalign-llama":
                text = f"{blank}[INST]{content}[/INST]"
            else:
                text = f"{blank}[Round {place // 2 + 1}]\n\n问：{content}\n\n答："
            segments.append(Segment(text, False))
        return segments

    def _roles(self, messages: Messages) -> list[Segment]:
        """ChatGLM3's own chat: a role's token, a line for metadata (empty, and written by the model), the content.

        The original encodes line and content apart: the same ids, given the space that is the content's dummy prefix.
        """
        segments = []
        for message in messages:
            role, text = message["role"], f"\n {message['content']}" if message["content"] else "\n"
            if role != "assistant":
                segments.append(Segment(f"<|{role}|>", False, is_special=True))
            segments.append(Segment(text, role == "assistant" and text != "\n"))
            if role == "user":
                segments.append(Segment("<|assistant|>", False, is_special=True))
        return segments

    # -- ids --------------------------------------------------------------------------------------

    def _start(self) -> list[int]:
        """What the tokenizer puts before a text: [gMASK] sop for ChatGLM; BOS, where it has one, for all others.

        transformers >= 5 adds no BOS when a Llama tokenizer is read from `tokenizer.model` alone; its training had one.
        """
        if self.jinja:  # it writes its own
            return []
        ids = self.tokenizer("", add_special_tokens=True)["input_ids"]
        ids = ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
        bos = self.tokenizer.bos_token_id
        return ids or ([] if bos is None else [bos])

    def _pieces(self, segment: Segment, first: bool) -> Iterator[Piece | int]:
        """What is encoded for a segment, and ids that stand for themselves; first: it begins the conversation.

        Llama-2's sentencepiece tokenizer adds a space at the start of a text. A later segment is no such start, so
        it is encoded behind a BOS, which is then taken off. (Its `legacy` variant and ChatGLM's add one everywhere.)
        """
        text = segment.text
        if segment.is_special:
            yield self.ids_of_special[text]
        elif SHIELD in text:
            yield from self._shielded_pieces(text, first)
        elif first or not text or not self.prefix_at_start_only:
            yield Piece(text)
        else:
            yield Piece(self.bos + text, skip=1)

    def _shielded_pieces(self, text: str, first: bool) -> Iterator[Piece | int]:
        """Special tokens that the template wrote become their ids, those that people wrote stay text."""
        for place, piece in enumerate(re.split(f"({self.special.pattern})", text)):
            said = piece.replace(SHIELD, "")
            if place % 2:
                yield self.ids_of_special[piece]
            elif (first and place == 0) or not self.prefix_at_start_only:
                yield Piece(said, literal=True)
            else:  # behind a line break, which merges with nothing: BOS itself would be read as text here
                yield Piece("\n" + said, literal=True, skip=self.line_break)

    def _encode(self, pieces: list[Piece]) -> list[np.ndarray]:
        """The ids of every piece, int32."""
        done = [np.empty(0, np.int32)] * len(pieces)
        rest: dict[bool, list[int]] = {False: [], True: []}
        if self.backend is not None:
            self.backend.encode_special_tokens = self.always_literal
        for place, piece in enumerate(pieces):
            behind_bos = len(self.bos) if piece.skip and not piece.literal else 0
            if self.words is not None and self.words.can(piece.text, behind_bos):
                done[place] = self.words(piece.text)[piece.skip :]
            elif piece.text:
                rest[piece.literal].append(place)
        for literal, places in rest.items():
            sizes = np.cumsum([len(pieces[place].text) for place in places], dtype=np.int64) // BATCH
            for batch in np.split(np.array(places, np.int64), np.flatnonzero(np.diff(sizes)) + 1):
                if len(batch):
                    self._encode_batch(pieces, batch.tolist(), literal, done)
        return done

    def _encode_batch(self, pieces: list[Piece], batch: list[int], literal: bool, done: list[np.ndarray]) -> None:
        texts = [pieces[place].text for place in batch]
        literal = literal or self.always_literal
        if self.backend is None:
            options = {"add_special_tokens": False, "split_special_tokens": literal, "verbose": False}
            ids = iter(self.tokenizer(texts, **options)["input_ids"])
        else:  # without the detours of transformers, and without the places of tokens in the text
            self.backend.encode_special_tokens = literal
            ids = (one.ids for one in self.backend.encode_batch_fast(texts, add_special_tokens=False))
        for place, of_piece in zip(batch, ids, strict=True):
            done[place] = np.array(of_piece, np.int32)[pieces[place].skip :]

    def _assemble(self, segments: list[Segment], ids: list[np.ndarray], asking: bool) -> Row:
        eos = self.eos
        parts = [np.array(self.start, np.int32)]
        labels = [np.full(len(self.start), IGNORE, np.int32)]
        ends = self.eos_after_answer and not asking
        end_of_answer = False  # the previous segment was an answer with tokens: EOS is due as the next label
        for segment, piece in zip(segments, ids, strict=True):
            of_piece = piece.copy() if segment.is_target else np.full(len(piece), IGNORE, np.int32)
            if end_of_answer and len(piece):
                of_piece[0] = eos
            parts.append(piece)
            labels.append(of_piece)
            end_of_answer = ends and segment.is_target and len(piece) > 0
        if ends:
            parts.append(np.array([eos], np.int32))
            labels.append(np.array([eos if end_of_answer else IGNORE], np.int32))
        row = np.concatenate(parts)
        targets = row.copy() if self.name == "text" else np.concatenate(labels)
        targets[:1] = IGNORE  # nothing comes before it that could predict it
        return Row(row, targets)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate([np.empty(0, np.int32), *arrays])
