"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """`passed` is None if the check did not run; `detail` then says why."""

    name: str
    passed: bool | None
    figure: float | None = None
    tolerance: float | None = None
    detail: str = ""
    advice: str = ""  # what to do if it failed


def at_most(name: str, figure: float, tolerance: float, detail: str = "", advice: str = "") -> Check:
    """Passed if figure <= tolerance; a NaN fails."""
    return Check(name, bool(figure <= tolerance), float(figure), tolerance, detail, advice)


def not_run(name: str, why: str) -> Check:
    return Check(name, None, detail=why)
