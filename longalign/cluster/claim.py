"""One launch at a time on a run folder.

    RUN/logs/launcher.heartbeat   host and process of the launcher, and the time, every BEAT_S while it runs

On this host processes tell whether a launch lives. Of another host nothing is known but the age of heartbeats, so that
one killed there less than FRESH_S ago is waited for. Nothing has to be cleaned up after a kill.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longalign.errors import UserError
from longalign.files import disk_errors, read_json
from longalign.progress import ago, warn
from longalign.train.heartbeat import is_alive, put

BEAT_S = 5.0
FRESH_S = 60.0


def living(logs: Path) -> dict[str, dict[str, Any]]:
    """The heartbeats of launcher and ranks that have not ended, as far as it can be known: by name, launcher first."""
    found = {}
    for path in sorted(logs.glob("*.heartbeat")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            beat = read_json(path)
            here = beat["host"] == socket.gethostname()
            if not beat["ended"] and (is_alive(beat) if here else abs(time.time() - beat["time"]) < FRESH_S):
                found[path.stem] = beat
    return found


def refuse_second(run: Path) -> None:
    """Raises UserError if another launch works in this folder.

    Waits, little longer than FRESH_S, for ranks that a dead launcher left behind and that save, and for heartbeats of
    other hosts to go on or to grow old.
    """
    first, deadline = None, time.monotonic() + FRESH_S + BEAT_S
    while beats := living(run / "logs"):
        name, beat = next(iter(beats.items()))
        who = f"{name.replace('-', ' ')} on {beat['host']}, process {beat['pid']}"
        sign = f"its last sign of life is {ago(time.time() - beat['time'])} old"
        first = first or beat
        goes_on = beat["host"] == socket.gethostname() or beat["time"] != first["time"]
        if (name == "launcher" and goes_on) or time.monotonic() > deadline:
            raise UserError(
                f"output_dir={run} is in use by another launch: {who}; {sign}. Wait for its end, stop it there (kill "
                f"{beat['pid']}), or give another output_dir"
            )
        if beat is first:
            warn(f"waiting for the end of the last launch: {who}; {sign}")
        time.sleep(0.5)


@contextlib.contextmanager
def claim(run: Path) -> Iterator[None]:
    """The block is the only launch in this folder. Raises UserError if there is another one."""
    refuse_second(run)
    logs, ended = run / "logs", threading.Event()
    with disk_errors(logs, "output_dir"):
        logs.mkdir(parents=True, exist_ok=True)
        for left in (*logs.glob("rank-*.heartbeat"), *logs.glob("rank-*.stacks")):  # of an earlier launch
            left.unlink()
        file = os.open(logs / "launcher.heartbeat", os.O_WRONLY | os.O_CREAT, 0o644)
    now = {"pid": os.getpid(), "host": socket.gethostname()}

    def tell() -> None:
        while not ended.wait(BEAT_S):
            put(file, {**now, "time": time.time(), "ended": None})

    put(file, {**now, "time": time.time(), "ended": None})
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        put(file, {**now, "time": time.time(), "ended": "ended"})
        os.close(file)
