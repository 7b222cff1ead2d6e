"""What is measured: packs of random tokens, named by their documents.

1x65536    one document of 65,536 tokens
64x1024    64 documents of 1,024
mix        documents of the paper's length mix, drawn from the seed until the pack is full
"""

from __future__ import annotations

import numpy as np
import torch

from longalign.data.batch import Batch, concatenate
from longalign.data.template import IGNORE
from longalign.errors import UserError


def paper_mix(count: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths as the paper describes them: 15 of 17 short, around 800 tokens; the others evenly over 8k to 64k."""
    is_long = rng.random(count) < 10_000 / 85_000
    short = np.clip(rng.lognormal(np.log(800), 1.0, count), 16, 8192)
    return np.where(is_long, rng.integers(8192, 65_537, count), short).astype(np.int64)


def lengths(name: str, max_length: int, rng: np.random.Generator) -> list[int]:
    """Raises UserError for a name that is none."""
    if name == "mix":
        drawn, total = [], 0
        for length in paper_mix(10_000, rng).tolist():
            if total + length <= max_length:
                drawn.append(length)
                total += length
        return drawn
    count, times, length = name.partition("x")
    if not (times and count.isdigit() and length.isdigit() and int(count) and int(length) > 1):
        raise UserError(f"bench.packs: {name!r} is no pack; write DOCUMENTSxTOKENS, as in 64x1024, or mix")
    return [int(length)] * int(count)


def make_batch(documents: list[int], vocab: int, targets: float, rng: np.random.Generator) -> Batch:
    """Random tokens; the last `targets` share of every document, one token at least, is learned."""
    rows, labels = [], []
    for length in documents:
        ids = rng.integers(0, vocab, length)
        row = ids.copy()
        row[: min(length - 1, max(1, round(length * (1 - targets))))] = IGNORE
        rows.append(ids)
        labels.append(row)
    return concatenate(rows, labels)


def sequence_weights(batch: Batch) -> torch.Tensor:
    """Weights of the sequence average over the batch, float32 [N, 1]."""
    return (1.0 / (batch.n_target[batch.target_sample] * len(batch.n_target)))[:, None].float()
