"""What a model tells of an answer, be it in this process or behind an API."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Write = Callable[[str], object]  # takes the next piece of an answer


@dataclass(frozen=True)
class Answer:
    """Tokens of the whole prompt, of it those kept from before, and of the answer; None where an API does not tell.

    cut: max_new_tokens ended the answer.
    """

    prompt: int | None
    kept: int | None
    new: int | None
    cut: bool

    @property
    def used(self) -> int | None:
        """Tokens of the context that the conversation takes now."""
        return None if self.prompt is None or self.new is None else self.prompt + self.new
