"""A task's summary in the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from longalign.evaluate.results import breakdowns, digits, in_order, label, measure_of, number


def summary_table(name: str, summary: dict[str, Any]) -> RenderableType:
    """A row per group of every breakdown (by_language, by_length, ...) and one for all; the grid, if there is one."""
    measure, decimals = measure_of(summary), digits(summary)
    show = lambda value: number(None if value is None else float(value), decimals)
    spread = f" ± {show(summary['standard_error'])}" if summary.get("standard_error") is not None else ""
    table = Table(title=f"{name}: {measure} {show(summary.get(measure))}{spread}", title_justify="left", box=box.SIMPLE)
    for column in ("", "", measure, "questions", "missing"):
        table.add_column(column, justify="left" if not column else "right")
    counts = lambda found: [f"{found[count]:,}" if count in found else "" for count in ("questions", "missing")]
    table.add_row("all", "", show(summary.get(measure)), *counts(summary))
    grid = summary.get("grid") or {}
    shown_as_means = [list(grid), *map(list, grid.values())]
    for key, groups in breakdowns(summary).items():
        if list(groups) not in shown_as_means:
            for group in in_order(groups):
                table.add_row(key, label(group, key), show(groups[group].get(measure)), *counts(groups[group]))
    if summary.get("score_without_document") is not None:
        table.add_row("without the document", "", show(summary["score_without_document"]))
    if (error := summary.get("standard_error_judge")) is not None:
        means = ", ".join(map(show, summary["by_repeat"]))
        table.caption = f"judged {len(summary['by_repeat'])} times: {means}; standard error {error:.2f}"
    return Group(table, grid_table(summary)) if grid else table


def grid_table(summary: dict[str, Any]) -> Table:
    """A row per length, a column per depth or kind, with the means of both."""
    grid, (down, across) = summary["grid"], summary["grid_axes"]
    columns = in_order(name for row in grid.values() for name in row)
    means = lambda names: next((by for by in breakdowns(summary).values() if set(by) == set(names)), {})
    show = lambda value: "missing" if value is None else f"{value:.2f}"
    table = Table(title=f"{down} x {across}", title_justify="left", box=box.SIMPLE)
    for column in (down, *(label(name, across) for name in columns), "mean"):
        table.add_column(column, justify="right")
    of_rows, of_columns = means(grid), means(columns)
    for name in in_order(grid):
        cells = [show(grid[name][column]) if column in grid[name] else "" for column in columns]
        table.add_row(label(name, down), *cells, show(of_rows[name]["score"]) if of_rows else "")
    if of_columns:
        table.add_row("mean", *(show(of_columns[name]["score"]) for name in columns), show(summary["score"]))
    return table
