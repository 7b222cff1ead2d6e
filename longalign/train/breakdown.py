"""Losses by source and by length: which groups a sample belongs to, and what each of its targets weighs in them.

The loss of a group is that of loss_sequence over its sequences alone: with M_g sequences of group g in the step, a
target of sequence i weighs 1 / (N_i M_g). On request it is that of loss_token, too: with N_g targets of group g each of
them weighs 1 / N_g. Like the step's own weights these come from the plan, so the losses of all
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
    """The groups of every sample of a tokenised dataset: its source and its length bucket.

    G columns, or 2G if `per_token`: loss_sequence of every group, then loss_token.
    """

    def __init__(self, dataset: Dataset, per_token: bool = False):
        columns = read_columns(dataset)
        self.sources, self.n_target, self.per_token = columns.sources, columns.n_target, per_token
        bucket = len(self.sources) + np.digitize(columns.length, EDGES)
        self.groups = np.stack([columns.source, bucket], axis=1).astype(np.int16)  # [n, 2]

    @property
    def names(self) -> list[str]:
        """Of the G groups: sources, then buckets."""
        return [*self.sources, *BUCKETS]

    def counts(self, packs: list[Pack]) -> torch.Tensor:
        """How many sequences with a target the packs hold of each group, and then how many targets, int64 [columns]."""
        held = [self.n_target > 0, *([self.n_target] if self.per_token else [])]
        return torch.from_numpy(np.concatenate([self.sums(packs, values) for values in held]))

    def sums(self, packs: list[Pack], values: np.ndarray) -> np.ndarray:
        """The sum over the packs' samples of each group, int64 [G]. values: one for each sample of the dataset."""
        ids = np.array([sample for pack in packs for sample in pack.sample_ids])
        found = np.bincount(self.groups[ids].ravel(), np.repeat(values[ids], 2), len(self.names))
        return found.astype(np.int64)

    def weights(self, batch: Batch, sample_ids: list[int], counts: torch.Tensor) -> torch.Tensor:
        """float32 [N, columns]: what each target of the batch weighs in each group's loss; 0 in all but two groups."""
        groups_S2 = torch.from_numpy(self.groups[sample_ids].astype(np.int64))
        member_SG = torch.zeros(len(sample_ids), len(self.names), dtype=torch.float64).scatter_(1, groups_S2, 1.0)
        of_targets = [member_SG / batch.n_target.clamp(min=1)[:, None], *([member_SG] if self.per_token else [])]
        weights_SC = torch.cat(of_targets, dim=1) / counts.clamp(min=1)
        return weights_SC.float()[batch.target_sample]

    def rows(self, losses: list[float], counts: torch.Tensor) -> dict[str, dict[str, float]]:
        """The two columns of a row of metrics, without the groups that have no sequence. losses: one a group."""
        found = [loss if count else None for loss, count in zip(losses, counts.tolist(), strict=True)]
        named = lambda names, values: {n: v for n, v in zip(names, values, strict=True) if v is not None}
        n = len(self.sources)
        return {"loss_by_source": named(self.sources, found[:n]), "loss_by_length": named(BUCKETS, found[n:])}
