"""What every rank runs for test_gradients.py, in place of training: `python gradients.py RUN/config.yaml [...]`.

Of each run some steps pass through the worker's own train_step with a learning rate of 0. What they yield goes to
RUN/gradients.safetensors, under "0/", "1/", ... for the steps in turn:

    loss, loss_sequence, loss_token     summed over ranks
    grad_norm                           before clipping, as DeepSpeed measured it
    NAME                                the whole gradient of that parameter, as the optimizer is about to read it
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file

from longalign.data.plan import Pack, Plan, read_data
from longalign.model.rope import restore_inv_freq
from longalign.schema import Config
from longalign.train import worker
from longalign.train.engine import build_engine

FILE = "gradients.safetensors"
SCALARS = ("loss", "loss_sequence", "loss_token", "grad_norm")


def checked_steps(config: Config) -> list[list[Pack]]:
    """The first step of a run's plan, the last (often a short one), and one of packs as no plan holds them.

    The odd step is the first with the sample that has no target put before its first pack, and once more in a pack
    of its own: neither may count as a sequence, a pack or a target.
    """
    dataset, data = read_data(config.data_dir)
    plan = Plan(Path(config.output_dir or "") / "plan", data)
    without = dataset["n_target"][:].index(0)
    head, *rest = plan.step(1)
    joined = head._replace(sample_ids=[without, *head.sample_ids], tokens=head.tokens + 1)
    alone = Pack([without], tokens=1, n_sequences=0, n_target=0, cost=1.0)
    return [plan.step(1), plan.step(plan.n_steps), [joined, *rest, alone]]


def keep_as_on_gpus(activations: Any) -> None:
    """Outputs of matmuls in more layers on one rank than on the next, and every third micro-step, on all, everything."""
    layers, micro_steps, policy = len(activations.layers), itertools.count(), activations.before
    if activations.policy != "budget":
        return

    def before(tokens: int) -> None:
        policy(tokens)
        whole = next(micro_steps) % 3 == 2
        activations.with_matmuls = dist.get_rank() % (layers + 1)
        for layer in activations.layers:
            layer.gradient_checkpointing = not whole

    activations.before = before


def measure(config: Config) -> None:
    """Write RUN/gradients.safetensors. Gradients are read where they are whole: behind the step's last backward."""
    dataset, _ = read_data(config.data_dir)
    engine = build_engine(config, dist.get_world_size())
    keep_as_on_gpus(engine.activations)
    restore_inv_freq(engine.module)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0  # so that every step starts from the same weights
    found: dict[str, torch.Tensor] = {}
    update = engine.step

    def look_and_update() -> None:
        if engine.is_gradient_accumulation_boundary():
            for name, parameter in engine.module.model.named_parameters():
                gradient: Any = safe_get_full_grad(parameter)  # a collective from ZeRO-1 on: every rank calls it
                found[f"{number}/{name}"] = gradient.clone()
                assert parameter.dtype != torch.bfloat16 or parameter.grad is None, "held twice, in bf16 and in fp32"
        update()

    engine.step = look_and_update
    for number, packs in enumerate(checked_steps(config)):
        losses = worker.train_step(engine, dataset, packs, config)
        dist.all_reduce(losses)
        values = [*losses, torch.tensor(float(engine.get_global_grad_norm()))]
        found |= {f"{number}/{name}": value.clone() for name, value in zip(SCALARS, values, strict=True)}
    if dist.get_rank() == 0:
        save_file(found, Path(config.output_dir or "") / FILE)
    engine.destroy()


if __name__ == "__main__":
    worker.train = measure  # what main() calls for each run, with the processes set up
    sys.exit(worker.main(sys.argv[1:]))
