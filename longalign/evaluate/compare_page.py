"""A comparison in the terminal and on compare.html; compare.py says what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from longalign.evaluate.charts import Point, heat_table
from longalign.evaluate.report import curve, page, pretty
from longalign.evaluate.results import Run, is_number, label, number

Found = dict[str, Any]


def score_text(found: Found | None, decimals: int) -> str:
    if found is None:
        return "not asked"
    if found["score"] is None:
        return "missing"
    half = f" ± {(found['interval'][1] - found['interval'][0]) / 2:.{decimals}f}" if found["interval"] else ""
    return number(float(found["score"]), decimals) + half


def difference_text(found: Found | None, decimals: int) -> str:
    """+0.120 [0.031, 0.209] n=140"""
    if found is None or found["difference"] is None:
        return "not compared"
    interval = "" if found["interval"] is None else " [{:+.{d}f}, {:+.{d}f}]".format(*found["interval"], d=decimals)
    count = f" n={found['questions']:,}" if found["questions"] else ""
    return f"{found['difference']:+.{decimals}f}{interval}{count}"


def lines(task: Found, runs: list[str]) -> list[Found]:
    """Every row of a task as texts: {"name", "scores": [...], "differences": [(text, told)]}."""
    decimals = task["decimals"]
    return [
        {
            "breakdown": row["breakdown"],
            "group": label(row["group"], row["breakdown"]) or "all",
            "scores": [score_text(row["runs"].get(run), decimals) for run in runs],
            "differences": [
                (difference_text(found, decimals), "" if found is None else found["told"])
                for found in (row["differences"].get(run) for run in runs[1:])
            ],
        }
        for row in task["rows"]
    ]


def terminal_table(name: str, task: Found, runs: list[str]) -> Table:
    title = f"{name}: {task['measure']} ± 95%; differences to {runs[0]} with their 95% intervals"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("")
    table.add_column("")
    for run in runs:
        table.add_column(run, justify="right")
    for run in runs[1:]:
        table.add_column(f"{run} - {runs[0]}")
    for line in lines(task, runs):
        differences = [f"{text}\n{told}".strip() for text, told in line["differences"]]
        table.add_row(line["breakdown"], line["group"], *line["scores"], *differences)
    return table


def html(runs: dict[str, Run], compared: Found, paper: bool) -> str:
    """The page; with `paper` also the values of the LongAlign paper's tables, marked as such."""
    reported = json.loads((Path(__file__).parent / "reported.json").read_text(encoding="utf-8")) if paper else {}
    tasks = []
    for name, task in compared["tasks"].items():
        having = {run: f.results["tasks"][name] for run, f in runs.items() if name in f.results["tasks"]}
        grids = [(run, heat_table(summary)) for run, summary in having.items() if summary.get("grid")]
        by = [b for b in dict.fromkeys(row["breakdown"] for row in task["rows"]) if b]
        drawn = [(b, overlaid(b, task, list(runs), next(iter(having.values())))) for b in by]
        charts = [(b, chart) for b, chart in drawn if chart]
        tasks.append(
            {
                "name": name,
                **task,
                "lines": lines(task, list(runs)),
                "grids": grids,
                "charts": charts,
                "reported": reported.get(name),
            }
        )
    differing = [(key, [pretty(value) for value in values]) for key, values in compared["settings"]]
    return page("compare.html", **{**compared, "tasks": tasks, "settings": differing})


def overlaid(by: str, task: Found, runs: list[str], summary: Found) -> Any:
    """A line per run, as compare.json has the numbers."""
    rows = [row for row in task["rows"] if row["breakdown"] == by]
    if not all(is_number(row["group"]) for row in rows):
        return None
    at = lambda found: None if found is None or found["score"] is None else (found["score"], half_of(found["interval"]))
    series: dict[str, list[Point]] = {run: [at(row["runs"].get(run)) for row in rows] for run in runs}
    return curve(by, summary, [row["group"] for row in rows], series)


def half_of(interval: list[float] | None) -> float | None:
    return None if interval is None else (interval[1] - interval[0]) / 2
