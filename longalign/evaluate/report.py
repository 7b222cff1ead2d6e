"""report.html: scores, heatmaps, length curves and every question of an evaluation on one page that loads nothing.

The page is made of results.json and TASK.jsonl alone and knows no task: it draws whatever breakdowns, grids and rows
there are (question.py says what a summary may have).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from longalign.evaluate.charts import Point, curves, heat_table, heatmap
from longalign.evaluate.results import (
    Group,
    breakdowns,
    digits,
    groups,
    in_order,
    is_number,
    label,
    measure_of,
    number,
    read_run,
)
from longalign.evaluate.statistics import Row, half_width, strata
from longalign.files import write_text

SHOWN = 500  # questions of a task on the page
MOST = 4000  # characters of a question, an answer, a reference or a judge's reply there
TOTAL = 4_000_000  # characters of all questions of a task together, roughly

# What a browser would drop or refuse is shown as a sign: control characters as U+2400..., all else as U+FFFD.
SIGNS = {n: 0x2400 + n for n in range(32) if chr(n) not in "\t\n\r"} | {0x7F: 0x2421}
UNSHOWABLE = re.compile("[\x80-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def write_report(output: Path) -> Path:
    """OUTPUT/report.html, and OUTPUT/TASK.png for every task with a grid. Raises UserError for broken files."""
    run = read_run(output)
    model = Path(str(run.results.get("model"))).name
    for name, summary in run.results["tasks"].items():
        if summary.get("grid"):
            heatmap(summary, output / f"{name}.png", f"{name}, {model}")
    about = [(key, run.results[key]) for key in ("endpoint", "template", "seed", "temperature") if key in run.results]
    about += list(run.results.get("versions", {}).items())
    tasks = [task_view(name, summary, run.rows[name]) for name, summary in run.results["tasks"].items()]
    file = output / "report.html"
    shown_about = [(key, value) for key, value in about if value is not None]
    write_text(file, page("report.html", results=run.results, about=shown_about, tasks=tasks))
    return file


def page(template: str, **values: Any) -> str:
    """A page of pages/, every value escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "pages", encoding="utf-8"),
        autoescape=True,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def shown(value: Any) -> Any:
    """What the page shows of a value: None as "missing", signs that HTML cannot hold as others."""
    if value is None:
        return "missing"
    return value if isinstance(value, Markup) or not isinstance(value, str) else clean(value)


def clean(text: str) -> str:
    return UNSHOWABLE.sub("\ufffd", text.translate(SIGNS))


def cut(text: str, most: int) -> str:
    """Both ends of a text that is longer than `most` characters."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}\n[... {len(text) - most // 2 * 2:,} characters ...]\n{text[len(text) - most // 2 :]}"


# -- tasks ------------------------------------------------------------------------------------------------------


def task_view(name: str, summary: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """What report.html shows of a task."""
    measure, (everything, *parts) = measure_of(summary), groups(summary, rows)
    best = summary.get("best")
    controls = {row["id"] for row in rows} - {row["id"] for row in everything.rows}
    chosen = sample(rows, controls)
    most = max(200, min(MOST, TOTAL // max(len(chosen), 1) // 4))
    return {
        "name": name,
        "measure": measure,
        "best": "" if best is None else f"{best:g}",
        "score": scored(everything, summary),
        **{count: number(summary[count]) if count in summary else "" for count in ("questions", "missing")},
        "warnings": warnings(summary),
        "numbers": numbers(summary, measure),
        "grid": heat_table(summary) if summary.get("grid") else None,
        "breakdowns": [breakdown_view(by, summary, parts) for by in breakdowns(summary)],
        "settings": pretty(summary.get("settings", {})),
        "judge": pretty(summary["judge"]) if "judge" in summary else None,
        "shown": [question_view(row, summary, most, row["id"] in controls) for row in chosen],
        "total": len(rows),
    }


def scored(group: Group, summary: dict[str, Any]) -> str:
    """0.625 ± 0.120"""
    value, half = point(group, summary) or (None, None)
    decimals = digits(summary)
    return number(value, decimals) + (f" ± {number(half, decimals)}" if half is not None else "")


def point(group: Group, summary: dict[str, Any]) -> Point:
    """A group's score, and half of its 95% interval where its rows tell it."""
    value = group.found.get(measure_of(summary))
    return None if value is None else (float(value), half_width(strata(group.rows, summary.get("mean_over"))))


def warnings(summary: dict[str, Any]) -> list[str]:
    told = {
        "missing": "scores missing, which are left out of every mean and count as no 0",
        "failed": "questions without an answer; run again to ask them anew",
        "empty": "empty answers",
        "cut_at_limit": "answers that reached max_new_tokens",
        "prompts_cut": "prompts cut in the middle to fit the context",
    }
    return [f"{text}: {summary[key]:,}" for key, text in told.items() if summary.get(key)]


def numbers(summary: dict[str, Any], measure: str) -> list[tuple[str, str]]:
    """Single numbers of the summary that the page shows nowhere else."""
    elsewhere = {measure, "best", "questions", "missing", "failed", "empty", "cut_at_limit", "prompts_cut"}
    return [
        (key.replace("_", " "), number(value, 3))
        for key, value in summary.items()
        if key not in elsewhere and isinstance(value, int | float)
    ]


def breakdown_view(by: str, summary: dict[str, Any], parts: list[Group]) -> dict[str, Any]:
    """A table and, for groups that are numbers, a curve."""
    found, measure = [group for group in parts if group.breakdown == by], measure_of(summary)
    more = list(dict.fromkeys(key for group in found for key in group.found if key != measure))
    names, points = [group.name for group in found], [point(group, summary) for group in found]
    best = summary.get("best")
    rows = [
        {
            "name": label(group.name, by),
            "cells": [
                scored(group, summary),
                *(number(group.found[key]) if key in group.found else "" for key in more),
            ],
            "share": round(100 * value[0] / best) if value and best else None,
        }
        for group, value in zip(found, points, strict=True)
    ]
    return {
        "name": by,
        "columns": [f"{measure} ± 95%", *more],
        "rows": rows,
        "curve": curve(by, summary, names, {measure: points}),
    }


def curve(by: str, summary: dict[str, Any], names: list[str], series: dict[str, list[Point]]) -> Markup | None:
    """None for groups that are no numbers, or fewer than two."""
    top = max((p[0] + (p[1] or 0) for points in series.values() for p in points if p), default=0)
    if len(names) < 2 or not all(map(is_number, names)) or not (top or summary.get("best")):
        return None
    axis = next(
        (axis for axis, keys in zip(summary.get("grid_axes", ()), grid_keys(summary), strict=False) if keys == names),
        by,
    )
    title = f"{measure_of(summary)} by {by}, with 95% intervals; the table has the same numbers"
    return curves(title, axis, measure_of(summary), names, series, summary.get("best") or 1.1 * top)


def grid_keys(summary: dict[str, Any]) -> tuple[list[str], list[str]]:
    grid = summary.get("grid") or {}
    return in_order(grid), in_order(name for column in grid.values() for name in column)


def pretty(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


# -- questions --------------------------------------------------------------------------------------------------


def sample(rows: list[Row], controls: set[str]) -> list[Row]:
    """Missing and lowest scores first, controls last; of more than SHOWN rows as many, evenly picked."""
    parts = lambda name: enumerate(re.split(r"(\d+(?:\.\d+)?)", str(name)))
    natural = lambda name: [float(part) if n % 2 else part for n, part in parts(name)]  # 2 before 10
    value = lambda row: row["scores"].get("score")
    ranked = sorted(
        rows, key=lambda row: (row["id"] in controls, value(row) is not None, value(row) or 0, natural(row["id"]))
    )
    if len(ranked) <= SHOWN:
        return ranked
    return [ranked[n * (len(ranked) - 1) // (SHOWN - 1)] for n in range(SHOWN)]


def question_view(row: Row, summary: dict[str, Any], most: int, control: bool) -> dict[str, Any]:
    value, decimals = row["scores"].get("score"), digits(summary)
    question, reference = str(row.get("question", "")), row.get("reference")
    references = reference if isinstance(reference, list) else [] if reference is None else [reference]
    answer = f"(none: {row.get('finish')})" if row.get("answer") is None else row["answer"] or "(empty)"
    texts = [("question", question), ("answer", answer), ("reference", "\n".join(map(str, references)))]
    for n, verdict in enumerate(row.get("verdicts", []), 1):
        rating = "no rating that can be read" if verdict["rating"] is None else f"rating {verdict['rating']}"
        texts.append((f"verdict {n}: {rating}", verdict["reply"]))
    about = {**row["about"], "prompt tokens": row.get("prompt_tokens"), "finish": row.get("finish")}
    about |= {key: number(score, decimals) for key, score in row["scores"].items()}
    return {
        "id": row["id"],
        "score": number(None if value is None else float(value), decimals),
        "level": "missing" if value is None else "low" if value < (summary.get("best") or 1) / 2 else "high",
        "control": control,
        "brief": " ".join(question[-400:].split())[-160:],
        "about": [(key, cut(str(value), 300)) for key, value in about.items() if value is not None],
        "texts": [(title, cut(text, most)) for title, text in texts if text],
    }
