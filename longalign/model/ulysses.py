"""Sequence parallelism: the N ranks of a group run one pack together (DeepSpeed Ulysses, arXiv 2309.14509).

Each rank holds a run of the pack's tokens and computes everything but attention on them alone. For attention ranks
trade tokens for heads, so that each of them sees whole documents with a share of the heads, and then trade back:

    q [t, H, D]   k, v [t, K, D]     my tokens, all heads
    gather_sequence                  k and v are copied K -> K' = lcm(K, N) heads, so that N ranks can share them
    q [T, H/N, D]  k, v [T, K'/N, D] all tokens, my heads
    attention                        packed, by the bounds of the whole pack
    scatter_sequence                 [T, H/N, D] -> [t, H, D]

Shapes: T tokens of the pack, a multiple of N; t = T / N of one rank, H query heads (N divides H), K key-value heads (K
divides H), D head dimension. The exchange is DeepSpeed's operator, whose gradient is the exchange back.
"""

from __future__ import annotations

from math import lcm

import torch
import torch.distributed as dist

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_group(degree: int) -> dist.ProcessGroup | None:
    """The group of `degree` neighbouring ranks that this rank shares its packs with; None if it shares with nobody."""
    if degree == 1:
        return None
    from deepspeed.sequence.layer import register_all_to_all_group

    group, _ = dist.new_subgroups(degree)
    register_all_to_all_group(group)
    return group


def gather_sequence(q_tHD: torch.Tensor, k_tKD: torch.Tensor, v_tKD: torch.Tensor, group: dist.ProcessGroup) -> Triple:
    """All heads of my tokens -> my heads of all tokens."""
    ranks, kv_heads = dist.get_world_size(group), k_tKD.shape[1]
    if copies := lcm(kv_heads, ranks) // kv_heads - 1:
        # Query head h reads key-value head h // (H / K); of the copies it reads h // (H / K'), which is one of that.
        k_tKD, v_tKD = (x.repeat_interleave(1 + copies, dim=1) for x in (k_tKD, v_tKD))
    for_ranks = [x.unflatten(1, (ranks, -1)).transpose(0, 1) for x in (q_tHD, k_tKD, v_tKD)]  # each [N, t, heads, D]
    whole = _exchange(torch.cat(for_ranks, dim=2), group).flatten(0, 1)  # one exchange for all three
    q, k, v = whole.split([x.shape[2] for x in for_ranks], dim=1)
    return q, k, v


def scatter_sequence(out_ThD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """My heads of all tokens -> all heads of my tokens."""
    of_ranks = _exchange(out_ThD.unflatten(0, (dist.get_world_size(group), -1)), group)  # [N, t, h, D]
    return of_ranks.transpose(0, 1).flatten(1, 2)


def _exchange(for_ranks: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[N, ...], place r for rank r -> [N, ...], place r from rank r."""
    from deepspeed.sequence.layer import _dim_zero_all_to_all

    return _dim_zero_all_to_all(group, for_ranks)
