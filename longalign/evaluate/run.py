"""The eval command: questions of every chosen task -> answers -> verdicts -> scores -> results.json, tables, pictures.

OUTPUT/.answers/TASK.jsonl   every answer as it comes (answers.py): a run that was killed goes on
OUTPUT/.judge/               every verdict, likewise
OUTPUT/TASK.jsonl            a row per question: {id, hash, about, prompt_tokens, question, reference, answer,
                             finish, seconds, verdicts, scores}
OUTPUT/results.json          what was asked of which model, and how well it did
OUTPUT/report.html, TASK.png the same to look at

A task that measures the model itself (heldout) asks nothing and has results alone.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from longalign.errors import UserError
from longalign.evaluate import judge as judging
from longalign.evaluate.answers import Answers, fitted, hash_of
from longalign.evaluate.models import Endpoint, Local
from longalign.evaluate.question import Answer, Question, Verdict, task_module
from longalign.evaluate.report import write_report
from longalign.evaluate.table import summary_table
from longalign.files import disk_errors, versions, write_json, write_text
from longalign.progress import Bar, console, warn
from longalign.schema import Config, Tasks

SHOWN = 2000  # characters of a question that its row shows


def run(config: Config, dry_run: bool) -> int:
    """Returns 0. Raises UserError for a model, a judge, a file or a folder that cannot be used."""
    output = Path(config.output_dir or "")
    names = [name for name in Tasks.model_fields if getattr(config.task, name) is not None]
    if not names:
        raise UserError(f"task=[] asks nothing; one or several of: {', '.join(Tasks.model_fields)}")
    model: Local | Endpoint = Endpoint(config, output) if config.model.endpoint else Local(config)
    with disk_errors(output, "output_dir"):
        if not dry_run:
            output.mkdir(parents=True, exist_ok=True)
        results: dict[str, Any] = {
            "model": config.model.path,
            "endpoint": config.model.endpoint,
            "template": model.name,
            "seed": config.seed,
            "temperature": config.temperature,
            "generation": config.generation.model_dump(),
            "versions": versions("transformers", "torch"),
            "tasks": {},
        }
        for name in names:
            task, settings = task_module(name), getattr(config.task, name).model_dump()
            if hasattr(task, "measure"):
                if dry_run:
                    console.print(f"{name}: {task.preview(config, model)}", soft_wrap=True)
                    continue
                summary = task.measure(config, model)
                results["tasks"][name] = {"settings": settings, **summary}
                console.print(task.table(summary))
                continue
            questions = prepare(config, model, name)
            if dry_run:
                preview(config, model, name, questions)
                continue
            summary, rows = evaluate(config, model, name, questions, output)
            results["tasks"][name] = {"settings": settings, **summary}
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(output / f"{name}.jsonl", text)
            console.print(summary_table(name, summary))
        if not dry_run:
            write_json(output / "results.json", results)
            console.print(f"report: {write_report(output)}")
    console.print(f"-> {output}" if dry_run else f"written to {output}")
    return 0


def prepare(config: Config, model: Local | Endpoint, name: str) -> list[Question]:
    """The task's questions, within the model's context."""
    questions: list[Question] = task_module(name).questions(getattr(config.task, name), config.seed, model.count_tokens)
    return [fitted(question, model.context, model.count_tokens) for question in questions]


def preview(config: Config, model: Local | Endpoint, name: str, questions: list[Question]) -> None:
    tokens = [model.count_tokens(question.messages) for question in questions]
    answers = sum(question.max_new_tokens for question in questions)
    longest = f"the longest {max(tokens):,}" if tokens else "none"
    told = f"{len(questions):,} questions, {sum(tokens):,} prompt tokens ({longest})"
    console.print(f"{name}: {told}, answers of {answers:,} tokens at most", soft_wrap=True)
    cut = sum("cut_tokens" in question.about for question in questions)
    if cut:
        console.print(f"{name}: {cut:,} prompts are cut in the middle to fit {model.context:,} tokens", soft_wrap=True)
    if config.judge and any(question.judge for question in questions):
        console.print(f"{name}: {judging.preview(config.judge, questions, model.count_tokens)}", soft_wrap=True)


def evaluate(
    config: Config, model: Local | Endpoint, name: str, questions: list[Question], output: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask, have judged, score. Returns the summary and one row per question."""
    task = task_module(name)
    settings = model.settings()
    hashes = [hash_of(question, settings) for question in questions]
    answers = ask(model, name, questions, hashes, output)
    judged = verdicts(config, name, questions, answers, output)
    rows: list[dict[str, Any]] = []
    for question, key, answer, said in zip(questions, hashes, answers, judged, strict=True):
        scores = {"score": None} if answer.text is None else task.score(question, answer.text, said)
        rows.append(
            {
                "id": question.id,
                "hash": key,
                "about": question.about,
                "prompt_tokens": answer.prompt_tokens,
                "question": shortened(question.messages[-1]["content"]),
                "reference": question.reference,
                "answer": answer.text,
                "finish": answer.finish,
                "seconds": answer.seconds,
                **({"verdicts": [vars(verdict) for verdict in said]} if said else {}),
                "scores": scores,
            }
        )
    counts = {
        "questions": len(rows),
        "missing": sum(row["scores"]["score"] is None for row in rows),
        "failed": sum(answer.text is None for answer in answers),
        "empty": sum(answer.text is not None and not answer.text.strip() for answer in answers),
        "cut_at_limit": sum(answer.finish == "length" for answer in answers),
        "prompts_cut": sum("cut_tokens" in question.about for question in questions),
    }
    tell(name, counts, rows)
    judge = {"judge": judging.record(config.judge, questions)} if config.judge and any(judged) else {}
    return {**task.summarise(rows), **counts, **judge}, rows


def ask(model: Local | Endpoint, name: str, questions: list[Question], hashes: list[str], output: Path) -> list[Answer]:
    """An answer to every question, from disk where it was given before."""
    with Answers(output / ".answers" / f"{name}.jsonl") as stored:
        done = {place for place, key in enumerate(hashes) if key in stored.kept}
        if done:
            console.print(f"{name}: {len(done):,} of {len(questions):,} answers are there already")
        failed: dict[int, Answer] = {}
        with Bar(name, len(questions), "answers", done=len(done)) as bar:

            def keep(found: list[tuple[int, Answer]]) -> None:
                failed.update((place, answer) for place, answer in found if answer.text is None)
                stored.add((hashes[place], answer) for place, answer in found if answer.text is not None)
                bar.advance(len(found))

            if len(done) < len(questions):
                model.answer(questions, done, keep)
        return [failed.get(place) or stored.kept[key] for place, key in enumerate(hashes)]


def verdicts(
    config: Config, name: str, questions: list[Question], answers: list[Answer], output: Path
) -> list[list[Verdict] | None]:
    """The judge's verdicts on every answer; None where there is no judge, nothing to judge, or no answer."""
    places = [n for n, q in enumerate(questions) if q.judge and answers[n].text is not None]
    if config.judge is None or not places:
        return [None] * len(questions)
    asked = [(questions[place], answers[place].text or "") for place in places]
    found = asyncio.run(judging.verdicts(config.judge, output, asked, f"{name}: {config.judge.model}"))
    by_place = dict(zip(places, found, strict=True))
    return [by_place.get(place) for place in range(len(questions))]


def tell(name: str, counts: dict[str, int], rows: list[dict[str, Any]]) -> None:
    """Say what went wrong, with the first case of each kind."""
    for row in [row for row in rows if row["answer"] is None][:1]:
        told = f"{counts['failed']:,} questions got no answer, e.g. {row['id']}: {row['finish']}"
        warn(f"{name}: {told}; run again to ask them anew")
    unread = [row for row in rows if any(verdict["rating"] is None for verdict in row.get("verdicts", []))]
    for row in unread[:1]:
        reply = next(verdict["reply"] for verdict in row["verdicts"] if verdict["rating"] is None)
        warn(f"{name}: {len(unread):,} answers lack a verdict, e.g. {row['id']}: {shortened(reply, 200)}")
    if counts["empty"]:
        warn(f"{name}: {counts['empty']:,} answers are empty")


def shortened(text: str, most: int = SHOWN) -> str:
    """Its two ends, if it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]} [...] {text[-most // 2 :]}"
