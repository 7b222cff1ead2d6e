"""Attention over a pack: every document attends to itself alone, without a mask of size T x T.

One function, five backends. It is registered with transformers under the name "longalign", so that plain models
call it; the pack's boundaries travel as keyword arguments through the model's forward.

Shapes: T tokens of the pack, H query heads, K key-value heads (K divides H), D head dimension.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from longalign.errors import UserError
from longalign.model import kernels, ulysses
from longalign.model.cost import shape_of
from longalign.model.load import resolve_dtype
from longalign.schema import Config

NAME = "longalign"
Backend = Literal["flash4", "flash3", "flash2", "varlen", "sdpa"]
ABOUT: dict[Backend, str] = {
    "flash4": "flash-attn-4, for Hopper and Blackwell",
    "flash3": "flash-attn-3, for Hopper",
    "flash2": "flash-attn 2",
    "varlen": "torch's variable-length flash attention",
    "sdpa": "scaled_dot_product_attention per document, runs anywhere",
}
MODULES: dict[Backend, tuple[str, ...]] = {
    "flash4": ("flash_attn.cute", "cutlass"),  # flash-attn 2 brings the first, too
    "flash3": ("flash_attn_interface",),
    "flash2": ("flash_attn.flash_attn_interface",),
    "varlen": ("torch.nn.attention.varlen",),
}
# Settings of models that change logits or scores in ways that are not computed here, and what leaves those alone.
OTHER_LOGITS = {
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}


def why_not(
    backend: Backend, device: str, dtype: torch.dtype, head_dim: int, deterministic: bool = False
) -> str | None:
    """What keeps a backend from running here; None if nothing does."""
    if deterministic and device == "cuda" and backend in ("varlen", "sdpa"):
        return "its gradients are added in any order, against deterministic=true"
    if backend == "sdpa":
        return None
    if device != "cuda":
        return "it needs a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, the model in {str(dtype).removeprefix('torch.')}"
    chip = torch.cuda.get_device_capability()
    lowest = (9, 0) if backend in ("flash4", "flash3") else (8, 0)
    if chip < lowest or (backend == "flash3" and chip[0] != 9):
        return f"it does not run on {torch.cuda.get_device_name()} (compute capability {chip[0]}.{chip[1]})"
    if head_dim > (128 if backend == "flash4" else 256):
        return f"its heads have at most {128 if backend == 'flash4' else 256} dimensions, the model's have {head_dim}"
    missing = [name for name in MODULES[backend] if not is_installed(name)]
    return f"{missing[0]} is not installed" if missing else None


def is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # not even what it is part of
        return False


def choose_backend(
    wanted: str, device: str, dtype: torch.dtype, head_dim: int, deterministic: bool = False
) -> tuple[Backend, str]:
    """The backend for `model.attention=wanted` and why; auto is the first that runs. Raises UserError."""
    reasons: list[str] = []
    for backend, about in ABOUT.items():
        if wanted not in ("auto", backend):
            continue
        problem = why_not(backend, device, dtype, head_dim, deterministic)
        if problem is None:
            return backend, about + "".join(f"; no {reason}" for reason in reasons)
        reasons.append(f"{backend}: {problem}")
    other = "model.attention=auto" if wanted != "auto" else "deterministic=false"
    raise UserError(f"model.attention={wanted} cannot run here: {problem}; use {other}")


def backend_of(config: Config, hf: Any, device: str, wanted: str | None = None) -> tuple[Backend, str]:
    """The backend of a run and why; wanted: another than its model.attention. hf: the model's Hugging Face config.

    Raises UserError.
    """
    dtype, head_dim = resolve_dtype(config, device), shape_of(hf)["head_dim"]
    return choose_backend(wanted or config.model.attention, device, dtype, head_dim, config.deterministic)


def packed_attention(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
    backend: Backend,
    deterministic: bool = False,
) -> torch.Tensor:
    """Causal attention within each document. cu_seqlens: int32 [documents + 1], from 0 to T. Returns [T, H, D]."""
    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    if backend == "flash4":
        return kernels.flash4(q_THD, k_TKD, v_TKD, cu_seqlens, max_seqlen, scale, deterministic)[0]
    if backend == "flash3":
        from flash_attn_interface import flash_attn_varlen_func as flash3

        out = flash3(q_THD, k_TKD, v_TKD, *bounds, softmax_scale=scale, causal=True, deterministic=deterministic)
        return out[0] if isinstance(out, tuple) else out
    if backend == "flash2":
        from flash_attn import flash_attn_varlen_func as flash2

        return flash2(q_THD, k_TKD, v_TKD, *bounds, softmax_scale=scale, causal=True, deterministic=deterministic)
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        groups = q_THD.shape[1] // k_TKD.shape[1]
        if groups > 1:  # torch 2.11 has no grouped-query argument
            k_TKD, v_TKD = (x.repeat_interleave(groups, dim=1) for x in (k_TKD, v_TKD))
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


def install(model: Any, backend: Backend, deterministic: bool = False, group: dist.ProcessGroup | None = None) -> None:
    """Make a transformers model use `packed_attention`. Raises UserError for models it would be wrong for.

    group: the ranks that run a pack together, each its own tokens of it (ulysses.py).
    """
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise UserError(
            f"the model attends within a sliding window of {config.sliding_window} tokens, which packed attention "
            "does not implement; set model.config.sliding_window=null if full attention is meant"
        )
    for name, plain in OTHER_LOGITS.items():
        if (value := getattr(config, name, plain)) != plain:
            raise UserError(
                f"{config.model_type} has {name}={value}, which the loss does not compute; models with "
                f"model.config.{name}={json.dumps(plain)} can be trained"
            )

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,  # [1, H, T, D], or T / ranks of a group
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
        q_THD, k_TKD, v_TKD = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # x[0] would copy backward
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if group is not None:
            q_THD, k_TKD, v_TKD = ulysses.gather_sequence(q_THD, k_TKD, v_TKD, group)
        out_THD = packed_attention(q_THD, k_TKD, v_TKD, cu_seq_lens_q, int(max_length_q), scale, backend, deterministic)
        if group is not None:
            out_THD = ulysses.scatter_sequence(out_THD, group)
        return out_THD[None], None

    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    model.set_attn_implementation(NAME)
