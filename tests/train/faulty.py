"""The worker, run by every rank for test_bad_steps.py and test_hang.py, with faults on rank 1 by the run folder's name:

NAME-nan     at step 2 rank 1's loss is infinite, with a finite gradient; at step 4 its gradient is NaN, with a finite loss
NAME-left    nothing is wrong, but torch's own optimizer is kept from updating at steps 2 and 4
NAME-always  from step 3 on rank 1's loss is infinite
NAME-hang    at step 4 rank 1 sleeps for ever, if this is the run's first start
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longalign.model.loss import WeightedLoss
from longalign.schema import Config
from longalign.train import worker
from longalign.train.trace import Trace

train, train_step, forward = worker.train, worker.train_step, WeightedLoss.forward
now: dict[str, Any] = {}  # the fault of the run, its step, and whether a micro-step of it was run


def faulty_train(config: Config) -> None:
    now.update(fault=Path(config.output_dir or "").name.partition("-")[2], resumed=config.resume == "auto")
    train(config)


def faulty_step(engine: Any, *args: Any) -> torch.Tensor:
    trace = next(arg for arg in args if isinstance(arg, Trace))
    now.update(step=trace.step, micro=0)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    update = inner.step
    if now["fault"] == "left" and trace.step in (2, 4):
        inner.step = lambda *_: None
    shares = train_step(engine, *args)
    inner.step = update
    return shares


def faulty_forward(model: WeightedLoss, batch: Any, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss, shares = forward(model, batch, weights)
    now["micro"] += 1
    if dist.get_rank() != 1 or now["micro"] != 1:
        return loss, shares
    match now:
        case {"fault": "nan", "step": 2} | {"fault": "always", "step": 3 | 4 | 5 | 6}:
            return loss + torch.inf, shares + torch.inf
        case {"fault": "nan", "step": 4}:
            loss.register_hook(lambda gradient: gradient * torch.nan)
        case {"fault": "hang", "step": 4, "resumed": False}:
            sleep_for_ever()
    return loss, shares


def sleep_for_ever() -> None:
    while True:
        time.sleep(1)


if __name__ == "__main__":
    worker.train, worker.train_step = faulty_train, faulty_step
    WeightedLoss.forward = faulty_forward  # type: ignore[method-assign]
    sys.exit(worker.main(sys.argv[1:]))
