"""Attention over a pack: every document attends to itself alone, without a mask of size T x T.

One function, two backends. It is registered with transformers under the name "longalign", so that plain models
call it; the pack's boundaries travel as keyword arguments through the model's forward.

Shapes: T tokens of the pack, H query heads, K key-value heads (K divides H), D head dimension.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from longalign.errors import UserError

NAME = "longalign"
Backend = Literal["varlen", "sdpa"]


def choose_backend(wanted: str, device: str) -> tuple[Backend, str]:
    """The backend for `model.attention=wanted` and why. Raises UserError if it cannot run."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401

        available = device == "cuda"
        why_not = "it needs a CUDA device"
    except ImportError:
        available, why_not = False, f"torch {torch.__version__} has none; it came with 2.10"
    if wanted == "varlen" and not available:
        raise UserError(f"model.attention=varlen cannot run here: {why_not}; use model.attention=sdpa")
    if wanted == "varlen" or (wanted == "auto" and available):
        return "varlen", "torch's variable-length flash attention, on CUDA"
    return "sdpa", "scaled_dot_product_attention per document, runs anywhere"


def packed_attention(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
    backend: Backend,
) -> torch.Tensor:
    """Causal attention within each document. cu_seqlens: int32 [documents + 1], from 0 to T. Returns [T, H, D]."""
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        groups = q_THD.shape[1] // k_TKD.shape[1]
        if groups > 1:  # torch 2.11 has no grouped-query argument
            k_TKD, v_TKD = (x.repeat_interleave(groups, dim=1) for x in (k_TKD, v_TKD))
        bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        out_THD = varlen_attn(q_THD, k_TKD, v_TKD, *bounds, scale=scale, window_size=(-1, 0))
        assert isinstance(out_THD, torch.Tensor)
        return out_THD
    out = []
    places = cu_seqlens.tolist()
    for start, stop in pairwise(places):
        q_HSD, k_KSD, v_KSD = (x[start:stop].transpose(0, 1) for x in (q_THD, k_TKD, v_TKD))
        o_HSD = F.scaled_dot_product_attention(
            q_HSD[None], k_KSD[None], v_KSD[None], is_causal=True, scale=scale, enable_gqa=True
        )[0]
        out.append(o_HSD.transpose(0, 1))
    return torch.cat(out)


def install(model: Any, backend: Backend) -> None:
    """Make a transformers model use `packed_attention`. Raises UserError for models it would be wrong for."""
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise UserError(
            f"the model attends within a sliding window of {config.sliding_window} tokens, which packed attention "
            "does not implement; set model.config.sliding_window=null if full attention is meant"
        )

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,  # [1, H, T, D]
        key: torch.Tensor,  # [1, K, T, D]
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, None]:
        if cu_seq_lens_q is None or max_length_q is None:
            raise AssertionError("the model dropped cu_seq_lens_q: documents of a pack would see each other")
        if dropout:
            raise AssertionError("attention dropout is not supported in packs")
        q_THD, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out_THD = packed_attention(q_THD, k_TKD, v_TKD, cu_seq_lens_q, int(max_length_q), scale, backend)
        return out_THD[None], None

    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    model.set_attn_implementation(NAME)
