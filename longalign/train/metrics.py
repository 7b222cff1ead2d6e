"""metrics.jsonl, one row per optimizer step, and eval.jsonl, one per evaluation."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any, TextIO

import torch

from longalign.files import write_text


def cut_after(path: Path, done_steps: int) -> None:
    """Take away the rows after `done_steps` that a killed run wrote past its checkpoint."""
    if path.is_file():
        rows = [row for row in read_metrics(path) if row["step"] <= done_steps] if done_steps else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def open_metrics(path: Path, done_steps: int) -> TextIO:
    """Open for appending behind the row of step `done_steps`."""
    cut_after(path, done_steps)
    return open(path, "a", encoding="utf-8", buffering=1)


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


def peak_memory_gb(device: str) -> float:
    """Peak of this process in 10^9 bytes: GPU memory allocated, or resident memory on a CPU."""
    if device == "cuda":
        return round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)
