"""The worker, run by every rank for test_eval_tasks.py: a run fails if an evaluation leaves a mark on the engine:
on modes, hooks, attention and random state, or whole weights under ZeRO-3."""

from __future__ import annotations

import sys
from typing import Any

import torch

from longalign.train import worker
from longalign.train.evaluation import Evaluation


def state(engine: Any) -> dict[str, Any]:
    modules = list(engine.module.modules())
    return {
        "trainable": [p.requires_grad and not p.is_inference() for p in engine.module.parameters()],
        "training": [module.training for module in modules],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules],
        "attention": engine.module.model.config._attn_implementation,
        "random": torch.get_rng_state().tolist(),
    }


def watched(evaluation: Evaluation, step: int) -> None:
    engine = evaluation.engine
    before, sizes = state(engine), [parameter.numel() for parameter in engine.module.parameters()]
    evaluate(evaluation, step)
    after = state(engine)
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, changed
    if engine.zero_optimization_stage() == 3:
        assert sizes.count(0) > len(sizes) / 2, "the test means to have most weights partitioned"
        assert not any(parameter.numel() for parameter in engine.module.parameters()), "weights are left in one piece"


if __name__ == "__main__":
    evaluate, Evaluation.evaluate = Evaluation.evaluate, watched  # type: ignore[method-assign]
    sys.exit(worker.main(sys.argv[1:]))
