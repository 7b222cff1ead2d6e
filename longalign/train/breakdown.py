"""Losses by source and by length: which groups a sample belongs to, and what each of its targets weighs in them.

The loss of a group is that of loss_sequence over its sequences alone: with M_g sequences of group g in the step, a
target of sequence i weighs 1 / (N_i M_g). Like the step's own weights these come from the plan, so the losses of all
groups are more columns of the one product with the token losses, and more numbers in the one sum over ranks.
"""

from __future__ import annotations

import numpy as np
import torch
from datasets import Dataset

from longalign.data.batch import Batch
from longalign.data.plan import Pack, read_columns

EDGES = (1024, 4096, 16384, 65536)  # tokens of a sample, at which the next bucket begins
BUCKETS = ("<1k", "1k-4k", "4k-16k", "16k-64k", ">=64k")


class Breakdown:
    """The groups of every sample of a tokenised dataset: its source and its length bucket."""

    def __init__(self, dataset: Dataset):
        columns = read_columns(dataset)
        self.sources = columns.sources
        bucket = len(self.sources) + np.digitize(columns.length, EDGES)
        self.groups = np.stack([columns.source, bucket], axis=1).astype(np.int16)  # [n, 2]
        self.has_target = columns.n_target > 0

    def counts(self, packs: list[Pack]) -> torch.Tensor:
        """How many sequences with a target the packs hold of each group, int64 [G]: sources, then buckets."""
        ids = np.array([sample for pack in packs for sample in pack.sample_ids])
        groups = self.groups[ids[self.has_target[ids]]].ravel()
        return torch.from_numpy(np.bincount(groups, minlength=len(self.sources) + len(BUCKETS)))

    def weights(self, batch: Batch, sample_ids: list[int], counts: torch.Tensor) -> torch.Tensor:
        """float32 [N, G]: what each target of the batch weighs in each group's loss; 0 in all but two."""
        groups_S2 = torch.from_numpy(self.groups[sample_ids].astype(np.int64))
        member_SG = torch.zeros(len(sample_ids), len(counts), dtype=torch.float64).scatter_(1, groups_S2, 1.0)
        weights_SG = member_SG / batch.n_target.clamp(min=1)[:, None] / counts.clamp(min=1)
        return weights_SG.float()[batch.target_sample]

    def rows(self, losses: list[float], counts: torch.Tensor) -> dict[str, dict[str, float]]:
        """The two columns of a row of metrics, without the groups that have no sequence. losses: one a group."""
        found = [loss if count else None for loss, count in zip(losses, counts.tolist(), strict=True)]
        named = lambda names, values: {n: v for n, v in zip(names, values, strict=True) if v is not None}
        n = len(self.sources)
        return {"loss_by_source": named(self.sources, found[:n]), "loss_by_length": named(BUCKETS, found[n:])}
