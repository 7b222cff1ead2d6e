"""The rows of a run: metrics.jsonl, one per optimizer step; eval.jsonl, one per evaluation; bad_steps.jsonl, one per
skipped step."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path
from typing import Any, Literal, TextIO

from longalign.files import disk_errors, write_text
from longalign.schema import Config
from longalign.train.loggers import open_loggers

KINDS = {"metrics": "train", "eval": "eval", "bad_steps": None}  # file -> name of its curves; None has no curve


class Journal:
    """The rows of a run, continued behind step `done`, in files and loggers. Rank 0 writes, others do nothing."""

    def __init__(self, config: Config, done: int, writes: bool):
        self.run, self.writes = Path(config.output_dir or ""), writes
        self.loggers = open_loggers(config, done) if writes else []
        self.files: dict[str, TextIO] = {}
        with disk_errors(self.run, "output_dir"):
            for name in KINDS if writes else ():
                cut_after(self.run / f"{name}.jsonl", done)

    def write(self, name: Literal["metrics", "eval", "bad_steps"], row: dict[str, Any]) -> None:
        """Add a row to NAME.jsonl; numbers that are not finite become null, as JSON has no others.

        Raises UserError on a full disk.
        """
        if not self.writes:
            return
        row = finite(row)
        with disk_errors(self.run / f"{name}.jsonl", "output_dir"):
            if name not in self.files:
                self.files[name] = open(self.run / f"{name}.jsonl", "a", encoding="utf-8", buffering=1)
            self.files[name].write(json.dumps(row) + "\n")
            for logger in self.loggers:
                if kind := KINDS[name]:
                    logger.log(kind, row)

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        for logger in self.loggers:
            logger.close()


def finite(value: Any) -> Any:
    """The value with None for every number in it that is not finite."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_after(path: Path, done_steps: int) -> None:
    """Take away the rows after `done_steps` that a killed run wrote past its checkpoint."""
    if path.is_file():
        rows = [row for row in read_metrics(path) if row["step"] <= done_steps] if done_steps else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole rows; a last line cut short by a kill is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def peak_memory_gb(on_gpu: int) -> float:
    """Peak in 10^9 bytes. on_gpu: bytes allocated there at most; 0 on a CPU, for what this process had resident."""
    return round((on_gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9, 3)
