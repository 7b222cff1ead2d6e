"""The micro-steps of one rank: its packs, concatenated, and what their targets weigh.

With cluster.sequence_parallel=N packs are dealt to groups of N neighbouring ranks, and each runs its part of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from datasets import Dataset

from longalign.data.batch import Batch, cut, share
from longalign.data.packing import deal
from longalign.data.plan import Pack
from longalign.model.loss import StepTotals, micro_batch
from longalign.schema import Config
from longalign.train.breakdown import Breakdown


class MicroStep(NamedTuple):
    batch: Batch
    weights: torch.Tensor  # float32 [N, 3 + G], see WeightedLoss; 0 on a rank that has no pack left
    is_last: bool
    sample_ids: list[int]  # of its packs, or of those that its slice is from


def micro_steps(
    dataset: Dataset,
    packs: list[Pack],
    config: Config,
    device: torch.device,
    breakdown: Breakdown | None,
    slice_tokens: int | None = None,
) -> Iterator[MicroStep]:
    """This rank's micro-steps of a step of `packs`: as many as every other rank has, since all call the collectives.

    G, the number of groups whose losses are measured too, is 0 without a breakdown. With slice_tokens the documents of
    a micro-step run in slices of so many tokens of each rank, which may need no recomputation.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    together = config.cluster.sequence_parallel if dist.is_initialized() else 1
    group, place = divmod(rank, together)
    totals, counts = StepTotals.of(packs), breakdown.counts(packs) if breakdown else torch.empty(0)
    dealt = deal([p.cost for p in packs], ranks // together, config.cluster.packs_per_micro_step)
    for number, of_groups in enumerate(dealt, start=1):
        mine = [packs[p] for p in of_groups[group]]
        some = mine or [min(packs, key=lambda p: p.tokens)]  # a group without one runs the smallest with weight 0
        batch, weights = micro_batch(dataset, some, config.strategy.average, totals)
        ids = [sample for pack in some for sample in pack.sample_ids]
        if breakdown:
            weights = torch.cat([weights, breakdown.weights(batch, ids, counts)], dim=1)
        weights = weights * bool(mine)
        slices = [(batch, weights)]
        if slice_tokens:  # the same number on every rank
            slices = cut(batch, weights, slice_tokens * together)
            slices += [_idle(slices)] * (_most(len(slices), device) - len(slices))
        for count, whole in enumerate(slices, start=1):
            piece, its_weights = share(*whole, place, together)
            is_last = number == len(dealt) and count == len(slices)
            yield MicroStep(piece.to(device), its_weights.to(device), is_last, ids)


def _most(count: int, device: torch.device) -> int:
    """The largest count of any rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return count
    largest = torch.tensor(count, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def _idle(slices: list[tuple[Batch, torch.Tensor]]) -> tuple[Batch, torch.Tensor]:
    """The shortest slice with weight 0, for a rank that has fewer than others."""
    batch, weights = min(slices, key=lambda piece: piece[0].input_ids.shape[1])
    return batch, torch.zeros_like(weights)
