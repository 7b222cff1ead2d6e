"""Needle in a haystack: a fact at a known depth of a document of a known length, and a question for it.

The score is strict exact match: the answer, without case and punctuation, is the value or the whole sentence that
states it, and nothing else. `contains` counts answers that have the value in them somewhere.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longalign.data.documents import Unreadable, find_documents, read_document
from longalign.data.synthetic import Fact, facts, filler
from longalign.errors import UserError
from longalign.evaluate.generate import Generator
from longalign.progress import Bar, warn
from longalign.schema import Needle


@dataclass(frozen=True)
class Question:
    length: int | None  # tokens of the prompt; None if asked without a document
    depth: float | None
    prompt: list[int]
    fact: Fact


def normalise(text: str) -> str:
    """Lower case, words only: 'The code is Amber Falcon.' -> 'the code is amber falcon'."""
    return " ".join(re.findall(r"\w+", text.lower()))


def exact_match(answer: str, fact: Fact) -> bool:
    return normalise(answer) in (normalise(fact.value), normalise(fact.answer))


def contains(answer: str, fact: Fact) -> bool:
    return f" {normalise(fact.value)} " in f" {normalise(answer)} "


def sentences(haystack: str | None, rng: random.Random) -> Iterator[str]:
    """Endless sentences of the texts in `haystack`, from a random place on, or generated ones."""
    if haystack is None:
        yield from filler(rng)
        return
    found = _sentences_of(haystack)
    start = rng.randrange(len(found))
    while True:
        yield from found[start:]
        start = 0


@functools.cache
def _sentences_of(haystack: str) -> list[str]:
    """The sentences of every document in a folder, or of one. Raises UserError if there are none."""
    found = []
    for file in find_documents(Path(haystack)):
        try:
            found += [s for s in re.split(r"(?<=[.!?])\s+", read_document(file)) if s.strip()]
        except Unreadable as error:
            warn(f"task.needle.haystack: {file} is left out: {error}")
    if not found:
        raise UserError(f"task.needle.haystack={haystack}: no text there; null generates sentences")
    return found


def build_document(
    needle: str, distractors: list[str], depth: float, room: int, source: Iterator[str], count: Callable[[str], int]
) -> str:
    """Sentences of `room` tokens at most, the needle at `depth` (0 = first, 1 = last), distractors spread evenly."""
    left = room - count(needle) - sum(map(count, distractors))
    text: list[str] = []
    for sentence in source:
        left -= count(" " + sentence)
        if left < 0:
            break
        text.append(sentence)
    for number, distractor in enumerate(distractors):
        text.insert((number * len(text)) // max(len(distractors), 1), distractor)
    text.insert(round(depth * len(text)), needle)
    return " ".join(text)


def questions(task: Needle, generator: Generator, seed: int) -> list[Question]:
    """The grid of lengths x depths x documents, and each question once more without a document if wanted."""
    rng = random.Random(f"needle {seed}")
    # Tokens of a sentence within a text; templates and joints cost a little more, which the last check settles.
    count = lambda text: len(generator.tokenizer(text, add_special_tokens=False)["input_ids"])
    asked: list[Question] = []
    for length in task.lengths:
        for depth in task.depths:
            for _ in range(task.documents):
                fact, *others = facts("test", 1 + task.distractors, rng)
                ask = lambda document, fact=fact: generator.prompt_ids(
                    [{"role": "user", "content": f"{document}\n\n{fact.question}" if document else fact.question}]
                )
                room = length - len(ask(""))
                distractors = [other.statement for other in others]
                if room < count(fact.statement) + sum(map(count, distractors)):
                    raise UserError(f"task.needle.lengths={length} has no room for the needle; raise it")
                source = sentences(task.haystack, rng)
                prompt = ask(build_document(fact.statement, distractors, depth, room, source, count))
                while len(prompt) > length:
                    room -= len(prompt) - length
                    prompt = ask(build_document(fact.statement, distractors, depth, room, source, count))
                asked.append(Question(length, depth, prompt, fact))
                if task.without_document:
                    asked.append(Question(None, None, ask(""), fact))
    return asked


def run(task: Needle, generator: Generator, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask everything. Returns the summary and one row per question."""
    asked = questions(task, generator, seed)
    generator.check_fits(max((q.prompt for q in asked), key=len), task.max_new_tokens)
    rows: list[dict[str, Any]] = [{} for _ in asked]
    with Bar("needle", len(asked), "questions") as bar:
        for place, answer in generator.answers([q.prompt for q in asked], task.max_new_tokens, task.batch_tokens):
            q = asked[place]
            rows[place] = {
                "length": q.length,
                "depth": q.depth,
                "prompt_tokens": len(q.prompt),
                "question": q.fact.question,
                "expected": q.fact.answer,
                "answer": answer,
                "exact_match": exact_match(answer, q.fact),
                "contains": contains(answer, q.fact),
            }
            bar.advance(1)
    return summarise(rows), rows


def _mean(rows: list[dict[str, Any]], key: str = "exact_match") -> float | None:
    return round(sum(row[key] for row in rows) / len(rows), 4) if rows else None


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """score, contains, score_without_document, and score[length][depth] as `grid`."""
    with_document = [row for row in rows if row["length"] is not None]
    lengths = sorted({row["length"] for row in with_document})
    depths = sorted({row["depth"] for row in with_document})
    cell = lambda length, depth: [r for r in with_document if (r["length"], r["depth"]) == (length, depth)]
    return {
        "score": _mean(with_document),
        "contains": _mean(with_document, "contains"),
        "score_without_document": _mean([row for row in rows if row["length"] is None]),
        "questions": len(rows),
        "by_length": {str(n): _mean([r for r in with_document if r["length"] == n]) for n in lengths},
        "grid": {str(n): {str(d): _mean(cell(n, d)) for d in depths} for n in lengths},
    }
