"""A tokenizer's own chat template (Jinja), taken apart: which of the text it makes is an answer, and where one ends."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

from jinja2 import TemplateError

from longalign.data.messages import BadSample, Messages
from longalign.errors import UserError

MARK = "\u241f"  # stands for a content whose place in the rendered text is wanted
# Some templates write today's date. What a model is asked tomorrow must be what it was trained on today.
DATE = datetime(2024, 7, 26)  # the default of Llama 3.1's template


class Segment(NamedTuple):
    text: str
    is_target: bool
    is_special: bool = False  # the text names a special token


class Rewrites(Exception):
    """Rendering a longer conversation changes the text of its beginning."""


class ChatTemplate:
    """`arguments` are passed to the template, e.g. {"enable_thinking": False} for Qwen3. Raises UserError."""

    def __init__(self, tokenizer: Any, arguments: dict[str, Any]):
        if not tokenizer.chat_template:
            raise UserError(
                "template=chat_template, but the tokenizer has none (a base model?); "
                "choose template=longalign-llama, longalign-chatglm or text"
            )
        self.tokenizer, self.arguments = tokenizer, arguments
        self.end_of_turn = self._end_of_turn()
        self.has_system = self._has_system()

    def render(self, messages: Messages, ask: bool) -> str:
        """The conversation as text; ask: up to where the next answer begins. Raises BadSample."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask, strftime_now=DATE.strftime, **self.arguments
            )
        except TemplateError as error:  # the template's own rules about roles
            raise BadSample(f"refused by the chat template: {error}") from None

    def rows(self, messages: Messages) -> list[list[Segment]]:
        """One list of segments, or one per answer if rendering a turn changes earlier ones (Qwen3 drops thoughts)."""
        try:
            rows = [self._split(messages, self.render(messages, ask=False))]
        except Rewrites:
            ends = [place + 1 for place, message in enumerate(messages) if message["role"] == "assistant"]
            rows = [list(self._turn(messages[:end])) for end in ends]
        return [row if row[-1].is_target else row[:-1] for row in rows]  # nothing is learnt from a last line break

    def asked(self, messages: Messages) -> list[Segment]:
        """The segments of a conversation that ends with a question."""
        text = self.render(messages, ask=True)
        try:
            return self._split(messages, text)
        except Rewrites:
            return [Segment(text, False)]

    def _turn(self, messages: Messages) -> tuple[Segment, Segment]:
        """The last answer of `messages`, its end-of-turn token included, and all before it."""
        asked, answered = self.render(messages[:-1], ask=True), self.render(messages, ask=False)
        if not answered.startswith(asked):
            raise BadSample("the chat template does not continue its own prompt")
        answer = answered[len(asked) :]
        if self.end_of_turn and self.end_of_turn in answer:
            answer = answer.rpartition(self.end_of_turn)[0] + self.end_of_turn
        return Segment(asked, False), Segment(answer, True)

    def _split(self, messages: Messages, text: str) -> list[Segment]:
        """The segments of `text` = the rendered `messages`. Raises Rewrites if its turns do not extend each other."""
        segments: list[Segment] = []
        done = 0
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                asked, answer = self._turn(messages[: place + 1])
                if not text.startswith(asked.text + answer.text):
                    raise Rewrites
                segments += [Segment(asked.text[done:], False), answer]
                done = len(asked.text) + len(answer.text)
        return [*segments, Segment(text[done:], False)] if done < len(text) else segments

    def _end_of_turn(self) -> str | None:
        """The special token that the template puts after an answer; None if the next role simply follows (GLM-4)."""
        answered = self.render([_user("x"), {"role": "assistant", "content": MARK}], ask=False)
        tail = answered.rpartition(MARK)[2]
        found = [(tail.find(token), token) for token in special_tokens(self.tokenizer) if token in tail]
        return min(found)[1] if found else None

    def _has_system(self) -> bool:
        """Whether the template has a place for a system message, and keeps it there when an answer follows."""
        asked_with = [{"role": "system", "content": MARK}, _user("x")]
        try:
            asked = self.render(asked_with, ask=True)
            answered = self.render([*asked_with, {"role": "assistant", "content": "x"}], ask=False)
        except Exception:  # Jinja templates refuse a system role with errors of their own
            return False
        return MARK in asked and answered.startswith(asked)


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def special_tokens(tokenizer: Any) -> list[str]:
    """Every special token, longest first, also those without a name of their own such as Llama-3's <|eot_id|>."""
    named = set(tokenizer.all_special_tokens)
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(named | added, key=lambda token: (-len(token), token))
