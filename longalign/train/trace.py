"""What a rank notes of the step it runs: seconds by phase, and the losses of its micro-steps.

data        until a micro-step's tensors are on the device
forward, backward
optimizer   gradient norm, clipping and update
sync        the sum of losses over ranks: waiting for the slowest

On a GPU events are recorded on the stream that computes, and read when the step's sum of losses has waited for all of
it: no phase is synchronised. A phase's seconds are those between the GPU reaching its event and reaching the next one:
reading the next pack while the GPU still works counts as nothing. Communication that computing waits for is part of
the phase that waits: docs/monitoring.md says which.
"""

from __future__ import annotations

import time
from itertools import pairwise

import torch

from longalign.train.heartbeat import Heartbeat

PHASES = ("data", "forward", "backward", "optimizer", "sync")


class Trace:
    """Of one step after the other. Without a heartbeat nobody is told where the rank stands."""

    def __init__(self, device: torch.device, heartbeat: Heartbeat | None = None):
        self.on_gpu, self.heartbeat = device.type == "cuda", heartbeat
        self.begin(0)

    def begin(self, step: int) -> None:
        self.step, self.micro = step, 0
        self.phases: list[str] = []
        self.events: list[torch.cuda.Event] = []  # on a GPU, when each phase began
        self.times: list[float] = []  # else
        self.losses: list[tuple[list[int], torch.Tensor]] = []  # of each micro-step: its sample ids, its loss

    def enter(self, phase: str) -> None:
        """The phase before ends, this one begins."""
        self.phases.append(phase)
        if self.on_gpu:
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()
        else:
            self.times.append(time.perf_counter())
        self.micro += phase == "forward"
        if self.heartbeat:
            self.heartbeat.beat(phase, step=self.step, micro=self.micro)

    def spans(self) -> list[tuple[str, float]]:
        """The phases of the step, which ends here, in order, with their seconds."""
        self.enter("between steps")
        if self.on_gpu:
            torch.cuda.synchronize()  # the step's end has been waited for; this is the last event alone
        lasted = [before.elapsed_time(after) / 1000 for before, after in pairwise(self.events)]
        lasted += [after - before for before, after in pairwise(self.times)]
        return list(zip(self.phases, lasted, strict=False))

    def seconds(self) -> dict[str, float]:
        """Of every phase of the step, which ends here."""
        spent = dict.fromkeys(PHASES, 0.0)
        for phase, seconds in self.spans():
            spent[phase] += seconds
        return {phase: round(seconds, 4) for phase, seconds in spent.items()}
