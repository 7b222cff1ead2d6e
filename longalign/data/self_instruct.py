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
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longalign.config import conf_dir, nearest
from longalign.data.documents import Unreadable, read_document
from longalign.data.pieces import Count, Piece, Survey, candidates, counted, digest_of, reasons, survey
from longalign.errors import UserError
from longalign.files import disk_errors, versions, write_json, write_text
from longalign.llm import Client, NoReply
from longalign.progress import Bar, console, warn
from longalign.schema import Config, SelfInstruct

QUESTIONS = 5
EXPECTED_OUTPUT = 200 + 300  # tokens of five questions and of an answer, guessed, for the preview of costs
REFUSAL = re.compile(
    r"(i'm|i am) (very |truly )?sorry|sorry,|i apologi[sz]e|(unfortunately, )?i (cannot|can't|am unable|am not able)|"
    r"(unfortunately, )?i'm (unable|not able)|as an ai\b|(很|非常)?抱歉|对不起|我(无法|不能)|作为(一个)?(ai|人工智能)",
    re.IGNORECASE,
)

Prompts = dict[str, str]  # "summary.en" -> its text


# -- prompts and replies --------------------------------------------------------------------------------------


def load_prompts(folder: str | None) -> Prompts:
    """The shipped prompts, replaced by those of the user's folder. Raises UserError for one that cannot work."""
    files = {file.stem: file for file in sorted((conf_dir() / "prompts" / "self_instruct").glob("*.txt"))}
    if folder is not None:
        own = sorted(Path(folder).glob("*.txt"))
        if not own:
            raise UserError(f"source.prompts={folder}: no .txt file there; its files are named {', '.join(files)}")
        for file in own:
            if file.stem not in files:
                raise UserError(f"source.prompts: {file} is not used{nearest(file.stem, files)} ({', '.join(files)})")
            files[file.stem] = file
    prompts = {}
    for name, file in files.items():
        try:
            prompts[name] = read_document(file)
        except Unreadable as error:
            raise UserError(f"source.prompts: {file}: {error}") from None
        for place in ["{document}", "{question}"] if name.startswith("answer.") else ["{document}"]:
            if prompts[name].count(place) != 1:
                raise UserError(f"source.prompts: {file} must hold {place} once")
    return prompts


def fill(prompt: str, **values: str) -> list[dict[str, str]]:
    """One user message. What documents hold in braces is left alone."""
    content = re.sub(r"\{(document|question)\}", lambda found: values.get(found[1], found[0]), prompt)
    return [{"role": "user", "content": content}]


def parse_questions(reply: str) -> list[str] | None:
    """The five questions of a reply that numbers them from 1 in any usual way; None if it does not."""
    number = re.compile(r"^\W*(?:question|问题)?\s*([1-9])\s*\**\s*[:：.、)）]\s*", re.IGNORECASE | re.MULTILINE)
    _, *found = number.split(reply)
    questions = [" ".join(text.split()).strip("*") for text in found[1::2]]
    numbered = found[::2] == [str(n) for n in range(1, QUESTIONS + 1)]
    return questions if numbered and all(questions) else None


def refuses(reply: str) -> bool:
    return REFUSAL.match(reply.lstrip().replace("’", "'")) is not None


async def _stage(name: str, client: Client, messages: list[dict[str, str]]) -> str:
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


# -- the run --------------------------------------------------------------------------------------------------


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


def prepare(config: Config, dry_run: bool) -> int:
    """Run the command; returns its exit code. Raises UserError."""
    source, output = config.source, Path(config.output_dir or "")
    assert isinstance(source, SelfInstruct)
    target = output / "self_instruct.jsonl"
    if target.exists() and not config.overwrite and not dry_run:
        raise UserError(f"{target} exists already; overwrite=true replaces it")
    if output.resolve().is_relative_to(Path(source.documents).resolve()):
        raise UserError(
            f"output_dir={output} lies in source.documents={source.documents}: what is written would be read"
        )
    prompts = load_prompts(source.prompts)
    count = _counter(config)
    found = survey(source, count)
    todo = candidates(found.pieces, source.length_weight, config.seed)
    for line in _describe(source, found, todo, prompts, count):
        console.print(line, soft_wrap=True)
    if dry_run:
        return 0
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
            return await generate(client, prompts, todo, source.samples, config.seed)

    try:
        samples, dropped = asyncio.run(run())
    except KeyboardInterrupt:
        console.print(f"replies so far are kept in {client.cache}; the same command goes on from there", soft_wrap=True)
        raise
    _write(config, found, prompts, client, samples, dropped)
    if not samples:
        raise UserError(f"no candidate gave a sample ({counted(dropped)}); see {output}/self_instruct_dropped.jsonl")
    usage = client.usage
    console.print(
        f"{target}: {len(samples):,} samples; "
        f"{usage.paid:,} replies paid for, {usage.replies - usage.paid:,} from the cache; "
        f"{usage.input_tokens:,} input and {usage.output_tokens:,} output tokens in all",
        soft_wrap=True,
    )
    if dropped:
        console.print(f"dropped, named in {output}/self_instruct_dropped.jsonl: {counted(dropped)}", soft_wrap=True)
    if len(samples) < source.samples:
        warn(f"source.samples={source.samples} wanted, but all {len(todo):,} candidates are used up; add documents")
    return 0


def _write(
    config: Config,
    found: Survey,
    prompts: Prompts,
    client: Client,
    samples: list[Sample],
    dropped: list[dict[str, Any]],
) -> None:
    """The data itself last: where it stands, the rest does."""
    assert isinstance(config.source, SelfInstruct)
    output, usage = Path(config.output_dir or ""), client.usage
    manifest = {
        "source": config.source.model_dump(),
        "seed": config.seed,
        "tokenizer": config.model.tokenizer,
        "prompts": {name: digest_of(text) for name, text in prompts.items()},
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
        lines: Iterator[str] = (json.dumps(row, ensure_ascii=False) + "\n" for row in [*found.left_out, *dropped])
        write_text(output / "self_instruct_dropped.jsonl", lines)
        if samples:
            write_json(output / "self_instruct.json", manifest)
            write_text(output / "self_instruct.jsonl", (sample.line() for sample in samples))


def _counter(config: Config) -> Count:
    from longalign.model.load import load_tokenizer

    tokenizer = load_tokenizer(config)
    return lambda texts: (
        [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids] if texts else []
    )


def _describe(
    source: SelfInstruct,
    found: Survey,
    todo: list[tuple[Piece, str]],
    prompts: Prompts,
    count: Count,
) -> Iterator[str]:
    """Documents, requests, tokens and price, before anything is asked."""
    for row in [row for row in found.left_out if row["reason"] == "unreadable"][:10]:
        yield f"unreadable: {row['document']}: {row['detail']}"
    left_out = f" (left out: {counted(found.left_out)})" if found.left_out else ""
    tokens = sorted(piece.tokens for piece in found.pieces)
    yield (
        f"documents: {found.found:,}{left_out} -> {len(tokens):,} pieces of {tokens[0]:,} to {tokens[-1]:,} tokens, "
        f"{len(todo):,} candidates (piece and task) for {source.samples:,} samples"
    )
    asked = todo[: source.samples]
    overhead = dict(zip(prompts, count(list(prompts.values())), strict=True))
    read = sum(
        2 * piece.tokens + overhead[f"{task}.{piece.language}"] + overhead[f"answer.{piece.language}"]
        for piece, task in asked
    )
    written = EXPECTED_OUTPUT * len(asked)
    yield (
        f"requests: {2 * len(asked):,} (fewer if replies are in the cache, more if some are dropped); "
        f"input tokens: about {read:,}; output tokens: about {written:,}, guessed"
    )
    price = source.price_per_million
    if price.input is None or price.output is None:
        yield "price: unknown; source.price_per_million.input and .output give it"
    else:
        yield f"price: about {(read * price.input + written * price.output) / 1e6:,.2f}"
