"""The micro-steps of one rank: its packs, concatenated, and what their targets weigh."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from datasets import Dataset

from longalign.data.batch import Batch
from longalign.data.packing import deal
from longalign.data.plan import Pack
from longalign.model.loss import StepTotals, micro_batch
from longalign.schema import Config
from longalign.train.breakdown import Breakdown


class MicroStep(NamedTuple):
    batch: Batch
    weights: torch.Tensor  # float32 [N, 3 + G], see WeightedLoss; 0 on a rank that has no pack left
    is_last: bool


def micro_steps(
    dataset: Dataset, packs: list[Pack], config: Config, device: torch.device, breakdown: Breakdown | None
) -> Iterator[MicroStep]:
    """This rank's micro-steps of a step of `packs`: as many as every other rank has, since all call the collectives.

    G, the number of groups whose losses are measured too, is 0 without a breakdown.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    totals, counts = StepTotals.of(packs), breakdown.counts(packs) if breakdown else torch.empty(0)
    dealt = deal([p.cost for p in packs], ranks, config.cluster.packs_per_micro_step)
    for number, of_ranks in enumerate(dealt, start=1):
        mine = [packs[p] for p in of_ranks[rank]]
        some = mine or [min(packs, key=lambda p: p.tokens)]  # a rank without a pack runs the smallest with weight 0
        batch, weights = micro_batch(dataset, some, config.strategy.average, totals)
        if breakdown:
            ids = [sample for pack in some for sample in pack.sample_ids]
            weights = torch.cat([weights, breakdown.weights(batch, ids, counts)], dim=1)
        yield MicroStep(batch.to(device), weights.to(device) * bool(mine), number == len(dealt))
