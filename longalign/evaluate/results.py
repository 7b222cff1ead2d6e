"""What an evaluation left on disk: results.json and TASK.jsonl, read back for reports and comparisons."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longalign.errors import UserError
from longalign.evaluate.statistics import Row


@dataclass(frozen=True)
class Run:
    folder: Path
    results: dict[str, Any]  # results.json
    rows: dict[str, list[Row]]  # task -> its rows; none for a task that has none


@dataclass(frozen=True)
class Group:
    """All questions of a task (breakdown and name are ""), or those of one group of a breakdown."""

    breakdown: str
    name: str
    found: dict[str, Any]  # {"score": ..., "questions": ..., ...}
    rows: list[Row]


def read_run(folder: Path, setting: str = "output_dir") -> Run:
    """A folder with results.json, or a run's with eval/results.json. Raises UserError naming `setting`."""
    places = (folder, folder / "eval")
    place = next((place for place in places if (place / "results.json").is_file()), None)
    if place is None:
        raise UserError(f"{setting}: {folder} has neither results.json nor eval/results.json; give what eval wrote")
    results = _json(place / "results.json", (place / "results.json").read_bytes(), setting)
    tasks = results.get("tasks")
    if not isinstance(tasks, dict) or not all(isinstance(summary, dict) for summary in tasks.values()):
        raise UserError(f"{setting}: {place / 'results.json'} has no 'tasks'; is it what eval wrote?")
    return Run(place, results, {name: _rows(place / f"{name}.jsonl", setting) for name in tasks})


def _rows(file: Path, setting: str) -> list[Row]:
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if line.strip():
            row = _json(f"{file}, line {number}", line, setting)
            if not {"id", "about", "scores"} <= set(row):
                raise UserError(f"{setting}: {file}, line {number} lacks id, about or scores; run eval again")
            rows.append(row)
    return rows


def _json(where: Path | str, text: bytes, setting: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{setting}: {where} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{setting}: {where} is no JSON object")
    return found


def measure_of(summary: dict[str, Any]) -> str:
    """ "score", or "loss" (lower is better) where there is none."""
    return "loss" if "loss" in summary and "score" not in summary else "score"


def breakdowns(summary: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """{X: {group: found}} of every by_X."""
    return {key[3:]: found for key, found in summary.items() if key.startswith("by_") and isinstance(found, dict)}


def groups(summary: dict[str, Any], rows: list[Row]) -> list[Group]:
    """All, then every group of every breakdown."""
    by = breakdowns(summary)
    counted = [row for row in rows if all(row["about"].get(key, "") is not None for key in by)]
    found = [Group("", "", summary, counted)]
    for key, names in by.items():
        of: dict[str, list[Row]] = {}
        for row in counted:
            of.setdefault(str(row["about"].get(key)), []).append(row)
        found += [Group(key, name, names[name], of.get(name, [])) for name in in_order(names)]
    return found


def in_order(names: Any) -> list[str]:
    """Numbers by value, other names as they come."""
    found = list(dict.fromkeys(names))
    return sorted(found, key=float) if all(map(is_number, found)) else found


def is_number(name: str) -> bool:
    return name.replace(".", "", 1).isdecimal()


def label(name: str, axis: str = "") -> str:
    """A group's name as it is shown: 65536 -> 65,536; 0.25 of "depth" -> 25%."""
    if not is_number(name):
        return name
    return f"{float(name):.0%}" if axis == "depth" else f"{float(name):,.10g}"


def digits(summary: dict[str, Any]) -> int:
    """Decimals that a score is shown with."""
    return 2 if (summary.get("best") or 1) > 1 else 3


def number(value: Any, decimals: int = 2) -> str:
    if value is None:
        return "missing"
    return f"{value:,.{decimals}f}" if isinstance(value, float) else f"{value:,}"
