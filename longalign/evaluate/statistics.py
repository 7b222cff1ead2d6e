"""Means, standard errors and intervals over rows that may lack a score.

A score is the mean over questions or, where a summary says `mean_over`, the mean over the means of such groups (the
datasets of LongBench). Strata are the values of these groups; a mean over questions has one stratum.
"""

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


def breakdown(
    rows: Sequence[Row], group: Callable[[Row], Hashable], key: str = "score", over: str | None = None
) -> dict[str, Row]:
    """{group: {"score": mean, "questions": n, "missing": n}}, groups in the order of their values."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(group(row), []).append(row)
    return {
        str(name): {"score": mean_of(strata(found[name], over, key)), "questions": len(found[name])}
        | {"missing": len(found[name]) - len(scores(found[name], key))}
        for name in sorted(found)
    }


def strata(rows: Sequence[Row], over: str | None, key: str = "score") -> list[list[float]]:
    """The scores that are there, by `about[over]`; groups without one are left out."""
    found: dict[Any, list[float]] = {}
    for row in rows:
        if row["scores"].get(key) is not None:
            found.setdefault(row["about"][over] if over else None, []).append(row["scores"][key])
    return list(found.values())


def mean_of(values: Sequence[Sequence[float]]) -> float | None:
    """The mean of the strata's means."""
    return mean([statistics.fmean(stratum) for stratum in values])


def error_of(values: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Standard error of the mean of the strata's means, and its degrees of freedom (Welch-Satterthwaite).

    None where it cannot be known: a stratum has fewer than two values, or no stratum's values differ.
    """
    if not values or any(len(stratum) < 2 for stratum in values):
        return None
    parts = [statistics.variance(stratum) / len(stratum) / len(values) ** 2 for stratum in values]
    if (variance := sum(parts)) == 0:
        return None
    freedom = variance**2 / sum(part**2 / (len(s) - 1) for part, s in zip(parts, values, strict=True))
    return math.sqrt(variance), freedom


def half_width(values: Sequence[Sequence[float]]) -> float | None:
    """Half of the 95% interval around `mean_of(values)`, by Student's t; None as in error_of."""
    found = error_of(values)
    return found and t95(found[1]) * found[0]


T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


def t95(freedom: float) -> float:
    """Student's two-sided 95% quantile. From 10 degrees of freedom on by Abramowitz and Stegun, 26.7.5."""
    if freedom < 10:  # tabled; rounded down, to the wider side
        return T95[max(int(freedom), 1) - 1]
    z, v = 1.959964, freedom
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / v**n for n, term in enumerate(terms, 1))


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
