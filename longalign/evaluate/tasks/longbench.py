"""LongBench's single- and multi-document questions and its summaries (LongAlign, appendix C.2).

Without a judge F1 or ROUGE-L, the benchmark's own, x 100; with one its ratings of 1-3 (answers) and 1-5 (summaries), as
a share of the highest, x 100. Rows of the benchmark's DATASET.jsonl: input, context, answers (a list), and _id.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from longalign.config import nearest
from longalign.data.messages import Messages
from longalign.errors import UserError
from longalign.evaluate.metrics import f1, rouge_l
from longalign.evaluate.prompts import fill, load_prompt
from longalign.evaluate.question import CountTokens, Question, Verdict
from longalign.evaluate.statistics import Row, breakdown, by_repeat, error_of, mean, mean_of, standard_error, strata
from longalign.schema import LongBench

PREFIX = "task.longbench"


class Dataset(NamedTuple):
    group: str  # a column of the paper's tables
    language: str
    prompt: str  # file of conf/prompts/longbench

    @property
    def kind(self) -> str:
        return "summary" if self.group == "summarization" else "qa"


DATASETS = {
    "narrativeqa": Dataset("single_doc_qa", "en", "qa.en.txt"),
    "qasper": Dataset("single_doc_qa", "en", "qa.en.txt"),
    "multifieldqa_en": Dataset("single_doc_qa", "en", "qa.en.txt"),
    "multifieldqa_zh": Dataset("single_doc_qa", "zh", "qa.zh.txt"),
    "hotpotqa": Dataset("multi_doc_qa", "en", "qa.en.txt"),
    "2wikimqa": Dataset("multi_doc_qa", "en", "qa.en.txt"),
    "musique": Dataset("multi_doc_qa", "en", "qa.en.txt"),
    "dureader": Dataset("multi_doc_qa", "zh", "qa.zh.txt"),
    "gov_report": Dataset("summarization", "en", "summary.en.txt"),
    "qmsum": Dataset("summarization", "en", "query.en.txt"),
    "multi_news": Dataset("summarization", "en", "summary.en.txt"),
    "vcsum": Dataset("summarization", "zh", "summary.zh.txt"),
}
RATINGS = {"qa": range(1, 4), "summary": range(1, 6)}
ROUGE = ("dureader", "gov_report", "qmsum", "multi_news", "vcsum")  # all others: F1


def questions(settings: LongBench, seed: int, count_tokens: CountTokens) -> list[Question]:
    """Raises UserError naming file, line and field for what is missing or of the wrong type."""
    asked = []
    for name in settings.datasets:
        if name not in DATASETS:
            raise UserError(
                f"{PREFIX}.datasets={name}: no such dataset{nearest(name, DATASETS)} ({', '.join(DATASETS)})"
            )
        dataset = DATASETS[name]
        prompt = load_question_prompt(settings.prompts, name)
        judge = load_judge_prompt(settings.prompts, dataset.kind)
        for number, row in read_rows(Path(settings.path) / f"{name}.jsonl", settings.limit):
            content = fill(prompt, context=row["context"], input=row["input"])
            about = {"dataset": name, "group": dataset.group, "language": dataset.language, "kind": dataset.kind}
            asked.append(
                Question(
                    id=f"{name}/{row.get('_id') or number}",
                    messages=[{"role": "user", "content": content}],
                    reference=row["answers"],
                    about={**about, "tokens": count_tokens(row["context"])},
                    max_new_tokens=settings.max_new_tokens[dataset.kind],  # type: ignore[index]
                    judge=functools.partial(rated, judge, row),
                    ratings=RATINGS[dataset.kind],
                    cut_middle=True,
                )
            )
    return asked


def rated(prompt: str, row: Row, answer: str, repeat: int) -> Messages:
    """What a judge is told of an answer; the same in every repeat."""
    reference = "\n".join(row["answers"])
    return [{"role": "user", "content": fill(prompt, question=row["input"], reference=reference, answer=answer)}]


def score(question: Question, answer: str, verdicts: list[Verdict] | None) -> dict[str, float | None]:
    """score: the ratings' mean as a share of the highest, x 100, or without a judge that of `program`.

    program: the best F1 or ROUGE-L over the references, x 100.
    """
    metric = rouge_l if question.about["dataset"] in ROUGE else f1
    references = [question.reference] if isinstance(question.reference, str) else question.reference or []
    program = round(100 * max(metric(answer, one, question.about["language"]) for one in references), 2)
    if verdicts is None:
        return {"score": program, "program": program}
    percent = [v.rating and 100 * v.rating / question.ratings[-1] for v in verdicts]
    return {
        "score": mean([value for value in percent if value is not None]),
        "program": program,
        **{f"rating_{n}": value for n, value in enumerate(percent, 1)},
    }


def summarise(rows: list[Row]) -> dict[str, Any]:
    """score: the mean over datasets, as the benchmark takes it, and likewise of every group and language."""
    by_dataset = breakdown(rows, lambda row: row["about"]["dataset"])
    program = breakdown(rows, lambda row: row["about"]["dataset"], "program")
    for name, found in by_dataset.items():
        found["program"] = program[name]["score"]
    by = lambda key: breakdown(rows, lambda row: row["about"][key], over="dataset")
    repeats = by_repeat(rows)
    error = error_of(strata(rows, "dataset"))
    return {
        "score": mean_of(strata(rows, "dataset")),
        "standard_error": error and round(error[0], 4),
        "best": 100,
        "mean_over": "dataset",
        "by_repeat": repeats,
        "standard_error_judge": standard_error([value for value in repeats if value is not None]),
        "by_group": by("group"),
        "by_dataset": by_dataset,
        "by_language": by("language"),
    }


# -- files ------------------------------------------------------------------------------------------------------


def read_rows(file: Path, limit: int | None) -> list[tuple[int, Row]]:
    """(line, row), the first `limit`."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{PREFIX}.path: {file} cannot be read: {error}") from None
    rows: list[tuple[int, Row]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (limit and len(rows) == limit):
            continue
        where = f"{PREFIX}.path: {file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} is no object")
        for field in ("input", "context"):
            if not isinstance(row.get(field), str):
                raise UserError(f"{where} has no text in {field!r}; a row needs input, context, answers")
        answers = row.get("answers")
        if not isinstance(answers, list) or not answers or not all(isinstance(one, str) for one in answers):
            raise UserError(f"{where} has no list of texts in 'answers'; a row needs input, context, answers")
        rows.append((number, row))
    if not rows:
        raise UserError(f"{PREFIX}.path: {file} is empty")
    return rows


def load_question_prompt(own: str | None, name: str) -> str:
    """The benchmark's own of a dataset2prompt.json, the user's file, or the shipped one."""
    places = ("context", "input") if DATASETS[name].prompt.startswith("q") else ("context",)
    if own and own.endswith(".json"):
        try:
            prompt = json.loads(Path(own).read_text(encoding="utf-8"))[name]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{PREFIX}.prompts={own} holds no prompt of {name}: {error!r}") from None
        if not isinstance(prompt, str) or not all(f"{{{place}}}" in prompt for place in places):
            raise UserError(f"{PREFIX}.prompts={own}: the prompt of {name} must hold {' and '.join(places)} in braces")
        return prompt
    return _load(own, DATASETS[name].prompt, places)


def load_judge_prompt(own: str | None, kind: str) -> str:
    places = ("reference", "answer") if kind == "summary" else ("question", "reference", "answer")
    return _load(None if own and own.endswith(".json") else own, f"judge_{kind}.txt", places)


def _load(own: str | None, name: str, places: tuple[str, ...]) -> str:
    if own and not Path(own).is_dir():
        raise UserError(f"{PREFIX}.prompts={own} is no folder and no .json file")
    file = Path(own) / name if own and (Path(own) / name).is_file() else None
    return load_prompt(f"{PREFIX}.prompts", f"longbench/{name}", file, places)
