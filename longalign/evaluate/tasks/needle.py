"""Needle in a haystack: facts at known depths of a document of a known length, and a question for them.

With one needle the score is strict exact match: the answer, without case and punctuation, is the value or the whole
sentence that states it, and nothing else. `contains` counts answers that have the value in them somewhere. With several
needles the score is the share of their values that the answer has in it.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

from longalign.data.messages import Messages
from longalign.data.synthetic import facts
from longalign.errors import UserError
from longalign.evaluate.haystack import document_of, sentences, tokens_within
from longalign.evaluate.prompts import fill, load_prompt
from longalign.evaluate.question import CountTokens, Question, Verdict
from longalign.evaluate.statistics import Row, breakdown, grid, mean, scores, standard_error
from longalign.schema import Needle

PREFIX = "task.needle"


def questions(settings: Needle, seed: int, count_tokens: CountTokens) -> list[Question]:
    """The grid of lengths x depths x documents, and each question once more without a document if wanted.

    Haystacks take turns from document to document. Raises UserError if the needles do not fit a length.
    """
    rng = random.Random(f"needle {seed}")
    judge = load_prompt(f"{PREFIX}.judge", "needle/judge.txt", None, ("question", "reference", "answer"))
    count = tokens_within(count_tokens)
    asked: list[Question] = []
    for length, depth, number in product(settings.lengths, settings.depths, range(settings.documents)):
        found = facts("test", settings.needles + settings.distractors, rng)
        wanted, others = found[: settings.needles], found[settings.needles :]
        question, reference = "\n".join(fact.question for fact in wanted), [fact.answer for fact in wanted]
        # the first needle at the depth, further ones and the distractors spread evenly
        hidden = [((depth + n / len(wanted)) % 1 if n else depth, fact.statement) for n, fact in enumerate(wanted)]
        hidden += [(n / len(others), fact.statement) for n, fact in enumerate(others)]
        haystack = settings.haystack[number % len(settings.haystack)] if settings.haystack else None
        source = functools.partial(sentences, f"{PREFIX}.haystack", haystack, f"{rng.random()}")
        told = functools.partial(ask, question)
        prompt_tokens = functools.partial(_count, count_tokens, told)
        document = document_of(length, hidden, source, count, prompt_tokens)
        if document is None:
            needs = f"{settings.needles} needles and {settings.distractors} distractors"
            raise UserError(f"{PREFIX}.lengths={length} has no room for {needs}; raise it")
        about: dict[str, Any] = {"values": [fact.value for fact in wanted]}
        if haystack:
            about["haystack"] = haystack
        with_document = Question(
            id=f"{length}/{depth:g}/{number}",
            messages=told(document),
            reference=reference,
            about={"length": length, "depth": depth, **about},
            max_new_tokens=settings.max_new_tokens,
            judge=functools.partial(rated, judge, question, reference) if settings.judge else None,
        )
        asked.append(with_document)
        if settings.without_document:
            about = {"length": None, "depth": None, **about}
            asked.append(replace(with_document, id=f"{with_document.id}/alone", messages=told(""), about=about))
    return asked


def _count(count_tokens: CountTokens, told: Callable[[str], Messages], document: str) -> int:
    return count_tokens(told(document))


def ask(question: str, document: str) -> Messages:
    return [{"role": "user", "content": f"{document}\n\n{question}" if document else question}]


def rated(prompt: str, question: str, reference: list[str], answer: str, repeat: int) -> Messages:
    """What a judge is told of an answer; the same in every repeat."""
    content = fill(prompt, question=question, reference="\n".join(reference), answer=answer)
    return [{"role": "user", "content": content}]


def score(question: Question, answer: str, verdicts: list[Verdict] | None) -> dict[str, float | None]:
    """0 to 1; by the judge, if there is one: the mean rating, 1 as 0 and 10 as 1."""
    facts_ = list(zip(question.about["values"], question.reference or [], strict=True))
    contained = mean([float(contains(answer, value)) for value, _ in facts_])
    exact = float(exact_match(answer, *facts_[0])) if len(facts_) == 1 else contained
    if not question.judge:
        return {"score": exact, "contains": contained}
    ratings = [(v.rating - 1) / 9 for v in verdicts or [] if v.rating is not None]
    return {"score": mean(ratings), "exact_match": exact, "contains": contained}


def summarise(rows: list[Row]) -> dict[str, Any]:
    """score, contains, score_without_document, breakdowns, and the mean score[length][depth] as `grid`."""
    within = [row for row in rows if row["about"]["length"] is not None]
    by = lambda key: breakdown(within, lambda row: row["about"][key])
    return {
        "score": mean(scores(within)),
        "standard_error": standard_error(scores(within)),
        "best": 1,
        "contains": mean(scores(within, "contains")),
        "score_without_document": mean(scores([row for row in rows if row["about"]["length"] is None])),
        "by_length": by("length"),
        "by_depth": by("depth"),
        **({"by_haystack": by("haystack")} if within and "haystack" in within[0]["about"] else {}),
        "grid_axes": ["prompt tokens", "depth"],
        "grid": grid(within, "length", "depth"),
    }


def normalise(text: str) -> str:
    """Lower case, words only: 'The code is Amber Falcon.' -> 'the code is amber falcon'."""
    return " ".join(re.findall(r"\w+", text.lower()))


def exact_match(answer: str, value: str, sentence: str) -> bool:
    return normalise(answer) in (normalise(value), normalise(sentence))


def contains(answer: str, value: str) -> bool:
    return f" {normalise(value)} " in f" {normalise(answer)} "
