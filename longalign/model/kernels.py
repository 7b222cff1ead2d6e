"""Fused kernels as registered operators, so that selective checkpointing can name what they return.

    longalign::flash4   flash-attn-4's variable-length attention   Hopper and Blackwell
    longalign::rope     Liger's rotary embedding                   any CUDA device

Shapes: T tokens of the pack, H query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

# Models whose rotary embedding turns whole heads in halves, which is what Liger's kernel does.
HALVES = ("llama", "mistral", "qwen2", "qwen3")

Pair = tuple[torch.Tensor, torch.Tensor]


@torch.library.custom_op("longalign::flash4", mutates_args=())
def flash4(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, longest: int, scale: float, exact: bool
) -> Pair:
    """Causal attention within documents. q [T, H, D], k and v [T, K, D], cu int32; returns ([T, H, D], float32 [H, T]).

    `exact` makes the backward pass add in one order.
    """
    from flash_attn.cute.interface import _flash_attn_fwd

    if len(cu) == 2:  # one document: the kernels for equal lengths are faster than those for any
        out, lse, *_ = _flash_attn_fwd(q[None], k[None], v[None], softmax_scale=scale, causal=True, return_lse=True)
        return out[0], lse[0]
    bounds = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
    out, lse, *_ = _flash_attn_fwd(q, k, v, **bounds, softmax_scale=scale, causal=True, return_lse=True)
    return out, lse


@flash4.register_fake
def _(q: Any, k: Any, v: Any, cu: Any, longest: int, scale: float, exact: bool) -> Pair:
    return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("longalign::flash4_backward", mutates_args=())
def flash4_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu: torch.Tensor,
    longest: int,
    scale: float,
    exact: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    from flash_attn.cute.interface import _flash_attn_bwd

    if len(cu) == 2:
        batch = (x[None] for x in (q, k, v, out, d_out, lse))
        dq, dk, dv, *_ = _flash_attn_bwd(*batch, scale, True, deterministic=exact)
        return dq[0], dk[0], dv[0]
    bounds = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
    dq, dk, dv, *_ = _flash_attn_bwd(q, k, v, out, d_out, lse, scale, True, **bounds, deterministic=exact)
    return dq, dk, dv


def _flash4_save(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    q, k, v, cu, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, cu)


def _flash4_gradients(ctx: Any, d_out: torch.Tensor, _: Any) -> tuple[Any, ...]:
    return *flash4_backward(d_out.contiguous(), *ctx.saved_tensors, *ctx.rest), None, None, None, None


flash4.register_autograd(_flash4_gradients, setup_context=_flash4_save)


@torch.library.custom_op("longalign::rope", mutates_args=())
def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> Pair:
    """Turn q [1, H, T, D] and k [1, K, T, D] by cos, sin [1, T, D]; `back` turns the other way, which is the gradient.

    Liger's kernel works in place, on what may be a kept output of q_proj: hence the copies.
    """
    from liger_kernel.ops.rope import rope_backward, rope_forward

    copies = [x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2) for x in (q, k)]
    q, k, *_ = (rope_backward if back else rope_forward)(*copies, cos, sin)
    return q, k


@rope.register_fake
def _(q: Any, k: Any, cos: Any, sin: Any, back: bool) -> Pair:
    return torch.empty_like(q), torch.empty_like(k)


def _rope_save(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])


def _rope_gradients(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[Any, ...]:
    return *rope(dq, dk, *ctx.saved_tensors, True), None, None, None


rope.register_autograd(_rope_gradients, setup_context=_rope_save)


def install(model: Any) -> list[str]:
    """Fuse norms, MLP activation and rotary embedding of a transformers model where Liger can; returns which."""
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        return []
    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return []
    off = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    _apply_liger_kernel_to_instance(model, **off)
    if kind not in HALVES:
        return ["RMSNorm", "MLP"]
    sys.modules[type(model).__module__].apply_rotary_pos_emb = _rope  # type: ignore[attr-defined]
    return ["RMSNorm", "MLP", "RoPE"]


def _rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    return rope(q, k, cos, sin, False)


def fuses_rope(layer: torch.nn.Module) -> bool:
    """Whether q_proj and k_proj go straight into `rope`, whose gradient needs neither."""
    straight = not any(name.endswith("q_norm") for name, _ in layer.named_modules())
    return straight and getattr(sys.modules[type(layer).__module__], "apply_rotary_pos_emb", None) is _rope
