"""Seconds and bytes of a pack's forward and backward pass, from the model's shape and the GPU's rates.

    matrices      FLOPs / rate; with layers that compute theirs again, a third more for those layers
    attention     FLOPs forward and backward / their rates, which fall for short documents
    the rest      norms, rotations, activations, sums: bytes / memory bandwidth
    exchange      with sequence parallelism: bytes sent / the link's rate

Which layers compute what again is decided as model/activations.py does, from the memory that weights, gradients and
optimizer states leave.
"""

from __future__ import annotations

from math import lcm
from typing import Any, NamedTuple

import numpy as np

from longalign.forecast.gpus import Gpu
from longalign.model.activations import LEAST_SLICE, MARGIN, Policy
from longalign.model.cost import cost_of
from longalign.model.offload import TILE, TILE_FROM

OTHER_BYTES = 160  # moved per token, layer and hidden unit by all that is no matrix product and no attention, in bf16
OVERHEAD = 0.02  # seconds of a pass beyond that: the loss, copies
LAUNCHES = 0.0042  # seconds a layer in which a host launches its kernels, forward and backward: no pass is faster


class Bytes(NamedTuple):
    """Of activations per token, bf16."""

    inputs: float  # of all layers
    attention: float  # outputs, of all layers
    matmuls: float  # outputs, of one layer
    passing: float  # while one layer is computed
    tiled: float  # the same, if its MLP runs in tiles
    whole: float  # if everything is kept

    @staticmethod
    def of(shape: dict[str, int]) -> Bytes:
        h, q, kv = shape["hidden"], shape["heads"] * shape["head_dim"], 2 * shape["kv_heads"] * shape["head_dim"]
        m, layers = shape["intermediate"], shape["layers"]
        return Bytes(
            inputs=layers * 2 * h,
            attention=layers * (2 * q + 4 * shape["heads"]),
            matmuls=1.15 * 2 * (q + kv + h + 2 * m),
            passing=2 * (5 * m + 4 * h),
            tiled=2 * 6 * h,
            whole=1.2 * layers * 2 * (4 * h + 2 * q + kv + 3 * m),
        )


class Pass(NamedTuple):
    """Forward and backward of one pack on one GPU."""

    seconds: float
    peak: float  # bytes, with what stands between passes
    kept: str
    host: float = 0.0  # bytes of host memory for activations


def predict(documents: Any, shape: dict[str, int], gpu: Gpu, *how: Any, **more: Any) -> Pass | None:
    """As estimate, which takes the same; None if it does not fit."""
    found = estimate(documents, shape, gpu, *how, **more)
    return found if found.peak <= gpu.memory * (1 - MARGIN) else None


def estimate(
    documents: Any,
    shape: dict[str, int],
    gpu: Gpu,
    policy: Policy,
    fixed: float,
    host_room: float = np.inf,
    sequence_parallel: int = 1,
    slices: bool = True,
) -> Pass:
    """Of documents (lengths in tokens) in one pack, on a GPU that holds it or one that would have to be larger.

    fixed: bytes of weights, gradients and states on the GPU. host_room: bytes of host memory for activations.
    sequence_parallel: GPUs that run the pack together, each an equal share of its tokens and of its attention.
    slices: whether the pack may run in slices. Training cuts none where other ranks have packs of their own, and would
    wait for the one that has most.
    """
    lengths = np.asarray(documents, dtype=np.float64)
    tokens, size, layers = float(lengths.sum()) / sequence_parallel, Bytes.of(shape), shape["layers"]  # of one GPU
    sent = _sent(shape, sequence_parallel) if sequence_parallel > 1 else 0  # stands before and behind the exchange
    free = gpu.memory * (1 - MARGIN) - fixed
    room = free - tokens * sent
    limit = free / (size.whole + sent)  # tokens of which everything is kept
    if slices and policy == "budget" and LEAST_SLICE <= limit < tokens and len(lengths) > 1:
        return _in_slices(lengths, limit, shape, gpu, fixed, host_room, sequence_parallel)
    again, attention_again, host = 1.0, 0.0, 0.0  # shares of layers that compute matrices and attention again
    on_host = tokens * (size.inputs + size.attention) <= host_room
    passing = tokens * size.passing if tokens < TILE_FROM else tokens * size.tiled + TILE * size.passing
    two_layers = 2 * tokens * (size.inputs + size.attention) / layers  # on their way from and to the host
    selective = tokens * (size.inputs + size.attention + size.passing)
    if policy == "none" or (policy == "budget" and tokens <= limit):
        again, peak, kept = 0.0, tokens * size.whole, "everything"
    elif policy == "budget":
        on_host = on_host and selective > room
        base = tokens * size.passing + two_layers if on_host else selective
        host = tokens * (size.inputs + size.attention) * on_host
        whole_layers = int(np.clip((room - base) / (tokens * size.matmuls), 0, layers))
        again, peak = 1 - whole_layers / layers, base + whole_layers * tokens * size.matmuls
        kept = f"attention{' in host memory' * on_host}, matmuls in {whole_layers} of {layers} layers"
    elif policy == "selective":
        peak, kept = selective, policy
    elif policy == "offload":
        attention_again = 1 - float(np.clip((host_room / tokens - size.inputs) / size.attention, 0, 1))
        stays = max(0.0, tokens * size.inputs - host_room)  # layer inputs for which the host has no room
        peak, kept = passing + two_layers + stays, policy
        host = min(host_room, tokens * (size.inputs + size.attention))
    else:
        attention_again, peak, kept = 1.0, tokens * (size.inputs + size.passing), policy
    cost = cost_of(shape)
    forward, backward = np.array([gpu.attention(length) for length in lengths]).T
    attention = cost.quadratic * lengths**2 / 3 / sequence_parallel
    seconds = cost.linear * tokens * (1 + again * _again(shape) / 3) / gpu.linear
    seconds += float((attention * (1 + attention_again) / forward + 2 * attention / backward).sum())
    seconds += tokens * layers * shape["hidden"] * OTHER_BYTES * (1 + again / 3) / gpu.bandwidth
    passes = 2 if kept == "everything" else 3  # forward, backward, and forward again
    to_others = layers * sent * (sequence_parallel - 1) / sequence_parallel
    seconds += passes * tokens * to_others / gpu.link
    return Pass(max(seconds + OVERHEAD, layers * LAUNCHES), fixed + tokens * sent + peak, kept, host)


def _in_slices(
    lengths: np.ndarray,
    limit: float,
    shape: dict[str, int],
    gpu: Gpu,
    fixed: float,
    host_room: float,
    sequence_parallel: int,
) -> Pass:
    """As data/batch.cut cuts a pack."""
    slices: list[list[float]] = [[]]
    for length in lengths.tolist():
        if slices[-1] and sum(slices[-1]) + length > limit * sequence_parallel:
            slices.append([])
        slices[-1].append(length)
    found = [estimate(piece, shape, gpu, "budget", fixed, host_room, sequence_parallel) for piece in slices]
    kept = f"{max(found, key=lambda one: one.seconds).kept}, {len(found)} slices"
    peak, host = (max(getattr(one, key) for one in found) for key in ("peak", "host"))
    return Pass(sum(one.seconds for one in found), peak, kept, host)


def _sent(shape: dict[str, int], ranks: int) -> int:
    """Bytes of a token's q, k, v and attention output, of one layer, bf16: what ranks exchange (model/ulysses.py)."""
    return 2 * (2 * shape["heads"] + 2 * lcm(shape["kv_heads"], ranks)) * shape["head_dim"]


def _again(shape: dict[str, int]) -> float:
    """The share of a layer's weights whose product is computed again: all but down_proj, whose output nobody needs."""
    q, kv, h, m = (
        shape["heads"] * shape["head_dim"],
        shape["kv_heads"] * shape["head_dim"],
        shape["hidden"],
        shape["intermediate"],
    )
    return 1 - h * m / (h * (2 * q + 2 * kv) + 3 * h * m)
