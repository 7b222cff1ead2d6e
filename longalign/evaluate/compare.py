"""The eval command with compare=[RUN, ...]: finished evaluations side by side, and their differences to the first.

A run's score has a 95% interval over its questions. A difference is taken question by question, over those that both
runs answered and have a score of (the same id and reference): the mean of these differences and its 95% interval by
Student's t. "No difference seen" means that the interval holds 0. Differences that are all alike have no interval; six
or more of them are told as higher or lower (a sign test). Nothing is asked of a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longalign.errors import UserError
from longalign.evaluate.compare_page import html, terminal_table
from longalign.evaluate.report import point, pretty
from longalign.evaluate.results import Group, Run, digits, groups, in_order, measure_of, read_run
from longalign.evaluate.statistics import Row, half_width, mean_of, strata
from longalign.files import disk_errors, write_json, write_text
from longalign.progress import console, warn
from longalign.schema import Config

Found = dict[str, Any]

SIGN_TEST = 6  # differences, all alike, have no interval; so many of one sign come by chance in 2 of 2^6 cases, 3%


def run(config: Config, dry_run: bool) -> int:
    """Writes OUTPUT/compare.json and compare.html. Raises UserError for folders that cannot be compared."""
    output = Path(config.output_dir or "")
    folders = [Path(folder) for folder in config.compare]
    found = [read_run(folder, "compare") for folder in folders]
    if len({run.folder.resolve() for run in found}) < max(2, len(found)):
        raise UserError(f"compare=[{','.join(config.compare)}]: two or more different evaluations are needed")
    runs = dict(zip(names([run.folder for run in found]), found, strict=True))
    compared = compare(runs)
    for text in compared["warnings"]:
        warn(text)
    if dry_run:
        console.print(f"{', '.join(compared['tasks'])} of {', '.join(runs)} -> {output}", soft_wrap=True)
        return 0
    for name, task in compared["tasks"].items():
        console.print(terminal_table(name, task, list(runs)))
    with disk_errors(output, "output_dir"):
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "compare.json", compared)
        write_text(output / "compare.html", html(runs, compared, config.compare_paper))
    console.print(f"written to {output}: compare.json, compare.html", soft_wrap=True)
    return 0


def names(folders: list[Path]) -> list[str]:
    """What tells the folders apart: runs/7b/10k/naive/eval, runs/7b/10k/sorted/eval -> naive, sorted."""
    parts = [folder.resolve().parts for folder in folders]
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    while all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    found = ["/".join(p) for p in parts]
    return found if len(set(found)) == len(found) else list(map(str, folders))


def compare(runs: dict[str, Run]) -> Found:
    """What compare.json holds. Raises UserError if no task is in two runs."""
    tasks = list(dict.fromkeys(name for run in runs.values() for name in run.results["tasks"]))
    common = [name for name in tasks if sum(name in run.results["tasks"] for run in runs.values()) > 1]
    if not common:
        told = "; ".join(f"{name}: {', '.join(run.results['tasks']) or 'none'}" for name, run in runs.items())
        raise UserError(f"compare: no task is in two of the runs ({told})")
    return {
        "runs": [{"name": n, "folder": str(r.folder), "model": r.results.get("model")} for n, r in runs.items()],
        "warnings": [*differ("", settings(runs, [])), *(text for name in tasks for text in warnings(name, runs))],
        "settings": settings(runs, common),
        "tasks": {name: compare_task(name, runs) for name in common},
    }


def compare_task(name: str, runs: dict[str, Run]) -> Found:
    """{"measure", "best", "rows": [{"breakdown", "group", "runs": {run: score}, "differences": {run: difference}}]}."""
    having = {run: found for run, found in runs.items() if name in found.results["tasks"]}
    summaries = {run: found.results["tasks"][name] for run, found in having.items()}
    first, *others = runs
    parts = {
        run: {(g.breakdown, g.name): g for g in groups(summaries[run], found.rows[name])}
        for run, found in having.items()
    }
    rows = []
    for key in ordered([key for found in parts.values() for key in found]):
        of = {run: found[key] for run, found in parts.items() if key in found}
        rows.append(
            {
                "breakdown": key[0],
                "group": key[1],
                "runs": {run: scored(group, summaries[run]) for run, group in of.items()},
                "differences": {
                    run: difference(of[first], of[run], summaries[first]) for run in others if first in of and run in of
                },
            }
        )
    summary = next(iter(summaries.values()))
    measure = measure_of(summary)
    better = "lower" if measure == "loss" else "higher"
    shown = {"measure": measure, "better": better, "best": summary.get("best"), "decimals": digits(summary)}
    return {**shown, "rows": rows}


def ordered(keys: list[tuple[str, str]]) -> list[tuple[str, str]]:
    by = dict.fromkeys(breakdown for breakdown, _ in keys)
    return [(b, name) for b in by for name in in_order(name for breakdown, name in keys if breakdown == b)]


def scored(group: Group, summary: Found) -> Found:
    """{"score", "interval": [low, high] or None, "questions": that have a score}."""
    found = point(group, summary)
    return {
        "score": found and found[0],
        "interval": found and around(*found),
        "questions": sum(row["scores"].get("score") is not None for row in group.rows),
    }


def difference(first: Group, other: Group, summary: Found) -> Found:
    """{"difference": other - first, "interval", "questions": compared, "told"} over the questions of both.

    Where a task has no rows of single questions the difference is that of the scores, without an interval.
    """
    if not first.rows and not other.rows:
        one, two = (group.found.get(measure_of(summary)) for group in (first, other))
        value = None if one is None or two is None else round(two - one, 6)
        return {"difference": value, "interval": None, "questions": 0, "told": "no interval"}
    pairs = paired(first.rows, other.rows)
    differing = strata(pairs, summary.get("mean_over"))
    value, half = mean_of(differing), half_width(differing)
    told = "no interval"
    if value is not None and half is not None:
        told = "no difference seen" if abs(value) <= half else "higher" if value > 0 else "lower"
    elif value is not None and len({round(row["scores"]["score"], 6) for row in pairs}) == 1:
        if value == 0:
            told = "no difference seen"
        elif len(pairs) >= SIGN_TEST:
            told = "higher" if value > 0 else "lower"
    return {"difference": value, "interval": around(value, half), "questions": len(pairs), "told": told}


def paired(first: list[Row], other: list[Row]) -> list[Row]:
    """Rows of the questions that both have a score of, with other - first as the score."""
    before = {(row["id"], str(row.get("reference"))): row for row in first}
    found = []
    for row in other:
        twin = before.get((row["id"], str(row.get("reference"))))
        both = [one["scores"].get("score") for one in (row, twin) if one is not None]
        if len(both) == 2 and None not in both:
            found.append({"about": row["about"], "scores": {"score": both[0] - both[1]}})
    return found


def around(value: float | None, half: float | None) -> list[float] | None:
    return None if value is None or half is None else [round(value - half, 6), round(value + half, 6)]


# -- what the runs do not share ---------------------------------------------------------------------------------


def warnings(name: str, runs: dict[str, Run]) -> list[str]:
    """Where other tasks, questions, settings or judges stand behind the scores of a task."""
    having = {run: found for run, found in runs.items() if name in found.results["tasks"]}
    told = [f"{name}: {run} has no such task" for run in runs if run not in having]
    if len(having) < 2:
        return [f"{name}: only {next(iter(having))} has this task; it is not compared"]
    summaries = {run: found.results["tasks"][name] for run, found in having.items()}
    first, *others = having
    asked = {run: {(row["id"], str(row.get("reference"))) for row in found.rows[name]} for run, found in having.items()}
    for run in others:
        if asked[run] != asked[first]:
            sizes = f"{first} has {len(asked[first]):,}, {run} {len(asked[run]):,}"
            both = len(asked[run] & asked[first])
            told.append(f"{name}: the questions differ: {sizes}, {both:,} in common; only these tell the difference")
    told += differ(f"{name}: ", [one for one in settings(having, [name]) if one[0].startswith(f"task.{name}.")])
    judges = {run: summary.get("judge") for run, summary in summaries.items()}
    if len({pretty(judge) for judge in judges.values()}) > 1:
        by = ", ".join(f"{run}: {judge['model'] if judge else 'none'}" for run, judge in judges.items())
        told.append(f"{name}: the judges differ, or what they were told ({by}); such scores are not on one scale")
    return told


def differ(where: str, found: list[tuple[str, list[Any]]]) -> list[str]:
    return [f"{where}settings differ: {', '.join(key for key, _ in found)}"] if found else []


def settings(runs: dict[str, Run], tasks: list[str]) -> list[tuple[str, list[Any]]]:
    """(setting, its value in every run) of the settings that differ, of these tasks and of all."""
    flat: dict[str, Found] = {}
    for run, found in runs.items():
        shared = {key: found.results.get(key) for key in ("template", "seed", "temperature", "generation")}
        own = {f"task.{name}": found.results["tasks"].get(name, {}).get("settings", {}) for name in tasks}
        judge = {f"{name}.judge": found.results["tasks"].get(name, {}).get("judge") or {} for name in tasks}
        flat[run] = flatten({**shared, **own, **judge})
    keys = dict.fromkeys(key for found in flat.values() for key in found)
    values = {key: [found.get(key) for found in flat.values()] for key in keys}
    return [(key, found) for key, found in values.items() if any(value != found[0] for value in found)]


def flatten(values: Found, prefix: str = "") -> Found:
    found: Found = {}
    for key, value in values.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
