"""LongBench-Chat (LongAlign, section 3.4 and appendix C.1): real queries on long documents, rated 1-10 by a judge.

The judge sees the query, a reference answer and three rated answers in an order drawn for every repeat, not the
document. Files are those of the original: test_cases.json [{idx, prompt, query, answer}], few_shots.json
[[{answer, score}, ...]], entry idx-1 for case idx.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from longalign.data.messages import Messages
from longalign.errors import UserError
from longalign.evaluate.prompts import fill, load_prompt
from longalign.evaluate.question import CountTokens, Question, Verdict
from longalign.evaluate.statistics import Row, breakdown, by_repeat, mean, scores, standard_error
from longalign.schema import LongBenchChat

PREFIX = "task.longbench_chat"
SYSTEM = "You rate the quality of texts, carefully and impartially."
LENGTHS = (0, 10_000, 20_000, 40_000, 60_000, 80_000, 100_000)  # lower ends of the breakdown by length, in tokens


def questions(settings: LongBenchChat, seed: int, count_tokens: CountTokens) -> list[Question]:
    """Raises UserError naming file, case and field for what is missing or of the wrong type."""
    cases = read_cases(settings.cases)
    examples = read_examples(settings.few_shots, cases) if settings.few_shots else {}
    prompt = load_prompt(
        f"{PREFIX}.prompt", "longbench_chat/judge.txt", settings.prompt, ("question", "reference", "examples", "answer")
    )
    example = load_prompt(f"{PREFIX}.prompt", "longbench_chat/example.txt", None, ("answer", "score"))
    asked = [case for case in cases if language_of(case) in settings.languages][: settings.limit]
    if not asked:
        raise UserError(f"{PREFIX}.languages={settings.languages}: no case of {settings.cases} is in these languages")
    return [
        Question(
            id=str(case["idx"]),
            messages=[{"role": "user", "content": case["prompt"]}],
            reference=case["answer"],
            about=about(case, count_tokens(case["prompt"])),
            max_new_tokens=settings.max_new_tokens,
            judge=Rated(prompt, example, case, examples.get(case["idx"], []), seed),
            cut_middle=True,
        )
        for case in asked
    ]


def about(case: dict[str, Any], tokens: int) -> dict[str, Any]:
    """length: the lower end of its range, in tokens."""
    length = max(n for n in LENGTHS if n <= tokens)
    return {"language": language_of(case), "length": length, "tokens": tokens, "query": case["query"]}


class Rated:
    """What a judge is told of an answer to this case: rated(answer, repeat) -> messages."""

    def __init__(self, prompt: str, example: str, case: dict[str, Any], examples: list[dict[str, Any]], seed: int):
        self.prompt, self.example, self.case, self.examples, self.seed = prompt, example, case, examples, seed

    def __call__(self, answer: str, repeat: int) -> Messages:
        order = random.Random(f"{self.seed} {self.case['idx']} {repeat}").sample(self.examples, len(self.examples))
        shown = [fill(self.example, answer=e["answer"], score=f"{e['score']:g}") for e in order]
        content = fill(
            self.prompt,
            question=self.case["query"],
            reference=self.case["answer"],
            examples="".join(f"\n{text}\n" for text in shown),
            answer=answer,
        )
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def score(question: Question, answer: str, verdicts: list[Verdict] | None) -> dict[str, float | None]:
    """The mean of the ratings that could be read."""
    ratings = [verdict.rating for verdict in verdicts or []]
    return {
        "score": mean([rating for rating in ratings if rating is not None]),
        **{f"rating_{n}": rating for n, rating in enumerate(ratings, 1)},
    }


def summarise(rows: list[Row]) -> dict[str, Any]:
    """standard_error: of the mean over questions; standard_error_judge: of the mean over the judge's repeats."""
    repeats = by_repeat(rows)
    return {
        "score": mean(scores(rows)),
        "standard_error": standard_error(scores(rows)),
        "best": 10,
        "by_repeat": repeats,
        "standard_error_judge": standard_error([value for value in repeats if value is not None]),
        "by_language": breakdown(rows, lambda row: row["about"]["language"]),
        "by_length": breakdown(rows, lambda row: row["about"]["length"]),
    }


# -- the benchmark's files ------------------------------------------------------------------------------------


def read_cases(path: str) -> list[dict[str, Any]]:
    cases = _read(f"{PREFIX}.cases", path)
    seen: set[Any] = set()
    for place, case in enumerate(cases, 1):
        where = f"{PREFIX}.cases={path}: case {place}"
        if not isinstance(case, dict):
            raise UserError(f"{where} is no object")
        for field in ("prompt", "query", "answer"):
            if not isinstance(case.get(field), str) or not case[field].strip():
                raise UserError(
                    f"{where} (idx {case.get('idx')}) has no text in {field!r}; it needs idx, prompt, query, answer"
                )
        if not isinstance(case.get("idx"), int) or case["idx"] in seen:
            raise UserError(f"{where} has idx {case.get('idx')!r}; a whole number of its own is needed")
        seen.add(case["idx"])
    return cases


def read_examples(path: str, cases: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """idx -> its rated answers."""
    found = _read(f"{PREFIX}.few_shots", path)
    for place, examples in enumerate(found, 1):
        for example in examples if isinstance(examples, list) else [None]:
            fields = example if isinstance(example, dict) else {}
            if not isinstance(fields.get("answer"), str) or not isinstance(fields.get("score"), int | float):
                raise UserError(f"{PREFIX}.few_shots={path}: entry {place} is no list of {{answer, score}}")
    for case in cases:
        if not 1 <= case["idx"] <= len(found):
            raise UserError(f"{PREFIX}.few_shots={path} has {len(found)} entries, none for case idx {case['idx']}")
    return {case["idx"]: found[case["idx"] - 1] for case in cases}


def _read(setting: str, path: str) -> list[Any]:
    """A JSON list, or one value a line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{setting}={path} cannot be read: {error}") from None
    try:
        found = (
            [json.loads(line) for line in text.split("\n") if line.strip()]
            if path.endswith(".jsonl")
            else json.loads(text)
        )
    except ValueError as error:
        raise UserError(f"{setting}={path} is no JSON: {error}") from None
    if not isinstance(found, list) or not found:
        raise UserError(f"{setting}={path} must be a list with something in it")
    return found


def language_of(case: dict[str, Any]) -> str:
    """'en' or 'zh': as the case says, else by its query."""
    told = str(case.get("language", "")).lower()
    if told:
        return "zh" if told.startswith(("zh", "ch", "中")) else "en"
    return "zh" if re.search(r"[\u4e00-\u9fff]", case["query"]) else "en"
