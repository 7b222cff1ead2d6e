"""The worker as on a slow machine, for test_resume.py: SLOW_STEP seconds more a step, SLOW_WRITE a checkpoint's file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from longalign.train import saver, worker


def step(*given: Any) -> torch.Tensor:
    time.sleep(float(os.environ["SLOW_STEP"]))
    return train_step(*given)


def write(path: Path, numels: dict[str, int], tensors: Iterable[torch.Tensor]) -> dict[str, Any]:
    def slowly() -> Iterator[torch.Tensor]:
        for tensor in tensors:
            time.sleep(float(os.environ["SLOW_WRITE"]) / len(numels))
            yield tensor

    return write_tensors(path, numels, slowly())


if __name__ == "__main__":
    train_step, worker.train_step = worker.train_step, step
    write_tensors, saver.write_tensors = saver.write_tensors, write
    sys.exit(worker.main(sys.argv[1:]))
