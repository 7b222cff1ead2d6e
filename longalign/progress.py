"""Progress of long work: a live bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

# A log file has no width: room enough for the tables, instead of rich's 80 columns. Paths may look like markup.
console = Console(stderr=True, width=None if sys.stderr.isatty() else 140, markup=False)
LOG_EVERY_S = 15.0


def warn(message: str) -> None:
    console.print(Text.assemble(("warning: ", "yellow"), message))


@functools.cache
def note(message: str) -> None:
    """Say something once, however often it is found out: worker processes repeat what the command found before."""
    if multiprocessing.parent_process() is None and "RANK" not in os.environ:
        console.print(message, soft_wrap=True)


def clock(seconds: float) -> str:
    """3725 -> '1:02:05'."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


def ago(seconds: float) -> str:
    """75 -> '75 s', 600 -> '10 min'."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


class Bar:
    """`with Bar("tokenize", total=100, unit="samples") as bar: bar.advance(1, note="loss 2.1")`.

    Shows done / total, rate and remaining time. `total` may be None when unknown.
    """

    def __init__(self, title: str, total: int | None, unit: str, done: int = 0, quiet: bool = False):
        self.title, self.total, self.unit, self.done, self.note = title, total, unit, done, ""
        self.live = console.is_terminal and not quiet
        self.quiet = quiet
        self.start, self.first = time.monotonic(), done
        self.last_line, self.done_then = self.start, done
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not self.live,
        )
        self.task = self.progress.add_task(title, total=total, completed=done, rate="", note="")

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self.progress.stop()
        if not self.live and not self.quiet and kind is None and self.done > self.done_then:
            self._line()

    @property
    def rate(self) -> float:
        return (self.done - self.first) / max(time.monotonic() - self.start, 1e-9)

    def advance(self, n: int, note: str = "") -> None:
        self.done += n
        self.note = note or self.note
        fields: dict[str, Any] = {"rate": f"{self.rate:,.1f} {self.unit}/s", "note": self.note}
        self.progress.update(self.task, completed=self.done, **fields)
        if not self.live and not self.quiet and time.monotonic() - self.last_line > LOG_EVERY_S:
            self._line()

    def _line(self) -> None:
        self.last_line, self.done_then = time.monotonic(), self.done
        total = f"/{self.total:,}" if self.total else ""
        left = f", {clock((self.total - self.done) / self.rate)} left" if self.total and self.rate else ""
        note = f", {self.note}" if self.note else ""
        console.print(f"{self.title}: {self.done:,}{total} {self.unit}, {self.rate:,.1f}/s{left}{note}")
