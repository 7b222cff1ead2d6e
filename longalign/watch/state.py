"""The state of runs, from their folders alone: no process is asked, so any host that sees the folder can look."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from longalign.errors import UserError
from longalign.files import read_json
from longalign.progress import ago
from longalign.sweep import RUNS
from longalign.train import heartbeat
from longalign.train.checkpoint import complete
from longalign.train.heartbeat import is_alive

QUIET_S = 120.0  # a rank of another host that says nothing for so long is told of: nothing more can be known from here
RECENT = 20  # steps that speed and remaining time are taken from


def find_runs(folder: Path) -> list[Path]:
    """A run's folder itself, the runs of a sweep, or all below the folder. Raises UserError if there is none."""
    if (folder / RUNS).is_dir():
        records = [read_json(path) for path in sorted((folder / RUNS).glob("*.json"), key=lambda path: int(path.stem))]
        found = [Path(record["output_dir"]) for record in records if record["output_dir"]]
        found = [run for run in found if (run / "config.yaml").is_file()]
    else:
        found = sorted(_runs_below(folder))
    if not found:
        raise UserError(f"{folder} holds no run of `longalign train`; give a run's output_dir, or a folder of runs")
    return found


def _runs_below(folder: Path) -> Iterator[Path]:
    for path, below, files in os.walk(folder):
        if "config.yaml" in files and "plan" in below:
            yield Path(path)
            below.clear()


class Rows:
    """The rows of a JSONL file that grows, and that a resumed run replaces by a shorter one."""

    def __init__(self, path: Path):
        self.path, self.rows, self.read, self.inode = path, list[dict[str, Any]](), 0, 0

    def now(self) -> list[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            about = os.fstat(file.fileno())
            if about.st_ino != self.inode or about.st_size < self.read:
                self.rows, self.read, self.inode = [], 0, about.st_ino
            file.seek(self.read)
            whole = file.read().rpartition(b"\n")[0]
            self.rows += [json.loads(line) for line in whole.splitlines()]
            self.read += len(whole) + bool(whole)
        return self.rows


@dataclass
class State:
    """What is known of a run. how: running | finished | stopped | failed | hung | killed | quiet | waiting."""

    run: Path
    how: str = "waiting"
    why: str = ""  # of a failure
    step: int = 0
    n_steps: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    beats: dict[int, dict[str, Any]] = field(default_factory=dict)  # by rank
    checkpoint: str | None = None
    checkpoint_age_s: float = 0.0
    looked: float = field(default_factory=time.time)

    @property
    def over(self) -> bool:
        return self.how not in ("running", "quiet", "waiting")

    @property
    def step_s(self) -> float:
        return median(row["step_s"] for row in self.rows[-RECENT:]) if self.rows else 0.0

    @property
    def tokens_per_s(self) -> float:
        recent = self.rows[-RECENT:]
        return sum(row["tokens"] for row in recent) / max(sum(row["step_s"] for row in recent), 1e-9)

    @property
    def left_s(self) -> float | None:
        return (self.n_steps - self.step) * self.step_s if self.rows and not self.over else None


class Run:
    """A run that is looked at again and again."""

    def __init__(self, run: Path):
        self.run, self.metrics, self.evals = run, Rows(run / "metrics.jsonl"), Rows(run / "eval.jsonl")

    def look(self) -> State:
        config = yaml.safe_load((self.run / "config.yaml").read_text(encoding="utf-8"))
        steps = read_json(self.run / "plan" / "manifest.json")["steps"]
        ranks = config["cluster"].get("nodes", 1) * config["cluster"]["processes"]
        rows, logs = self.metrics.now(), self.run / "logs"
        found = State(self.run, rows=rows, evals=self.evals.now(), beats=heartbeat.read(logs, ranks))
        found.n_steps = min(steps, config["max_steps"] or steps)
        found.step = rows[-1]["step"] if rows else 0
        if kept := complete(self.run / "checkpoints"):
            found.checkpoint, found.checkpoint_age_s = kept[-1].name, time.time() - kept[-1].stat().st_mtime
        found.how, found.why = self._how(found, heartbeat.hung(logs, ranks))
        return found

    def _how(self, found: State, hung: str | None) -> tuple[str, str]:
        ends = [beat["ended"] for beat in found.beats.values()]
        if hung:  # what other ranks failed of, when that one was gone, came after it
            return "hung", hung
        if failures := [end.removeprefix("failed: ") for end in ends if end and end.startswith("failed")]:
            return "failed", failures[0]
        if ends and None not in ends:
            return ("finished" if set(ends) == {"finished"} else "stopped"), ""
        if not ends:
            return ("finished" if (self.run / "model" / "config.json").is_file() else "waiting"), ""
        silent = min(time.time() - beat["time"] for beat in found.beats.values())
        here = [beat for beat in found.beats.values() if beat["host"] == socket.gethostname() and not beat["ended"]]
        if any(not is_alive(beat) for beat in here):
            return "killed", f"{ago(silent)} ago, with no word"
        return ("quiet", f"no sign of life for {ago(silent)}") if not here and silent > QUIET_S else ("running", "")
