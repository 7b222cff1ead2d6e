"""What training must remember of weights and optimizer, apart from how DeepSpeed lays it out.

Every weight has a float32 master and AdamW's two moments. ZeRO flattens and shares them out, each stage in its own way;
here they are pieces of named parameters, so that a run goes on with other ranks or another stage:

    ZeRO 0     whole parameters, the same on every rank (float32 only)
    ZeRO 1, 2  parameters of a group in a row, cut into equal parts, one a rank
    ZeRO 3     every parameter cut into equal parts, one a rank, the last one padded
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

KINDS = ("master", "exp_avg", "exp_avg_sq")  # of each element, in this order


class Piece(NamedTuple):
    """Elements [start, stop) of the flattened parameter `name`, which this rank holds at `at` of the tensor `flat`."""

    name: str
    start: int
    stop: int
    flat: torch.Tensor  # float32; the optimizer's moments have the same shape
    at: int


def pieces(engine: Any) -> Iterator[Piece]:
    """Of what this rank updates; under ZeRO 0 that is everything."""
    zero, rank = engine.optimizer, dist.get_rank()
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):
            group, at, size = zero.grad_position[zero.get_param_id(parameter)]
            start = min(rank * size, parameter.ds_numel)
            stop = min(start + size, parameter.ds_numel)
            flat = zero.fp32_partitioned_groups_flat[group]
        elif hasattr(parameter, "_hp_mapping"):
            if (mapping := parameter._hp_mapping) is None:  # other ranks' alone
                continue
            start, at = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
            stop = start + mapping.lp_fragment_address.numel
            # Stage 1 in bfloat16 is another class than the rest, with other names; both leave one tensor to a group.
            flat = _adam(engine).param_groups[mapping.param_group_index]["params"][0]
        else:
            start, stop, flat, at = 0, parameter.numel(), parameter, 0
        if stop > start:
            yield Piece(name, start, stop, flat, at)


def owned(engine: Any) -> list[Piece]:
    """Pieces that this rank saves: all ranks' together are every element once."""
    mine = list(pieces(engine))
    if engine.zero_optimization_stage() == 0:
        return mine[dist.get_rank() :: dist.get_world_size()]
    return mine


def tensors(engine: Any, piece: Piece) -> list[torch.Tensor]:
    """Views of the piece's master and moments, float32 [stop - start] each."""
    moments = _adam(engine).state[piece.flat]
    kinds = (piece.flat, *(moments[kind] for kind in KINDS[1:]))
    return [tensor.detach().view(-1).narrow(0, piece.at, piece.stop - piece.start) for tensor in kinds]


def updates(engine: Any) -> int:
    """How many updates the optimizer has made, which its bias correction depends on."""
    made = {int(state["step"]) for state in _adam(engine).state.values() if "step" in state}
    assert len(made) <= 1, "all weights are updated together"
    return made.pop() if made else 0


def _adam(engine: Any) -> Any:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def make_moments(engine: Any) -> None:
    """Give every master moments of zero, as before the first update."""
    for flat in {id(piece.flat): piece.flat for piece in pieces(engine)}.values():
        _adam(engine).state[flat] = {kind: torch.zeros_like(flat, requires_grad=False) for kind in KINDS[1:]}
    set_updates(engine, 0)


def set_updates(engine: Any, made: int) -> None:
    """Have the optimizer count on from so many updates."""
    adam = _adam(engine)
    for flat, held in adam.state.items():
        if isinstance(adam, torch.optim.AdamW):
            place = flat.device if adam.defaults.get("fused") or adam.defaults.get("capturable") else "cpu"
            held["step"] = torch.tensor(float(made), device=place)
        else:  # DeepSpeedCPUAdam
            held["step"] = made


def refresh(engine: Any) -> None:
    """Make the model's weights of the masters, after these have been written. Called by every rank."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        whole = zero.persistent_parameters  # on every rank
        if whole:
            whole[0].partition(whole)
        for master, low in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
            low.data.copy_(master.data)
        for low, parameters in zip(zero.fp16_partitioned_groups_flat, zero.fp16_partitioned_groups, strict=True):
            for parameter, values in zip(parameters, zero.unflatten(low, parameters), strict=True):
                parameter.data = values.data
        if whole:
            whole[0].all_gather(whole)
