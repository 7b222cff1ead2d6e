"""Rotary position embedding: the configured base frequency, set where transformers reads it, and proven to be used."""

from __future__ import annotations

from typing import Any

import torch

from longalign.errors import UserError


def set_theta(config: Any, theta: float | None, max_length: int) -> None:
    """Write an absolute base frequency, and the context it is meant for, into a Hugging Face config.

    To be called before the model is built; the exported config then tells eval, chat and servers the same.
    transformers >= 5 reads `rope_parameters` and ignores an assignment to `config.rope_theta`.
    """
    if theta is None:
        return
    parameters = getattr(config.get_text_config(), "rope_parameters", None)
    if not isinstance(parameters, dict) or "rope_theta" not in parameters:
        raise UserError(f"model.rope.theta={theta}: {config.model_type} has no single rope_theta to set")
    parameters["rope_theta"] = float(theta)
    text_config = config.get_text_config()
    text_config.max_position_embeddings = max(text_config.max_position_embeddings, max_length)


def restore_inv_freq(model: torch.nn.Module) -> None:
    """Rebuild rotary frequencies that are not those of a model loaded on a CPU, bit for bit.

    ZeRO-3's sharded loading makes every buffer in bfloat16. A GPU's powers are off by 1e-7 of a CPU's, which at
    position 32,000 turns a pair of dimensions by 3e-3 of a radian.
    """
    for module in model.modules():
        inv_freq = getattr(module, "inv_freq", None)
        if isinstance(inv_freq, torch.Tensor) and (inv_freq.dtype != torch.float32 or inv_freq.device.type != "cpu"):
            fresh = type(module)(module.config)  # type: ignore[call-arg]
            for name in ("inv_freq", "original_inv_freq"):
                if isinstance(getattr(fresh, name, None), torch.Tensor):
                    setattr(module, name, getattr(fresh, name).to(inv_freq.device))


def check_inv_freq(model: torch.nn.Module, theta: float | None) -> None:
    """Assert that every rotary module uses the configured base in float32.

    A bfloat16 copy of inv_freq is off by tens of radians at 64k, an ignored theta by more.
    """
    for name, module in model.named_modules():
        inv_freq = getattr(module, "inv_freq", None)
        if not isinstance(inv_freq, torch.Tensor):
            continue
        if inv_freq.dtype != torch.float32:
            raise AssertionError(f"{name}.inv_freq is {inv_freq.dtype}, not float32")
        parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
        if theta is None or parameters.get("rope_type", "default") != "default":
            continue
        half = inv_freq.numel()
        expected = float(theta) ** -(torch.arange(half, dtype=torch.float64) / half)
        if not torch.allclose(inv_freq.double().cpu(), expected, rtol=1e-5):
            raise AssertionError(f"{name}.inv_freq is not that of model.rope.theta={theta}")


def context_warning(config: Any, max_length: int, theta: float | None) -> str | None:
    """What to tell a user whose samples are longer than the model's context and who extends nothing."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is None or max_length <= context or theta is not None:
        return None
    return (
        f"max_length={max_length} is above the model's context of {context} tokens and nothing extends it: "
        "positions beyond it were never trained. Set model.rope.theta (the paper multiplies it by 200) and "
        "continue training on long text (template=text), or lower max_length"
    )
