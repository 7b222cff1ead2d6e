"""source=self_instruct: long instruction data from the user's own documents (LongAlign, section 3.2 and appendix A).

    documents -> pieces of min_tokens to max_tokens -> candidates (piece, task), longer pieces sooner
      -> five questions, one of them drawn -> its answer -> {"messages": [document + question, answer], ...}

Which candidates are asked, and which question is drawn, come from the seed and the replies alone, never from the order
in which replies arrive: a run that was interrupted and continued writes the bytes of one that was not.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longalign.data.messages import Messages
from longalign.data.self_instruct.pieces import (
    Count,
    Piece,
    Survey,
    candidates,
    counted,
    digest_of,
    reasons,
    survey,
)
from longalign.data.self_instruct.prompts import Prompts, fill, load_prompts, parse_questions, refuses
from longalign.errors import UserError
from longalign.files import disk_errors, versions, whole_file, write_json
from longalign.llm import Client, NoReply
from longalign.model.load import load_tokenizer
from longalign.progress import Bar, console, warn
from longalign.schema import Config, SelfInstruct

EXPECTED_OUTPUT = 200 + 300  # tokens of five questions and of an answer, guessed, for the preview of costs


# -- before anything is asked ---------------------------------------------------------------------------------


@dataclass
class Plan:
    """What the documents give, whom to ask about it in which words, and how tokens are counted."""

    found: Survey
    todo: list[tuple[Piece, str]]  # candidates (piece, task) in the order in which they are asked
    prompts: Prompts
    count: Count


def make_plan(config: Config, source: SelfInstruct) -> Plan:
    """Raises UserError for documents, prompts or folders that cannot work."""
    for setting, folder in (("output_dir", config.output_dir), ("source.cache", source.cache)):
        if folder and Path(folder).resolve().is_relative_to(Path(source.documents).resolve()):
            raise UserError(
                f"{setting}={folder} lies in source.documents={source.documents}: what is written would be read"
            )
    prompts = load_prompts(source.prompts)
    tokenizer = load_tokenizer(config)

    def count(texts: list[str]) -> list[int]:
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
        return [len(ids) for ids in encoded]

    found = survey(source, count)
    return Plan(found, candidates(found.pieces, source.length_weight, config.seed), prompts, count)


def preview(source: SelfInstruct, plan: Plan) -> list[str]:
    """Documents, requests, tokens and price."""
    found, asked = plan.found, plan.todo[: source.samples]
    unreadable = [row for row in found.left_out if row["reason"] == "unreadable"]
    told = [f"unreadable: {row['document']}: {row['detail']}" for row in unreadable[:10]]
    left_out = f" (left out: {counted(found.left_out)})" if found.left_out else ""
    tokens = sorted(piece.tokens for piece in found.pieces)
    told.append(
        f"documents: {found.found:,}{left_out} -> {len(tokens):,} pieces of {tokens[0]:,} to {tokens[-1]:,} tokens, "
        f"{len(plan.todo):,} candidates (piece and task) for {source.samples:,} samples"
    )
    words = dict(zip(plan.prompts, plan.count(list(plan.prompts.values())), strict=True))
    read = sum(
        2 * piece.tokens + words[f"{task}.{piece.language}"] + words[f"answer.{piece.language}"]
        for piece, task in asked
    )
    written = EXPECTED_OUTPUT * len(asked)
    told.append(
        f"requests: {2 * len(asked):,} (fewer if replies are in the cache, more if some are dropped); "
        f"input tokens: about {read:,}; output tokens: about {written:,}, guessed"
    )
    price = source.price_per_million
    if price.input is None or price.output is None:
        return [*told, "price: unknown; source.price_per_million.input and .output give it"]
    return [*told, f"price: about {(read * price.input + written * price.output) / 1e6:,.2f}"]


def describe(config: Config, source: SelfInstruct) -> list[str]:
    """What a run would ask and cost; nothing is asked. Raises UserError."""
    return preview(source, make_plan(config, source))


# -- asking ---------------------------------------------------------------------------------------------------


async def _stage(name: str, client: Client, messages: Messages) -> str:
    """A reply that is no refusal. Raises NoReply."""
    try:
        reply = await client.ask(messages)
    except NoReply as error:
        raise NoReply(f"{name}: {error.reason}", error.detail) from error
    if refuses(reply):
        raise NoReply(f"{name}: refusal", reply[:200])
    return reply


async def make(client: Client, prompts: Prompts, piece: Piece, task: str, seed: int) -> tuple[str, str]:
    """A question on the piece and its answer: two requests. Raises NoReply."""
    text = await asyncio.to_thread(piece.text)
    reply = await _stage("questions", client, fill(prompts[f"{task}.{piece.language}"], document=text))
    questions = parse_questions(reply)
    if questions is None:
        raise NoReply("questions: unparsable", reply[:200])
    question = random.Random(f"{seed} {piece.document} {piece.number} {task}").choice(questions)
    answer = prompts[f"answer.{piece.language}"]
    return question, await _stage("answer", client, fill(answer, document=text, question=question))


@dataclass(frozen=True)
class Sample:
    piece: Piece
    task: str
    question: str
    answer: str

    def line(self) -> str:
        sample = {
            "messages": [
                {"role": "user", "content": f"{self.piece.text()}\n\n{self.question}"},
                {"role": "assistant", "content": self.answer},
            ],
            "task": self.task,
            "language": self.piece.language,
            "document": self.piece.document,
            "piece": self.piece.number,
            "document_tokens": self.piece.tokens,
        }
        return json.dumps(sample, ensure_ascii=False) + "\n"


async def generate(
    client: Client, prompts: Prompts, todo: list[tuple[Piece, str]], wanted: int, seed: int
) -> tuple[list[Sample], list[dict[str, Any]]]:
    """The samples wanted, and what was dropped on the way.

    Candidates are asked in rounds of as many as are still missing: no more is paid for than needed, and which ones
    are asked does not depend on which reply came first.
    """
    samples: list[Sample] = []
    dropped: list[dict[str, Any]] = []
    with Bar("self-instruct", total=min(wanted, len(todo)), unit="samples") as bar:

        async def one(candidate: tuple[Piece, str]) -> Sample | dict[str, Any]:
            piece, task = candidate
            try:
                sample = Sample(piece, task, *await make(client, prompts, piece, task, seed))
            except NoReply as error:
                where = {"document": piece.document, "piece": piece.number, "task": task}
                return {**where, "reason": error.reason, "detail": error.detail}
            bar.advance(1, note=f"{client.usage.input_tokens + client.usage.output_tokens:,} tokens")
            return sample

        while todo and len(samples) < wanted:
            missing = wanted - len(samples)
            for result in await client.map(one, todo[:missing]):
                (samples if isinstance(result, Sample) else dropped).append(result)  # type: ignore[arg-type]
            todo = todo[missing:]
    return samples, dropped


# -- the run --------------------------------------------------------------------------------------------------


def prepare(config: Config, source: SelfInstruct) -> list[str]:
    """Ask, write, and return what to tell. Raises UserError."""
    output = Path(config.output_dir or "")
    target = output / "self_instruct.jsonl"
    if target.exists() and not config.overwrite:
        raise UserError(f"{target} exists already; overwrite=true replaces it")
    plan = make_plan(config, source)
    for line in preview(source, plan):
        console.print(line, soft_wrap=True)
    client = Client(
        section="source",
        base_url=source.base_url,
        model=source.model,
        api_key_env=source.api_key_env,
        temperature=source.temperature,
        max_tokens=source.max_output_tokens,
        extra_body=source.extra_body,
        timeout_s=source.timeout_s,
        retries=source.retries,
        concurrency=source.concurrency,
        cache=Path(source.cache) if source.cache else output / ".cache",
    )

    async def run() -> tuple[list[Sample], list[dict[str, Any]]]:
        async with client:
            return await generate(client, plan.prompts, plan.todo, source.samples, config.seed)

    try:
        samples, dropped = asyncio.run(run())
    except KeyboardInterrupt:
        console.print(f"replies so far are kept in {client.cache}; the same command goes on from there", soft_wrap=True)
        raise
    _write(config, source, plan, client, samples, dropped)
    if not samples:
        raise UserError(f"no candidate gave a sample ({counted(dropped)}); see {output}/self_instruct_dropped.jsonl")
    if len(samples) < source.samples:
        warn(f"source.samples={source.samples} wanted, but all {len(plan.todo):,} candidates are used; add documents")
    usage = client.usage
    told = [
        f"{target}: {len(samples):,} samples; "
        f"{usage.paid:,} replies paid for, {usage.replies - usage.paid:,} from the cache; "
        f"{usage.input_tokens:,} input and {usage.output_tokens:,} output tokens in all"
    ]
    return [*told, f"dropped, named in {output}/self_instruct_dropped.jsonl: {counted(dropped)}"] if dropped else told


def _write(
    config: Config,
    source: SelfInstruct,
    plan: Plan,
    client: Client,
    samples: list[Sample],
    dropped: list[dict[str, Any]],
) -> None:
    """The data itself last: where it stands, the rest does."""
    output, usage, found = Path(config.output_dir or ""), client.usage, plan.found
    manifest = {
        "source": source.model_dump(),
        "seed": config.seed,
        "tokenizer": config.model.tokenizer,
        "prompts": {name: digest_of(text) for name, text in plan.prompts.items()},
        "documents": {"found": found.found, "pieces": len(found.pieces), "left_out": reasons(found.left_out)},
        "samples": len(samples),
        "tasks": dict(sorted(Counter(sample.task for sample in samples).items())),
        "languages": dict(sorted(Counter(sample.piece.language for sample in samples).items())),
        "dropped": reasons(dropped),
        "replies": usage.replies,
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "versions": versions("openai"),
    }
    with disk_errors(output, "output_dir"):
        output.mkdir(parents=True, exist_ok=True)  # it may hold other raw data, which stays
        with whole_file(output / "self_instruct_dropped.jsonl") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in [*found.left_out, *dropped])
        if samples:
            write_json(output / "self_instruct.json", manifest)
            with whole_file(output / "self_instruct.jsonl") as file:
                file.writelines(sample.line() for sample in samples)
