"""A task's summary in the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table


def summary_table(name: str, summary: dict[str, Any]) -> Table:
    """A row per group of every breakdown (by_language, by_length, ...), and one for all."""
    spread = f" ± {summary['standard_error']:.2f}" if summary.get("standard_error") is not None else ""
    table = Table(title=f"{name}: {_number(summary['score'])}{spread}", title_justify="left", box=box.SIMPLE)
    for column in ("", "", "score", "questions", "missing"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("all", "", _number(summary["score"]), f"{summary['questions']:,}", f"{summary['missing']:,}")
    for key, groups in summary.items():
        if not key.startswith("by_") or not isinstance(groups, dict):
            continue
        for group, found in groups.items():
            counts = [f"{found[count]:,}" if count in found else "" for count in ("questions", "missing")]
            table.add_row(key.removeprefix("by_"), group, _number(found["score"]), *counts)
    if (error := summary.get("standard_error_judge")) is not None:
        means = ", ".join(map(_number, summary["by_repeat"]))
        table.caption = f"judged {len(summary['by_repeat'])} times: {means}; standard error {error:.2f}"
    return table


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.2f}"
