"""Short conversations with the model's own answers: `prepare source=own_answers`.

    prompts of short tasks (short_prompts.py) -> the model answers -> short.jsonl

Trained on beside long data, they keep what the model can do with a short prompt; those of a seed of the other parity
share no subject with them and measure it. Answers are kept as they come (OUTPUT/.answers): a killed run goes on.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

from longalign.data.short_prompts import prompts
from longalign.errors import UserError
from longalign.evaluate.answers import fitted, hash_of
from longalign.evaluate.models import Endpoint, Local
from longalign.evaluate.question import Answer, Question
from longalign.evaluate.run import ask
from longalign.files import disk_errors, versions, whole_file, write_json
from longalign.schema import Config, OwnAnswers


def outputs(config: Config) -> Path:
    """Raises UserError if it is there already."""
    path = Path(config.output_dir or "") / "short.jsonl"
    if path.exists() and not config.overwrite:
        raise UserError(f"{path} exists already; overwrite=true replaces it")
    return path


def model_of(config: Config) -> Local | Endpoint:
    output = Path(config.output_dir or "")
    return Endpoint(config, output) if config.model.endpoint else Local(config, count_answers=True)


def questions_of(config: Config, source: OwnAnswers, model: Local | Endpoint) -> list[Question]:
    """Raises UserError if there are too few prompts, or one is too long for the model's context."""
    drawn = list(islice(prompts(list(source.kinds), config.seed), source.samples))
    if len(drawn) < source.samples:
        raise UserError(
            f"source.samples={source.samples}, but source.kinds={list(source.kinds)} give {len(drawn):,} different "
            "prompts; ask for fewer, or for more kinds"
        )
    return [
        fitted(
            Question(
                id=f"own-{config.seed}-{number:05d}",
                messages=[{"role": "user", "content": prompt}],
                reference=None,
                about={"kind": kind},
                max_new_tokens=source.max_new_tokens,
            ),
            model.context,
            model.count_tokens,
        )
        for number, (kind, prompt) in enumerate(drawn)
    ]


def describe(config: Config, source: OwnAnswers) -> list[str]:
    """What would be asked of which model; nothing is. Raises UserError."""
    path, model = outputs(config), model_of(config)
    questions = questions_of(config, source, model)
    tokens = sum(model.count_tokens(question.messages) for question in questions)
    shown = {question.about["kind"]: question.messages[0]["content"] for question in reversed(questions)}
    return [
        *(f"{kind}: {prompt}" for kind, prompt in shown.items()),
        f"ask {config.model.path} {len(questions):,} prompts, seed {config.seed}: {tokens:,} tokens, "
        f"answers of {source.max_new_tokens} at most",
        f"write {path}",
    ]


def prepare(config: Config, source: OwnAnswers) -> list[str]:
    """Write short.jsonl, short_dropped.jsonl and short.json; returns what to tell. Raises UserError."""
    path, model = outputs(config), model_of(config)
    questions = questions_of(config, source, model)
    settings = model.settings()
    hashes = [hash_of(question, settings) for question in questions]
    with disk_errors(path, "output_dir"):
        answers = ask(model, "own_answers", questions, hashes, path.parent)
        reasons = [reason_against(answer) for answer in answers]
        pairs = list(zip(questions, answers, reasons, strict=True))
        dropped = Counter(reason for reason in reasons if reason)
        kept = [question for question, _, reason in pairs if reason is None]
        with whole_file(path.with_name("short_dropped.jsonl")) as file:
            file.writelines(line(q, a, {"reason": reason}) for q, a, reason in pairs if reason)
        told = "; ".join(f"{count:,} {reason}" for reason, count in dropped.most_common())
        if not kept:
            raise UserError(
                f"no answer of {config.model.path} can be used ({told}); source.max_new_tokens={source.max_new_tokens} "
                f"may be too few. See {path.with_name('short_dropped.jsonl')}"
            )
        about = {
            "source": source.model_dump(),
            "seed": config.seed,
            "model": settings,
            "prompts": len(questions),
            "samples": len(kept),
            "kinds": dict(Counter(question.about["kind"] for question in kept)),
            "dropped": dict(dropped),
            "versions": versions("transformers", "torch"),
        }
        write_json(path.with_suffix(".json"), about)
        with whole_file(path) as file:
            file.writelines(line(q, a, {}) for q, a, reason in pairs if reason is None)
    words = f"{path}: {len(kept):,} conversations of {len(questions):,} prompts"
    return [words, f"left out, in {path.stem}_dropped.jsonl: {told}"] if dropped else [words]


def reason_against(answer: Answer) -> str | None:
    """Why an answer is not trained on; None for a good one. One that is cut would teach to stop in mid-sentence."""
    if answer.text is None:
        return answer.finish
    if answer.finish == "length":
        return "cut at max_new_tokens"
    return None if answer.text.strip() else "empty"


def line(question: Question, answer: Answer, more: dict[str, str]) -> str:
    messages = [*question.messages, {"role": "assistant", "content": (answer.text or "").strip()}]
    return json.dumps({"messages": messages, "id": question.id, **question.about, **more}, ensure_ascii=False) + "\n"
