"""A SIGTERM whose grace is shorter than a step: the step is given up, and the one before it saved.

Weights and optimizer states change at a step's end alone, so that between its micro-steps they are those of the step
before.
"""

from __future__ import annotations

import signal
import time

import torch
import torch.distributed as dist


class TooLate(Exception):
    """The step in progress would not be finished and saved in time; raised on every rank at the same micro-step."""


class Grace:
    """Ranks ask one another about once a second, and only in steps that are too long for half of grace_s."""

    def __init__(self, grace_s: float, device: torch.device):
        self.least, self.device = grace_s / 2, device  # the other half is for the checkpoint
        self.step_s, self.every, self.count = 0.0, 1, 0
        self.began = time.monotonic()

    def begin(self, last_s: float) -> None:
        """A step begins; the last one took so many seconds, the same number on all ranks (0: it is not known)."""
        self.step_s, self.every = last_s, max(1, int(self.count / max(last_s, 1e-9)))
        self.began, self.count = time.monotonic(), 0

    def check(self, received: int) -> None:
        """Between two micro-steps, by every rank, with the signal it has received or 0. Raises TooLate."""
        self.count += 1
        if self.step_s <= self.least or self.count % self.every:
            return
        left = self.step_s - (time.monotonic() - self.began)
        late = torch.tensor(float(received == signal.SIGTERM and left > self.least), device=self.device)
        dist.all_reduce(late)
        if late:
            raise TooLate
