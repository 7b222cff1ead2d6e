"""What every rank runs for test_checkpoint.py: `saved.py REFERENCES RUN/config.yaml ...`.

Each run trains 2 steps, saves, and trains 2 more. Then another engine loads that checkpoint, saves it again (RUN/again),
trains the same 2 steps and must end with the same bits. Then it loads every checkpoint in REFERENCES, of other layouts,
and saves each again as RUN/from-NAME. It fails where what is saved is not what DeepSpeed's own readers tell.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from longalign.data.plan import Plan, read_data
from longalign.schema import Config
from longalign.train import checkpoint, state, worker
from longalign.train.engine import build_engine
from longalign.train.saver import Saver

REFERENCES = Path(sys.argv[1])


def steps(engine: Any, config: Config, plan: Plan, numbers: range) -> None:
    for number in numbers:
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-2
        worker.train_step(engine, read_data(config.data_dir)[0], plan.step(number), config)


def save(engine: Any, config: Config, folder: Path, step: int) -> Path:
    with Saver(config.model_copy(update={"output_dir": str(folder)}), engine, {}) as saver:
        saver.save(step)
    dist.barrier()
    return folder / "checkpoints" / checkpoint.name(step)


def bits(engine: Any) -> list[torch.Tensor]:
    """All that a rank's optimizer holds, and the weights that the model computes with."""
    states = [tensor.clone() for piece in state.pieces(engine) for tensor in state.tensors(engine, piece)]
    return states + [p.detach().clone() for p in engine.module.parameters()]


def where(engine: Any) -> list[int]:
    return [tensor.data_ptr() for piece in state.pieces(engine) for tensor in state.tensors(engine, piece)]


def told(engine: Any) -> dict[str, torch.Tensor]:
    """What the optimizer holds of every parameter, by DeepSpeed's own readers or, without ZeRO, torch's."""
    found = {}
    if engine.zero_optimization_stage() in (1, 2):  # DeepSpeed does so once, before the second group has any state
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if engine.zero_optimization_stage():
            found[f"master/{name}"] = safe_get_full_fp32_param(parameter)
            for key in state.KINDS[1:]:
                found[f"{key}/{name}"] = safe_get_full_optimizer_state(parameter, key)
        else:
            found[f"master/{name}"] = parameter.detach()
            for key in state.KINDS[1:]:
                found[f"{key}/{name}"] = engine.optimizer.state[parameter][key]
    return {key: value.flatten().clone() for key, value in found.items()}


def measure(config: Config) -> None:
    run = Path(config.output_dir or "")
    plan = Plan(run / "plan", read_data(config.data_dir)[1])
    engine = build_engine(config, dist.get_world_size())
    steps(engine, config, plan, range(1, 3))
    wanted = told(engine)  # a collective
    if dist.get_rank() == 0:
        torch.save(wanted, run / "told.pt")
    at_two, path = bits(engine), save(engine, config, run, 2)
    steps(engine, config, plan, range(3, 5))
    at_four = bits(engine)
    engine.destroy()

    engine = build_engine(config, dist.get_world_size())
    places = where(engine)
    checkpoint.load(engine, path)
    assert where(engine) == places, "masters and moments were made anew: they stood in memory twice"
    assert all(map(torch.equal, bits(engine), at_two)), "not loaded as saved"
    save(engine, config, run / "again", 2)
    steps(engine, config, plan, range(3, 5))
    exact = not config.cluster.offload_optimizer  # DeepSpeed's CPU Adam multiplies its powers of beta step by step
    same = torch.equal if exact else lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-7)
    assert all(map(same, bits(engine), at_four)), "another course after loading"

    for reference in sorted(REFERENCES.glob("*/checkpoints/step-000002")):
        checkpoint.load(engine, reference)
        save(engine, config, run / f"from-{reference.parents[1].name}", 2)
        if config.cluster.zero_stage < 3:  # the weights that the model computes with follow the masters
            masters = told(engine)
            for name, parameter in engine.module.named_parameters():
                assert torch.equal(parameter.detach().flatten(), masters[f"master/{name}"].to(parameter.dtype)), name
    engine.destroy()


if __name__ == "__main__":
    worker.train = measure  # what main() calls for each run
    sys.exit(worker.main(sys.argv[2:]))
