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
from dataclasses import dataclass
from typing import Any

from longalign.data.chat_template import ChatTemplate, Segment, special_tokens
from longalign.data.messages import BadSample, Messages, merge_system
from longalign.errors import UserError

IGNORE = -100


@dataclass(frozen=True)
class Row:
    """One training sample, not padded. `labels[0]` is always -100."""

    input_ids: list[int]
    labels: list[int]

    @property
    def n_target(self) -> int:
        return sum(label != IGNORE for label in self.labels)


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
        bos = tokenizer.bos_token or ""
        self.prefix_at_start_only = bool(bos) and self._plain(bos + "x")[1:] != self._plain("x")

    # -- training ---------------------------------------------------------------------------------

    def rows(self, messages: Messages) -> list[Row]:
        """Encode a conversation for training, one row unless the template rewrites earlier turns.

        Raises BadSample if no target comes of it.
        """
        messages = self._prepared(messages)
        segments = self.jinja.rows(messages) if self.jinja else [self._segments(messages)]
        rows = [row for row in (self._assemble(s, self.eos_after_answer) for s in segments) if row.n_target]
        if not rows:
            raise BadSample("no target")
        return rows

    def text_row(self, text: str) -> Row:
        """Encode a document for continued training: every token a target, EOS at the end."""
        ids = [*self._start(), *self._ids(self._shielded(text), first=True), self.tokenizer.eos_token_id]
        if len(ids) < 2:
            raise BadSample("no target")
        return Row(ids, [IGNORE, *ids[1:]])

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
        return self._assemble(segments).input_ids

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

    def _plain(self, text: str, **kwargs: Any) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False, **kwargs)["input_ids"] if text else []

    def _ids(self, text: str, first: bool) -> list[int]:
        """The ids of a segment; first: it begins the conversation.

        Llama-2's sentencepiece tokenizer adds a space at the start of a text. A later segment is no such start, so
        it is encoded behind a BOS, which is then taken off. (Its `legacy` variant and ChatGLM's add one everywhere.)
        """
        if SHIELD in text:
            return self._shielded_ids(text, first)
        if first or not text or not self.prefix_at_start_only:
            return self._plain(text)
        return self._plain(self.tokenizer.bos_token + text)[1:]

    def _shielded_ids(self, text: str, first: bool) -> list[int]:
        """Special tokens that the template wrote become their ids, those that people wrote stay text."""
        ids: list[int] = []
        pieces = re.split(f"({self.special.pattern})", text)
        for place, piece in enumerate(pieces):
            said = piece.replace(SHIELD, "")
            if place % 2:
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            elif (first and not ids) or not self.prefix_at_start_only:
                ids += self._plain(said, split_special_tokens=True)
            else:  # behind a line break, which merges with nothing: BOS itself would be read as text here
                start = len(self._plain("\n", split_special_tokens=True))
                ids += self._plain("\n" + said, split_special_tokens=True)[start:]
        return ids

    def _assemble(self, segments: list[Segment], eos_after_answer: bool = False) -> Row:
        eos = self.tokenizer.eos_token_id
        ids = self._start()
        labels = [IGNORE] * len(ids)
        end_of_answer = False  # the previous segment was an answer with tokens: EOS is due as the next label
        for place, segment in enumerate(segments):
            if segment.is_special:
                piece = [self.tokenizer.convert_tokens_to_ids(segment.text)]
            else:
                piece = self._ids(segment.text, first=place == 0)
            piece_labels = piece.copy() if segment.is_target else [IGNORE] * len(piece)
            if end_of_answer and piece_labels:
                piece_labels[0] = eos
            ids += piece
            labels += piece_labels
            end_of_answer = eos_after_answer and segment.is_target and bool(piece)
        if eos_after_answer:
            ids.append(eos)
            labels.append(eos if end_of_answer else IGNORE)
        if labels:
            labels[0] = IGNORE  # nothing comes before it that could predict it
        return Row(ids, labels)
