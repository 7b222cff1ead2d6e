"""What the core of the evaluation and its tasks tell each other.

A task is a module in longalign/evaluate/tasks with three functions:

    questions(settings, seed, count_tokens) -> list[Question]      the same for the same seed; raises UserError
    score(question, answer, verdicts) -> {"score": ..., ...}       None = missing, which is never a zero
    summarise(rows) -> {"score": mean, ...}                        of the rows that run.py describes

A summary has `best`, the highest possible score, and may have breakdowns: by_X, over the groups of `about[X]`
({group: {"score": mean, "questions": n, "missing": n}}; a row whose X is None counts in none, nor in the score), and
a `grid` {across: {down: mean or None}} with `grid_axes`. Where the score is the mean over the means of groups of
`about[X]`, `mean_over` is X. Reports, intervals and comparisons are made of these.

A task without questions has, of the whole config and the model, `measure(config, model) -> summary`,
`preview(config, model) -> str` for --dry-run and `table(summary)`; see tasks/heldout.py.

The core asks, stores, judges and writes; it knows nothing of a single task.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from longalign.data.messages import Messages

# Tokens of a text, or of messages in the model's template up to where the answer begins.
CountTokens = Callable[[str | Messages], int]


@dataclass(frozen=True)
class Question:
    id: str  # unique within the task, and the same in every run
    messages: Messages
    reference: str | list[str] | None
    about: dict[str, Any]  # length, depth, kind, language, ...: what a summary breaks down by
    max_new_tokens: int
    # Messages for a judge, of the answer and of which of the repeats (from 0) it is; None: scored by program alone.
    judge: Callable[[str, int], Messages] | None = None
    ratings: range = range(1, 11)  # that the judge may give
    cut_middle: bool = False  # of the last message, where prompt and answer exceed the context; False: refused


@dataclass(frozen=True)
class Verdict:
    """What a judge said of an answer once; rating is None if it gave none that can be read."""

    rating: int | None
    reply: str


@dataclass(frozen=True)
class Answer:
    """text is None where there is none because asking failed; "" is an answer. finish: stop, length or the failure."""

    text: str | None
    finish: str
    prompt_tokens: int
    seconds: float


def task_module(name: str) -> Any:
    return importlib.import_module(f"longalign.evaluate.tasks.{name}")
