"""Seconds by phase: they add up to the step's, and on a GPU they are the GPU's, not those of queueing work."""

from __future__ import annotations

import time

import pytest
import torch

from longalign.train.trace import PHASES, Trace


def test_phases_add_up() -> None:
    trace = Trace(torch.device("cpu"))
    for step in (1, 2):
        trace.begin(step)
        began = time.perf_counter()
        for phase, seconds in (("data", 0.02), ("forward", 0.05), ("data", 0.01), ("forward", 0.04), ("sync", 0.01)):
            trace.enter(phase)
            time.sleep(seconds)
        spent, whole = trace.seconds(), time.perf_counter() - began
        assert tuple(spent) == PHASES
        assert spent["backward"] == 0
        assert spent["forward"] >= 0.09
        assert spent["data"] >= 0.03
        assert sum(spent.values()) == pytest.approx(whole, abs=2e-3)
        assert (trace.step, trace.micro) == (step, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    """Work is queued in no time; its seconds belong to the phase that queued it, and reading behind it is free."""
    trace, cycles = Trace(torch.device("cuda")), 200_000_000
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    trace.begin(1)
    trace.enter("forward")
    torch.cuda._sleep(cycles)
    trace.enter("data")
    time.sleep(0.01)  # while the GPU works
    trace.enter("backward")
    torch.cuda._sleep(3 * cycles)
    spent = trace.seconds()
    assert spent["forward"] > 0.05
    assert spent["backward"] == pytest.approx(3 * spent["forward"], rel=0.2)
    assert spent["data"] < 0.005
