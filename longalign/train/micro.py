"""The micro-steps of one rank: its packs, concatenated, and what their targets weigh.

With cluster.sequence_parallel=N packs are dealt to groups of N neighbouring ranks, and each runs its part of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset

from longalign.data.batch import Batch, concatenate, cut, share
from longalign.data.packing import deal
from longalign.data.plan import Pack
from longalign.data.template import IGNORE
from longalign.model.loss import StepTotals, micro_batch
from longalign.schema import Config
from longalign.train.breakdown import Breakdown


class MicroStep(NamedTuple):
    batch: Batch
    weights: torch.Tensor  # float32 [N, 3 + G], see WeightedLoss; 0 on a rank that has no pack left
    is_last: bool
    sample_ids: list[int]  # of its packs, or of those that its slice is from; none if it only keeps up with others


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
        ids = [sample for p in mine for sample in p.sample_ids]
        batch, weights = micro_batch(dataset, mine, config.strategy.average, totals) if mine else idle(len(counts))
        if breakdown and mine:
            weights = torch.cat([weights, breakdown.weights(batch, ids, counts)], dim=1)
        slices = [(batch, weights)]
        if slice_tokens:  # the same number on every rank
            slices = cut(batch, weights, slice_tokens * together)
            slices += [idle(len(counts))] * (_most(len(slices), device) - len(slices))
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


def idle(groups: int) -> tuple[Batch, torch.Tensor]:
    """Two tokens that weigh nothing, for a rank that has nothing to run while others have."""
    return concatenate([np.zeros(2, np.int64)], [np.array([IGNORE, 0])]), torch.zeros(1, 3 + groups)
