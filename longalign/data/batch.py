"""Packs of sample ids -> the tensors of one micro-step.

Two samples (5 6 7) and (8 9), the answers being (7) and (9), become

    input_ids        5 6 7 8 9
    position_ids     0 1 2 0 1
    cu_seqlens       0 3 5
    target_rows      1 3         the hidden states that predict them: one place earlier
    target_ids       7 9
    target_sample    0 1         which sample of the batch each target belongs to

There is no padding and no attention mask: attention is block-diagonal by cu_seqlens.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset

from longalign.data.template import IGNORE


@dataclass
class Batch:
    """T tokens, S samples, N targets. What `share` makes of it holds one rank's tokens and targets, and all bounds."""

    input_ids: torch.Tensor  # int64 [1, T]
    position_ids: torch.Tensor  # int64 [1, T]
    cu_seqlens: torch.Tensor  # int32 [S + 1]
    max_seqlen: int
    target_rows: torch.Tensor  # int64 [N], places in T
    target_ids: torch.Tensor  # int64 [N]
    target_sample: torch.Tensor  # int64 [N], places in S
    n_target: torch.Tensor  # int64 [S]

    def to(self, device: torch.device | str) -> Batch:
        moved = copy.copy(self)
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), torch.Tensor):
                setattr(moved, field.name, value.to(device))
        return moved


def cut(batch: Batch, weights_NC: torch.Tensor, limit: int) -> list[tuple[Batch, torch.Tensor]]:
    """The batch in slices of at most `limit` tokens, cut at document borders; a longer document is a slice of its own.

    Documents do not see each other and each target carries its weight, so that the slices' losses and gradients add up
    to the batch's.
    """
    ends = batch.cu_seqlens.tolist()
    cuts = [0]  # documents before which a slice begins
    for document in range(1, len(ends) - 1):
        if ends[document + 1] - ends[cuts[-1]] > limit:
            cuts.append(document)
    slices = []
    for first, last in pairwise([*cuts, len(ends) - 1]):
        start, stop = ends[first], ends[last]
        mine = (batch.target_sample >= first) & (batch.target_sample < last)
        piece = Batch(
            input_ids=batch.input_ids[:, start:stop],
            position_ids=batch.position_ids[:, start:stop],
            cu_seqlens=batch.cu_seqlens[first : last + 1] - start,
            max_seqlen=max(b - a for a, b in pairwise(ends[first : last + 1])),
            target_rows=batch.target_rows[mine] - start,
            target_ids=batch.target_ids[mine],
            target_sample=batch.target_sample[mine] - first,
            n_target=batch.n_target[first:last],
        )
        slices.append((piece, weights_NC[mine]))
    return slices


def share(batch: Batch, weights_NC: torch.Tensor, place: int, ranks: int) -> tuple[Batch, torch.Tensor]:
    """What rank `place` of `ranks` runs of a batch that they run together: an equal run of its tokens.

    The batch is padded to a multiple of `ranks` with a last document that has no target. A target goes to the rank that
    holds the hidden state which predicts it. cu_seqlens and max_seqlen stay those of the whole, since attention sees
    all of it (model/ulysses.py). The batch above on two ranks, with one token of padding:

        rank 0    input_ids 5 6 7    position_ids 0 1 2    target_rows 1    target_ids 7    cu_seqlens 0 3 5 6
        rank 1    input_ids 8 9 0    position_ids 0 1 0    target_rows 0    target_ids 9    cu_seqlens 0 3 5 6
    """
    tokens = batch.input_ids.shape[1]
    padding = -tokens % ranks
    start, stop = (tokens + padding) // ranks * place, (tokens + padding) // ranks * (place + 1)
    mine = (batch.target_rows >= start) & (batch.target_rows < stop)
    more = 1 if padding else 0
    piece = Batch(
        input_ids=F.pad(batch.input_ids, (0, padding))[:, start:stop],
        position_ids=torch.cat([batch.position_ids[0], torch.arange(padding)])[None, start:stop],
        cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens.new_full((more,), tokens + padding)]),
        max_seqlen=max(batch.max_seqlen, padding),
        target_rows=batch.target_rows[mine] - start,
        target_ids=batch.target_ids[mine],
        target_sample=batch.target_sample[mine],
        n_target=F.pad(batch.n_target, (0, more)),
    )
    return piece, weights_NC[mine]


def concatenate(input_ids: list[np.ndarray], labels: list[np.ndarray]) -> Batch:
    """Put samples behind one another. Each labels[i][0] must be -100: nothing before it may predict it."""
    assert all(row[0] == IGNORE for row in labels)
    lengths = [len(row) for row in input_ids]
    flat_labels = np.concatenate(labels)
    places = np.flatnonzero(flat_labels != IGNORE)
    sample_of_token = np.repeat(np.arange(len(lengths)), lengths)
    target_sample = sample_of_token[places]
    as_long = lambda array: torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
    return Batch(
        input_ids=as_long(np.concatenate(input_ids))[None],
        position_ids=as_long(np.concatenate([np.arange(n) for n in lengths]))[None],
        cu_seqlens=torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32),
        max_seqlen=max(lengths),
        target_rows=as_long(places - 1),
        target_ids=as_long(flat_labels[places]),
        target_sample=as_long(target_sample),
        n_target=as_long(np.bincount(target_sample, minlength=len(lengths))),
    )


def load_batch(dataset: Dataset, sample_ids: list[int]) -> Batch:
    """Read samples of a tokenised dataset (its row number is the sample id) and concatenate them."""
    rows = dataset.select_columns(["input_ids", "labels"]).with_format("numpy")[sample_ids]
    return concatenate(list(rows["input_ids"]), list(rows["labels"]))
