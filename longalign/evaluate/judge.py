"""A judge: a model behind an OpenAI-compatible API that rates answers as [[n]].

Every verdict is kept under the hash of its request (longalign/llm.py), so none is paid for twice. One that holds no
rating, or several, is asked for again with a reminder; after that it is missing, which is never a low rating.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longalign.data.messages import Messages
from longalign.evaluate.question import CountTokens, Question, Verdict
from longalign.llm import Client, NoReply
from longalign.progress import Bar
from longalign.schema import Judge

REMINDER = "End with one overall rating, a whole number from {low} to {high}, in exactly this form: [[{low}]]"


def parse_rating(reply: str, allowed: range) -> int | None:
    """The one rating in double brackets; None if there is none, if several differ or if it is not allowed.

    "[[rating]]", quoted from the prompt, is none.
    """
    found = {text.strip() for text in re.findall(r"\[\[([^\[\]]*\d[^\[\]]*)\]\]", reply)}
    if len(found) != 1:
        return None
    (text,) = found
    rating = int(text) if re.fullmatch(r"[0-9]{1,4}", text) else None
    return rating if rating in allowed else None


def client(judge: Judge, output: Path) -> Client:
    shared = {"base_url", "model", "api_key_env", "temperature", "extra_body", "timeout_s", "retries", "concurrency"}
    return Client(
        section="judge",
        cache=Path(judge.cache) if judge.cache else output / ".judge",
        max_tokens=judge.max_output_tokens,
        **judge.model_dump(include=shared),
    )


async def verdicts(
    judge: Judge, output: Path, asked: Sequence[tuple[Question, str]], title: str
) -> list[list[Verdict]]:
    """judge.repeats verdicts on every (question, answer). Raises UserError if the judge cannot be asked at all."""
    jobs = [(question, answer, repeat) for question, answer in asked for repeat in range(judge.repeats)]
    with Bar(title, len(jobs), "verdicts") as bar:
        async with client(judge, output) as api:

            async def work(job: tuple[Question, str, int]) -> Verdict:
                verdict = await _verdict(api, *job, judge.attempts)
                bar.advance(1)
                return verdict

            found = await api.map(work, jobs)
    return [found[n : n + judge.repeats] for n in range(0, len(found), judge.repeats)]


async def _verdict(api: Client, question: Question, answer: str, repeat: int, attempts: int) -> Verdict:
    assert question.judge is not None
    if not answer.strip():
        return Verdict(question.ratings[0], "an empty answer: the judge was not asked")
    *before, last = question.judge(answer, repeat)
    reminder = REMINDER.format(low=question.ratings[0], high=question.ratings[-1])
    reply = ""
    for attempt in range(attempts):  # `again` tells repeats and attempts apart, whatever their number
        content = f"{last['content']}\n\n{reminder}" if attempt else last["content"]
        try:
            reply = await api.ask([*before, {**last, "content": content}], again=100 * repeat + attempt)
        except NoReply as error:
            reply = f"({error.reason}: {error.detail})" if error.detail else f"({error.reason})"
            if error.reason.startswith("request failed"):  # its retries are used up
                break
            continue
        if (rating := parse_rating(reply, question.ratings)) is not None:
            return Verdict(rating, reply)
    return Verdict(None, reply)


def record(judge: Judge, questions: Sequence[Question]) -> dict[str, Any]:
    """What the ratings depend on: the judge's settings, never its key, and a hash of all it is told but the answers."""
    told = json.dumps([q.judge("", n) for q in questions if q.judge for n in range(judge.repeats)], sort_keys=True)
    return {
        **judge.model_dump(exclude={"cache", "price_per_million", "timeout_s", "retries", "concurrency"}),
        "prompts_hash": hashlib.sha256(told.encode()).hexdigest()[:16],
    }


def preview(judge: Judge, questions: Sequence[Question], count_tokens: CountTokens) -> str:
    """Requests, tokens and price at most: answers and verdicts as long as they may be, every first verdict readable."""
    judged = [q for q in questions if q.judge]
    requests = len(judged) * judge.repeats
    told: list[Messages] = [q.judge("", 0) for q in judged if q.judge]
    inputs = judge.repeats * (sum(map(count_tokens, told)) + sum(q.max_new_tokens for q in judged))
    line = f"judge {judge.model}: {requests:,} requests, at most {inputs:,} input tokens"
    price, most = judge.price_per_million, judge.max_output_tokens
    if most is not None:
        line += f" and {requests * most:,} output tokens"
    if price.input is None or price.output is None or most is None:
        return f"{line}; judge.price_per_million and max_output_tokens tell the price"
    return f"{line}: at most {(inputs * price.input + requests * most * price.output) / 1e6:,.2f}"
