"""The float32 master weights and Adam moments of a rank, as fragments of named parameters: the same on every layout.

    ZeRO-0     every rank holds all: parameters and torch's own optimizer state
    ZeRO-1, 2  a rank holds a stretch of all parameters laid end to end; it may begin and end within a parameter
    ZeRO-3     a rank holds its stretch of each parameter

DeepSpeed 0.19.8 is read at `_hp_mapping` (stages 1 and 2, in bfloat16 too) and `grad_position` (stage 3).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from longalign.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("master", *MOMENTS)


class Fragment(NamedTuple):
    name: str  # of a parameter of engine.module
    start: int  # in the flattened parameter
    numel: int
    flat: torch.Tensor  # what the optimizer updates: the parameter or, under ZeRO, a part of many
    offset: int  # of the fragment in `flat`

    @property
    def stop(self) -> int:
        return self.start + self.numel

    def view(self, optimizer: torch.optim.Optimizer, kind: str) -> torch.Tensor:
        """Master weights or a moment, [numel], in place. Usually float32; on the CPU if the optimizer is offloaded."""
        whole = self.flat if kind == "master" else state_of(optimizer, self.flat)[kind]
        return whole.detach().view(-1)[self.offset : self.offset + self.numel]


def state_of(optimizer: torch.optim.Optimizer, flat: torch.Tensor) -> dict[str, Any]:
    """AdamW's state of one tensor; before the first step, what that step would begin with."""
    state: dict[str, Any] = optimizer.state[flat]
    if not state:
        on_cpu = type(optimizer).__name__ == "DeepSpeedCPUAdam"  # it counts with an int, torch with a tensor
        device = flat.device if optimizer.defaults.get("fused") else torch.device("cpu")
        state["step"] = 0 if on_cpu else torch.zeros((), device=device)
        state.update({moment: torch.zeros_like(flat, dtype=torch.float32) for moment in MOMENTS})
    return state


def held(engine: Any) -> list[Fragment]:
    """The fragments that this rank's optimizer updates. Raises UserError if DeepSpeed keeps them on NVMe."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    found = []
    for name, parameter in engine.module.named_parameters():
        if stage == 0:
            found.append(Fragment(name, 0, parameter.numel(), parameter, 0))
        elif stage == 3:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = size * optimizer._get_param_partition_rank(parameter)
            numel = min(size, parameter.ds_numel - start)  # the last stretches of a parameter may be padding
            if numel > 0:
                found.append(Fragment(name, start, numel, optimizer.fp32_partitioned_groups_flat[group], offset))
        elif (mapping := parameter._hp_mapping) is not None:
            flat = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"][0]
            place, mine = mapping.lp_fragment_address, mapping.hp_fragment_address
            found.append(Fragment(name, place.start, place.numel, flat, mine.start))
    if any(f.flat.numel() < f.offset + f.numel for f in found):
        raise UserError("cluster.deepspeed: states offloaded to NVMe cannot be saved; use offload_optimizer=true")
    return found


def share(engine: Any) -> list[Fragment]:
    """The fragments that this rank writes: those it holds, or a like part of them where every rank holds all."""
    mine = held(engine)
    if engine.zero_optimization_stage() > 0:
        return mine
    total, rank, ranks = sum(f.numel for f in mine), dist.get_rank(), dist.get_world_size()
    first, last = total * rank // ranks, total * (rank + 1) // ranks
    cut, before = [], 0
    for f in mine:
        start, stop = max(first - before, 0), min(last - before, f.numel)
        if start < stop:
            cut.append(Fragment(f.name, start, stop - start, f.flat, start))
        before += f.numel
    return cut


def sizes(engine: Any) -> dict[str, int]:
    """How many numbers each parameter has, whatever part of it is on this rank."""
    return {n: int(getattr(p, "ds_numel", p.numel())) for n, p in engine.module.named_parameters()}


def updates(engine: Any) -> int:
    """How many updates the optimizer has made; Adam's bias correction depends on it."""
    counts = {int(state_of(engine.basic_optimizer, f.flat)["step"]) for f in held(engine)}
    assert len(counts) <= 1, f"parameters were updated {sorted(counts)} times"
    return counts.pop() if counts else 0


def set_updates(engine: Any, count: int) -> None:
    for f in held(engine):
        state = state_of(engine.basic_optimizer, f.flat)
        if isinstance(state["step"], torch.Tensor):
            state["step"].fill_(count)
        else:
            state["step"] = count


def refresh(engine: Any) -> None:
    """Make the weights that the model computes with from the master weights, as a step does; by every rank."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:  # small ones, whole on every rank at all times
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
