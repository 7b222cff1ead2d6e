"""Evaluations of the weights in training (eval_every, eval_tasks): one row of eval.jsonl each, and the run unchanged.

step
loss_sequence, loss_token, loss_by_source, loss_by_length, sequences, targets     of heldout (heldout.py)
TASK: {score, by_..., questions, cut_at_limit, seconds}                           of every other task (answers.py)
seconds                                                                           of the whole evaluation
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from longalign.schema import Config
from longalign.train.answers import Asked
from longalign.train.heldout import HeldOut
from longalign.train.metrics import Journal, read_metrics


class Evaluation:
    """The evaluations of a run, continued behind step `done`."""

    def __init__(self, config: Config, engine: Any, journal: Journal, n_steps: int, done: int):
        assert config.eval_every is not None
        self.engine, self.journal, self.every, self.n_steps = engine, journal, config.eval_every, n_steps
        self.heldout = HeldOut(config) if "heldout" in config.eval_tasks else None
        self.asked = Asked(config, engine)
        path = Path(config.output_dir or "") / "eval.jsonl"
        self.last = max((row["step"] for row in read_metrics(path) if row["step"] <= done), default=0)

    def is_due(self, step: int) -> bool:
        """Every eval_every steps and after the last, once."""
        return step > self.last and (step % self.every == 0 or step == self.n_steps)

    def evaluate(self, step: int) -> None:
        """Write the row for the weights after `step`; called by every rank.

        Dropout is off and random states are restored, so the run goes on as if it had not been looked at.
        """
        began, device = time.monotonic(), self.engine.device
        self.engine.module.eval()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            found = self.heldout.measure(self.engine) if self.heldout else {}
            found |= self.asked.measure(step)
        self.engine.module.train()
        self.engine.empty_partition_cache()  # ZeRO-3 keeps weights that its trace of training would use again
        self.last = step
        self.journal.write("eval", {"step": step, **found, "seconds": round(time.monotonic() - began, 4)})
