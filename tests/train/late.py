"""The worker, run by every rank for test_late_faults.py, with the fault that its first argument names:

evaluation  rank 1 is killed in the evaluation after the last step, if the run is called "run"
export      the export takes half a minute
step        any training step is an error
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch.distributed as dist

from longalign.train import worker
from longalign.train.evaluation import Evaluation

evaluate = Evaluation.evaluate


def kill(evaluation: Evaluation, step: int) -> None:
    if evaluation.journal.run.name != "run":
        evaluate(evaluation, step)
        return
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)


def refuse(*_: Any) -> None:
    raise AssertionError("a step is trained again")


if __name__ == "__main__":
    match sys.argv[1]:
        case "evaluation":
            Evaluation.evaluate = kill  # type: ignore[method-assign]
        case "export":
            worker.train_step = refuse
            worker.export = lambda *_: time.sleep(30)
        case "step":
            worker.train_step = refuse
    sys.exit(worker.main(sys.argv[2:]))
