"""Means and standard errors over rows that may lack a score."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from typing import Any

Row = dict[str, Any]


def scores(rows: Sequence[Row], key: str = "score") -> list[float]:
    """Those that are there."""
    return [row["scores"][key] for row in rows if row["scores"].get(key) is not None]


def mean(values: Sequence[float]) -> float | None:
    """None of nothing: a missing score is no zero."""
    return round(statistics.fmean(values), 4) if values else None


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None of fewer than two values."""
    return round(statistics.stdev(values) / math.sqrt(len(values)), 4) if len(values) > 1 else None


def breakdown(rows: Sequence[Row], group: Callable[[Row], Hashable], key: str = "score") -> dict[str, Row]:
    """{group: {"score": mean, "questions": n, "missing": n}}, groups in the order of their values."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(group(row), []).append(row)
    return {
        str(name): {"score": mean(scores(found[name], key)), "questions": len(found[name])}
        | {"missing": len(found[name]) - len(scores(found[name], key))}
        for name in sorted(found)
    }


def by_repeat(rows: Sequence[Row]) -> list[float | None]:
    """The mean score of each of a judge's repeats, from rows with scores rating_1, rating_2, ..."""
    names = sorted(
        {name for row in rows for name in row["scores"] if name.startswith("rating_")}, key=lambda n: int(n[7:])
    )
    return [mean(scores(rows, name)) for name in names]


def grid(rows: Sequence[Row], across: str, down: str) -> dict[str, dict[str, float | None]]:
    """{across: {down: mean score}}; None where every score is missing."""
    cells: dict[Any, dict[Any, list[Row]]] = {}
    for row in rows:
        cells.setdefault(row["about"][across], {}).setdefault(row["about"][down], []).append(row)
    return {
        str(x): {str(y): mean(scores(found)) for y, found in sorted(column.items())}
        for x, column in sorted(cells.items())
    }
