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

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError

from longalign.data.messages import BadSample, Messages, merge_system
from longalign.errors import UserError

IGNORE = -100


class Segment(NamedTuple):
    text: str
    is_target: bool
    is_special: bool = False  # the text names a special token


@dataclass(frozen=True)
class Row:
    """One training sample, not padded. `labels[0]` is always -100."""

    input_ids: list[int]
    labels: list[int]

    @property
    def n_target(self) -> int:
        return sum(label != IGNORE for label in self.labels)


Truncate = Literal["right", "middle", "drop", "error"]


@dataclass
class Template:
    """`name` is longalign-llama, longalign-chatglm, chatglm3, chat_template or text (see schema.Config.template)."""

    name: str
    tokenizer: Any  # transformers.PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        if self.name == "chat_template" and not self.tokenizer.chat_template:
            raise UserError(
                "template=chat_template, but the tokenizer has none (a base model?); "
                "choose template=longalign-llama, longalign-chatglm or text"
            )
        if self.name == "chatglm3" and "<|assistant|>" not in self.tokenizer.get_vocab():
            raise UserError("template=chatglm3: the tokenizer lacks ChatGLM3's role tokens; choose another template")
        # A Jinja template may end answers with nothing of its own: then EOS ends them, as in the others.
        self.eos_after_answer = self.name != "chat_template" or self._turn_end() is None

    def _turn_end(self) -> int | None:
        """The special token that a Jinja template puts right after an answer."""
        probe = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\u241f"}]
        tail = self._jinja_segments(probe)[-1][-1].text.rpartition("\u241f")[2]
        ids = self._ids(tail)
        return ids[0] if ids and ids[0] in self.tokenizer.all_special_ids else None

    @property
    def has_system(self) -> bool:
        """Whether the template has a place of its own for a system message."""
        if self.name != "chat_template":
            return self.name == "chatglm3"
        probe = [{"role": "system", "content": "\u241f"}, {"role": "user", "content": "x"}]
        try:
            return "\u241f" in self._render(probe, ask=True)
        except Exception:  # Jinja templates refuse a system role with errors of their own
            return False

    # -- training ---------------------------------------------------------------------------------

    def rows(self, messages: Messages) -> list[Row]:
        """Encode a conversation for training, one row unless the template rewrites earlier turns.

        Raises BadSample if no target comes of it.
        """
        if not self.has_system:
            messages = merge_system(messages)
        if self.name == "chat_template":
            try:
                rows = [self._assemble(s, self.eos_after_answer) for s in self._jinja_segments(messages)]
            except TemplateError as error:  # the template's own rules about roles
                raise BadSample(f"refused by the chat template: {error}") from None
        else:
            rows = [self._assemble(self._segments(messages), eos_after_answer=True)]
        rows = [row for row in rows if row.n_target]
        if not rows:
            raise BadSample("no target")
        return rows

    def text_row(self, text: str) -> Row:
        """Encode a document for continued training: every token a target, EOS at the end."""
        ids = [*self._start(), *self._first_ids(text), self.tokenizer.eos_token_id]
        if len(ids) < 2:
            raise BadSample("no target")
        return Row(ids, [IGNORE, *ids[1:]])

    # -- asking -----------------------------------------------------------------------------------

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Encode a conversation that ends with a user turn, up to where the answer begins."""
        if messages[-1]["role"] != "user":
            raise ValueError("a prompt ends with a user message")
        if not self.has_system:
            messages = merge_system(messages)
        if self.name == "chat_template":
            segments = self._asked_segments(messages)
        elif self.name == "text":
            segments = [Segment(messages[-1]["content"], False)]
        else:
            segments = self._segments(messages)
        return self._assemble(segments).input_ids

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: EOS, and the end-of-turn token of a Jinja template."""
        stops = {self.tokenizer.eos_token_id}
        if self.name == "chat_template":
            stops.add(self._turn_end())
        if self.name == "chatglm3":
            stops |= set(self.tokenizer.convert_tokens_to_ids(["<|user|>", "<|observation|>"]))
        return sorted(i for i in stops if i is not None)

    # -- segments ---------------------------------------------------------------------------------

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

    def _render(self, messages: Messages, ask: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)

    def _split(self, messages: Messages, start: int, text: str) -> list[Segment]:
        """The segments of `text` = the rendered `messages`, whose turns from `start` on extend each other."""
        segments, done = [], 0
        for place in range(start, len(messages), 1):
            if messages[place]["role"] != "assistant":
                continue
            asked = self._render(messages[:place], ask=True)
            answered = self._render(messages[: place + 1], ask=False)
            if not (answered.startswith(asked) and text.startswith(answered)):
                raise _Rewrites
            segments += [Segment(asked[done:], False), Segment(answered[len(asked) :], True)]
            done = len(answered)
        return segments if done == len(text) else [*segments, Segment(text[done:], False)]

    def _jinja_segments(self, messages: Messages) -> list[list[Segment]]:
        """One list of segments, or one per assistant turn if rendering a turn changes earlier ones."""
        try:
            return [self._split(messages, 0, self._render(messages, ask=False))]
        except _Rewrites:
            rows = []
            for place, message in enumerate(messages):
                if message["role"] == "assistant":
                    head = messages[: place + 1]
                    asked, answered = self._render(head[:-1], ask=True), self._render(head, ask=False)
                    if not answered.startswith(asked):
                        raise BadSample("the chat template does not continue its own prompt") from None
                    rows.append([Segment(asked, False), Segment(answered[len(asked) :], True)])
            return rows

    def _asked_segments(self, messages: Messages) -> list[Segment]:
        text = self._render(messages, ask=True)
        try:
            return self._split(messages, 0, text)
        except _Rewrites:
            return [Segment(text, False)]

    # -- ids --------------------------------------------------------------------------------------

    def _start(self) -> list[int]:
        """What the tokenizer puts before a text: [gMASK] sop for ChatGLM; BOS, where it has one, for all others.

        transformers >= 5 adds no BOS when a Llama tokenizer is read from `tokenizer.model` alone; its training had one.
        """
        if self.name == "chat_template":  # a Jinja template writes its own
            return []
        ids = self.tokenizer("", add_special_tokens=True)["input_ids"]
        ids = ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
        bos = self.tokenizer.bos_token_id
        return ids or ([] if bos is None else [bos])

    def _first_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []

    def _ids(self, text: str) -> list[int]:
        """The ids of a segment within a conversation.

        It is encoded behind a BOS, which is then taken off: at the start of a text a sentencepiece tokenizer would
        add a space that is not there (Llama-2's; its `legacy` variant and ChatGLM's add one to every segment).
        """
        if not text:
            return []
        mark = self.tokenizer.bos_token or ""
        ids = self.tokenizer(mark + text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids[1:] if mark else ids

    def _assemble(self, segments: list[Segment], eos_after_answer: bool = False) -> Row:
        eos = self.tokenizer.eos_token_id
        ids = self._start()
        labels = [IGNORE] * len(ids)
        end_of_answer = False  # the previous segment was an answer with tokens: EOS is due as the next label
        for place, segment in enumerate(segments):
            piece = self._ids(segment.text) if place else self._first_ids(segment.text)
            if segment.is_special:
                piece = [self.tokenizer.convert_tokens_to_ids(segment.text)]
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


class _Rewrites(Exception):
    """Rendering a longer conversation changes the text of its beginning."""


def truncate(row: Row, max_length: int, how: Truncate) -> Row:
    """Cut a row to `max_length` tokens. Raises BadSample if that is not allowed or leaves no target.

    right: keep the beginning, as the paper. middle: cut the middle out of the longest stretch without targets,
    normally the document of the first question, so that its head, the question and the answers stay.
    """
    excess = len(row.input_ids) - max_length
    if excess <= 0:
        return row
    if how in ("drop", "error"):
        raise BadSample("too long")
    start, stop = max_length, len(row.input_ids)
    if how == "middle":
        first, last = _longest_without_target(row.labels)
        if last - first <= excess:
            raise BadSample("too long: the answers alone exceed max_length")
        start = first + (last - first - excess) // 2
        stop = start + excess
    cut = Row(row.input_ids[:start] + row.input_ids[stop:], row.labels[:start] + row.labels[stop:])
    if not cut.n_target:
        raise BadSample("no target left after truncation")
    return cut


def _longest_without_target(labels: list[int]) -> tuple[int, int]:
    best, first = (0, 0), 0
    for place, label in enumerate([*labels, 0]):
        if label != IGNORE:
            if place - first > best[1] - best[0]:
                best = (first, place)
            first = place + 1
    return best
