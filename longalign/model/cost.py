"""Floating-point operations of a sample: what a pack costs, and the yardstick of model FLOP/s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Cost(NamedTuple):
    """FLOPs of forward and backward of a sample of s tokens: linear * s + quadratic * s^2.

    Each weight of a matrix costs 2 FLOPs a token forward and 4 backward. Causal attention over s tokens computes
    half of QK^T and PV: 2 * (2 * s^2 * heads * head_dim) / 2 forward, twice that backward. Embedding look-ups are
    free, and lm_head is left out since it runs on target positions only.
    """

    linear: float
    quadratic: float

    def __call__(self, lengths: Any) -> np.ndarray:
        s = np.asarray(lengths, dtype=np.float64)
        return self.linear * s + self.quadratic * s * s


def shape_of(config: Any) -> dict[str, int]:
    """The numbers of a Hugging Face config that its cost depends on."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocab": config.vocab_size,
    }


def cost_of(shape: dict[str, int]) -> Cost:
    q, kv = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    weights = shape["hidden"] * (2 * q + 2 * kv) + 3 * shape["hidden"] * shape["intermediate"]
    return Cost(linear=6.0 * shape["layers"] * weights, quadratic=6.0 * shape["layers"] * q)


def fit(documents: Sequence[Sequence[int]], seconds: Sequence[float]) -> Cost:
    """Seconds instead of FLOPs: a and b of a*s + b*s^2, summed over a pack's documents, nearest to what packs took.

    The least squares of relative errors. documents: the lengths of each pack's, seconds: of its forward and backward
    pass. Raises ValueError if the packs do not tell both, being too alike.
    """
    if len(seconds) < 2:
        raise ValueError("one pack does not tell two costs")
    lengths = [np.asarray(pack, dtype=np.float64) for pack in documents]
    sums = np.array([[s.sum(), np.square(s).sum()] for s in lengths]) / np.asarray(seconds)[:, None]
    scale = sums.mean(0)  # tokens and their squares are orders of magnitude apart
    solution, _, rank, _ = np.linalg.lstsq(sums / scale, np.ones(len(sums)), rcond=1e-6)
    linear, quadratic = solution / scale
    if rank < 2 or linear <= 0 or quadratic < 0:
        raise ValueError("packs of one long document and packs of many short ones are needed to tell both costs")
    return Cost(float(linear), float(quadratic))


class PackSeconds(NamedTuple):
    """Seconds of a pack, forward and backward: its documents' cost, but at least those of the fastest pack measured,
    since launches take that long."""

    cost: Cost
    least: float

    def of(self, documents: Any) -> float:
        """documents: their lengths."""
        return max(self.least, float(self.cost(documents).sum()))

    @staticmethod
    def fit(documents: Sequence[Any], seconds: Sequence[float]) -> PackSeconds:
        """Of packs measured; those that mostly launch are left out where the others tell. Raises ValueError as fit."""
        least = min(seconds)
        busy = [place for place, lasted in enumerate(seconds) if lasted > 2 * least]
        try:
            cost = fit([documents[place] for place in busy], [seconds[place] for place in busy])
        except ValueError:
            cost = fit(documents, seconds)
        return PackSeconds(cost, least)
