"""Where each rank stands, for people who watch a run, and an end for a run that hangs.

    RUN/logs/rank-N.heartbeat   what rank N began last and when: 2 KiB of JSON, written in place
    RUN/logs/rank-N.stacks      every thread's Python stack, if the rank made no progress for hang_timeout_s, or was
                                ended because another rank failed; the traceback of its own error

The time limit is kept by faulthandler's own thread in C, which needs no Python to run: a rank that hangs inside a
library is ended, too. All ranks begin the same things in the same order, so the rank that has begun least is behind.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from longalign.files import disk_errors
from longalign.progress import ago

SIZE = 2048
DUMP = signal.SIGUSR2  # on it a rank writes its stacks
HUNG = "Timeout ("  # how faulthandler begins when time is up


class Heartbeat:
    """Of one rank. A context: leaving it by an exception records that as the run's end. timeout_s: None is no limit."""

    def __init__(self, logs: Path, rank: int, timeout_s: float | None):
        self.timeout_s, self.watched, self.armed = timeout_s, False, 0.0
        with disk_errors(logs, "output_dir"):
            logs.mkdir(parents=True, exist_ok=True)
            self.stacks = open(logs / f"rank-{rank}.stacks", "w", errors="backslashreplace")
            self.file = os.open(logs / f"rank-{rank}.heartbeat", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        faulthandler.register(DUMP, self.stacks)
        self.now: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname(), "beats": 0, "ended": None}
        self.beat("loading", step=0)

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop()
        if error:
            self._write(ended=f"failed: {error}"[:200])
        faulthandler.unregister(DUMP)
        signal.signal(DUMP, signal.SIG_IGN)  # else it would kill
        os.close(self.file)
        with contextlib.suppress(OSError), self.stacks:  # a full disk
            if error:
                traceback.print_exception(error, file=self.stacks)

    def beat(self, phase: str, **where: Any) -> None:
        """The rank begins `phase`; where: what else is to be told, kept until told otherwise."""
        self._write(phase=phase, beats=self.now["beats"] + 1, **where)
        # Setting the timer takes 0.2 ms, and a beat may come every few: it may run from a beat a little earlier.
        if self.watched and self.timeout_s and time.monotonic() - self.armed > min(1.0, self.timeout_s / 10):
            faulthandler.dump_traceback_later(self.timeout_s, file=self.stacks, exit=True)
            self.armed = time.monotonic()

    def watch(self) -> None:
        """From now on the time between two beats is limited."""
        self.watched = True

    @contextlib.contextmanager
    def unwatched(self, phase: str) -> Iterator[None]:
        """The block may take as long as it takes: checkpoints, evaluations, the export."""
        watched = self.watched
        self._stop()
        self.beat(phase)
        yield
        self.watched = watched

    def end(self, how: str) -> None:
        """how: finished | stopped."""
        self._stop()
        self._write(ended=how)

    def _stop(self) -> None:
        self.watched, self.armed = False, 0.0
        faulthandler.cancel_dump_traceback_later()

    def _write(self, **changes: Any) -> None:
        self.now |= {**changes, "time": time.time()}
        put(self.file, self.now)


def put(file: int, now: dict[str, Any]) -> None:
    """Write a heartbeat, or leave the last one if the disk is full: it is for watchers, and ends no run.

    In place and of one size: some microseconds, and no reader sees half of it.
    """
    with contextlib.suppress(OSError):
        os.pwrite(file, json.dumps(now, ensure_ascii=False).encode(errors="replace")[:SIZE].ljust(SIZE), 0)


# -- reading them ---------------------------------------------------------------------------------------


def read(logs: Path, ranks: int) -> dict[int, dict[str, Any]]:
    """The last heartbeat of every rank that has one."""
    found = {}
    for rank in range(ranks):
        with contextlib.suppress(OSError, ValueError):
            found[rank] = json.loads((logs / f"rank-{rank}.heartbeat").read_text())
    return found


def is_alive(beat: dict[str, Any]) -> bool:
    """Whether the process of this host that wrote the heartbeat runs: not another that has got its number since."""
    try:
        process = psutil.Process(beat["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= beat["time"] + 1
    except psutil.NoSuchProcess:
        return False


def position(beat: dict[str, Any]) -> str:
    """'step 12, micro-step 3, backward'."""
    parts = [f"{name} {beat[key]}" for key, name in (("step", "step"), ("micro", "micro-step")) if beat.get(key)]
    return ", ".join([*parts, beat["phase"]])


def hung(logs: Path, ranks: int) -> str | None:
    """If a rank of this run was ended because it hung: where each rank stood, and the stacks of those behind."""
    stacks = {}
    for rank in range(ranks):
        with contextlib.suppress(OSError):
            stacks[rank] = (logs / f"rank-{rank}.stacks").read_text(errors="replace")
    if not any(text.startswith(HUNG) for text in stacks.values()):
        return None
    beats = read(logs, ranks)
    least = min((beat["beats"] for beat in beats.values()), default=0)
    behind = [rank for rank, beat in beats.items() if beat["beats"] == least] or list(stacks)
    lines = ["no progress for hang_timeout_s; where each rank stood:"]
    for rank, beat in beats.items():
        note = "   <- behind" if rank in behind and len(behind) < len(beats) else ""
        lines.append(f"  rank {rank} on {beat['host']}: {position(beat)}, {ago(time.time() - beat['time'])} ago{note}")
    for rank in behind[:2]:
        lines += [f"rank {rank}, innermost call first ({logs}/rank-{rank}.stacks):", main_thread(stacks.get(rank, ""))]
    return "\n".join(lines)


def main_thread(stacks: str, depth: int = 12) -> str:
    """The innermost calls of the main thread, which faulthandler writes last."""
    return "\n".join(stacks[stacks.rfind("hread 0x") :].splitlines()[1 : depth + 1])
