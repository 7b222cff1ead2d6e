"""Standard streams that a run outlives."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, NoReturn


class Unfailing(io.FileIO):
    """A standard stream whose reader may go away (`| tee log` and Ctrl-C, a closed terminal), or whose disk be full.

    What can then no longer be written is dropped: nothing that is said is worth a run.
    """

    def write(self, data: Any) -> int:
        written = None
        with contextlib.suppress(OSError):
            written = super().write(data)
        return len(data) if written is None else written


def outlive_readers() -> None:
    """From now on no write to this process's stdout or stderr raises."""
    for name in ("stdout", "stderr"):
        if old := getattr(sys, name):  # None if it was closed before the start
            raw = io.BufferedWriter(Unfailing(old.fileno(), "w", closefd=False))
            made = io.TextIOWrapper(raw, old.encoding, old.errors, line_buffering=True)
            setattr(sys, name, made)


def end_at_once(code: int) -> NoReturn:
    """End this process with all written that was said, but without Python's own end, which waits for threads."""
    for stream in (sys.__stdout__, sys.__stderr__, sys.stdout, sys.stderr):  # and what outlive_readers put there
        with contextlib.suppress(OSError, ValueError):
            if stream:
                stream.flush()
    os._exit(code)
