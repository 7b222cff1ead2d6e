"""What the forward pass keeps for the backward pass, where, and what is computed again.

Bytes kept per token and layer, in bf16 (h hidden, q query, k key-value and m MLP width, all in elements):

    full        layer input                          2h                 everything is computed again
    selective   + attention output and its sums      + 2q + 4 heads     no attention is computed again
    budget      + the matmuls' outputs, in as many   + 2q + 4k + 2h     no matmul is computed again in these layers
                layers as memory holds                + 4m
    none        everything                           about 12h + 6m     nothing is
    offload     as selective, in host memory         0                  as selective; long MLPs run in tiles

With budget, layer inputs and attention outputs stand in host memory (where that has room for all of them) if the device
cannot hold those of all layers: the matmuls' outputs for which that makes room save no more than the copies take. With
offload, attention outputs for which host memory has no room are computed again, and layer inputs for which it has none
stay on the device.

Every option's gradients are the same numbers. All but `none` run layers under torch's non-reentrant checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers.modeling_layers import GradientCheckpointingLayer

from longalign.model import kernels
from longalign.model.cost import shape_of
from longalign.model.keep import Kept
from longalign.model.loss import CHUNK
from longalign.model.offload import tile
from longalign.schema import Config

Policy = Literal["full", "selective", "budget", "offload", "none"]
Place = Literal["device", "host"]
aten = torch.ops.aten
MATMULS = (aten.mm.default, aten.addmm.default)
# Operators that attention and rotary embeddings go by: ours, torch's varlen, flash-attn 2 and 3, SDPA.
NAMESPACES = ("torch_attn", "flash_attn", "flash_attn_3")
SDPA = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)
MARGIN = 0.04  # of the device's memory, left free
LEAST_SLICE = 4096  # tokens; shorter slices leave a large GPU waiting for work


def resolve_policy(config: Config, device: str) -> Policy:
    """config.activations; auto is budget on CUDA and full on a CPU, whose free memory nobody promises."""
    if config.activations == "auto":
        return "budget" if device == "cuda" else "full"
    return config.activations


class Activations:
    """Decides, before every micro-step, what the layers of a model keep.

    On a CUDA device `budget` first runs without matmuls' outputs and measures; from then on it fills the memory that is
    free.
    """

    def __init__(self, model: Any, policy: Policy):
        self.policy = policy
        self.layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self.kept = Kept()
        self.with_matmuls = 0  # so many layers, from the last, keep their matmuls' outputs
        # In so many layers, from the last:
        self.inputs_on_host = self.attention_on_host = len(self.layers) if policy == "offload" else 0
        shape, size = shape_of(model.config), model.dtype.itemsize
        self.input_bytes = size * shape["hidden"]  # of a token and layer
        self.attention_bytes = size * shape["heads"] * shape["head_dim"] + 4 * shape["heads"]
        self.settled = False  # whether budget has kept all on the device once
        self.highest = 0  # bytes of the device, before the present micro-step and since take_peak
        self.memory = None
        if policy == "budget" and torch.cuda.is_available():
            self.memory = Memory(model, size * _width(self.layers[0]))
        if policy == "none":
            return
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for number, layer in enumerate(self.layers):
            layer._gradient_checkpointing_func = partial(self._run, number, _kept_weights(layer))
            if policy == "offload":
                tile(layer.mlp)

    def _run(self, number: int, weights: list[torch.Tensor], function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), the layer of this number, whose input is args[0]."""
        behind = len(self.layers) - number
        attention: Place | None = "device" if self.policy in ("selective", "budget") else None
        if behind <= self.attention_on_host:
            attention = "host"
        where = partial(_where, attention, weights if behind <= self.with_matmuls else [])
        contexts = noop_context_fn if self.policy == "full" else partial(self.kept.modes, number, where)
        if behind > self.inputs_on_host:
            return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)
        with torch.autograd.graph.saved_tensors_hooks(partial(self._leave, number), self._return):
            return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)

    def _leave(self, number: int, tensor: torch.Tensor) -> torch.Tensor | int:
        if not tensor.dtype.is_floating_point or tensor.dim() != 3:
            return tensor
        self.kept.host.leave((number, 0), tensor.detach())
        return number

    def _return(self, kept: torch.Tensor | int) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else self.kept.host.take((kept, 0))

    def slice_tokens(self) -> int | None:
        """Tokens that run without computing anything twice; None if that is not known or not worth a slice."""
        limit = _least(self.memory.whole_tokens()) if self.memory else 0
        return limit if limit >= LEAST_SLICE else None

    def describe(self, slices: int) -> str:
        """What the last micro-step kept, in words."""
        of = f"of {len(self.layers)} layers"
        if self.policy == "offload":
            return f"in host memory: inputs of {self.inputs_on_host}, attention of {self.attention_on_host} {of}"
        if self.policy != "budget":
            return self.policy
        whole = self.memory is not None and self.memory.now[1]
        attention = "attention in host memory" if self.attention_on_host else "attention"
        kept = "everything" if whole else f"{attention}, matmuls in {self.with_matmuls} {of}"
        return f"{kept}, {slices} slices" if slices > 1 else kept

    def before(self, tokens: int) -> None:
        """Choose for a micro-step of so many tokens."""
        if self.policy == "offload":
            self.attention_on_host = self._fits_host(tokens)
            fitting = int(self.kept.host.room() / (tokens * self.input_bytes))
            self.inputs_on_host = min(len(self.layers), fitting)
        if not self.memory:
            return
        self.highest = max(self.highest, torch.cuda.max_memory_allocated())  # the count is about to begin anew
        # All ranks alike: a layer that is computed again calls its collectives again, those of sequence parallelism
        # and ZeRO-3's.
        whole, layers = bool(_least(self.memory.fits_whole(tokens))), len(self.layers)
        on_host = not whole and self.memory.fitting(tokens, on_host=False) < 0 and self._fits_host(tokens) == layers
        self.inputs_on_host = self.attention_on_host = layers if on_host else 0
        # What the first micro-step, which measured, left in host memory, if one as long can do without.
        if not on_host and not self.settled and tokens >= self.memory.measured[True]:
            self.kept.host.buffers.clear()
            self.settled = True
        self.with_matmuls = self.memory.choose(tokens, whole, on_host)
        for layer in self.layers:
            layer.gradient_checkpointing = not whole

    def _fits_host(self, tokens: int) -> int:
        """The layers whose attention outputs host memory holds beside the inputs of all."""
        room = self.kept.host.room() - tokens * len(self.layers) * self.input_bytes
        return max(0, min(len(self.layers), int(room / (tokens * self.attention_bytes))))

    def after(self) -> None:
        """Learn from the micro-step that ended."""
        if self.memory:
            self.memory.learn()

    def take_peak(self) -> int:
        """Bytes that were allocated on the CUDA device at most since this was last asked."""
        highest, self.highest = max(self.highest, torch.cuda.max_memory_allocated()), 0
        torch.cuda.reset_peak_memory_stats()
        return highest


class Memory:
    """The bytes of the device that a micro-step takes: what layers keep is counted, the rest is measured."""

    def __init__(self, model: Any, matmuls: int):
        """matmuls: bytes of a token and layer that the matmuls' outputs take."""
        s = shape_of(model.config)
        h, q, kv, m = s["hidden"], s["heads"] * s["head_dim"], 2 * s["kv_heads"] * s["head_dim"], s["intermediate"]
        self.layers, size, self.matmuls = s["layers"], model.dtype.itemsize, matmuls
        self.selective = s["layers"] * (size * (h + q) + 4 * s["heads"])  # bytes a token
        # Bytes a token if all is kept, at first more than was seen of any model: 1.25 with fused kernels, 1.76 without.
        self.whole, self.whole_is_measured = 1.9 * s["layers"] * size * (4 * h + 2 * q + kv + 3 * m), False
        self.passing = {False: 0.0, True: 0.0}  # on host -> bytes a token beyond what is kept; 0 = not measured yet
        self.measured = {False: 0, True: 0}  # on host -> tokens of the longest micro-step that told
        # Bytes of any pass: lm_head's gradient and the logits of some targets, in float32 (model/loss.py).
        vocabulary = model.config.get_text_config().vocab_size
        self.constant = 4 * vocabulary * (h + 2 * CHUNK)
        self.fixed = 0  # bytes that stand between micro-steps: weights, gradients, optimizer states
        self.now = (0, False, 0, False)  # tokens, whole, layers with matmuls, on host, of the present micro-step

    def room(self) -> float:
        """Bytes for a micro-step. What CUDA, NCCL and other programs hold is neither free nor reserved by torch."""
        free, total = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - MARGIN * total - self.fixed - self.constant

    def whole_tokens(self) -> int:
        return int(self.room() / self.whole) // 256 * 256 if any(self.passing.values()) else 0

    def fits_whole(self, tokens: int) -> bool:
        self.fixed = max(self.fixed, torch.cuda.memory_allocated())
        return any(self.passing.values()) and tokens * self.whole <= self.room()

    def fitting(self, tokens: int, on_host: bool) -> int:
        """The layers whose matmuls' outputs memory holds, with attention outputs and layer inputs there or on the host.

        -1 if it does not even hold those, or until a micro-step has been measured.
        """
        # Copies on their way count as passing: what was measured with them is enough without them.
        passing = self.passing[on_host] or (0.0 if on_host else self.passing[True])
        left = self.room() - tokens * (self._kept(on_host) + passing)
        return min(self.layers, int(left / (tokens * self.matmuls))) if passing and left >= 0 else -1

    def choose(self, tokens: int, whole: bool, on_host: bool) -> int:
        """The layers that keep their matmuls' outputs in the micro-step that begins."""
        torch.cuda.reset_peak_memory_stats()
        layers = max(0, self.fitting(tokens, on_host))
        self.now = (tokens, whole, layers, on_host)
        return layers

    def _kept(self, on_host: bool) -> float:
        return 0.0 if on_host else self.selective

    def learn(self) -> None:
        tokens, whole, layers, on_host = self.now
        stands = torch.cuda.memory_allocated()
        if stands > 1.01 * self.fixed:  # gradients came to stand on the way: was the peak before or after?
            self.fixed = stands
            return
        used = max(0, torch.cuda.max_memory_allocated() - self.fixed - self.constant) / tokens
        long = tokens >= LEAST_SLICE  # short ones measure workspaces, not tokens
        if whole and long:
            self.whole = max(self.whole / 1.05 if self.whole_is_measured else 0.0, used)
            self.whole_is_measured = True
        elif not whole and tokens >= min(self.measured[on_host], LEAST_SLICE):
            earlier = self.passing[on_host] / 1.05 if self.measured[on_host] >= LEAST_SLICE else 0.0
            passing = used - self._kept(on_host) - layers * self.matmuls
            self.passing[on_host] = max(earlier, passing, 1.0)
            self.measured[on_host] = max(self.measured[on_host], tokens)


def _least(value: int) -> int:
    """The smallest of all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    smallest = torch.tensor(int(value), device="cuda")
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return int(smallest)


def _kept_weights(layer: torch.nn.Module) -> list[torch.Tensor]:
    """Of the linears whose outputs the backward pass needs: not the last (down_proj), whose output is only added, and
    not those that kernels.rope turns, whose own output is kept.

    The tensors, not their modules: ZeRO-3 takes `linear.weight` for a use of it, gathers it, and counts it to the
    module that is running.
    """
    linears = [(name, module) for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)][:-1]
    turned = ("q_proj", "k_proj") if kernels.fuses_rope(layer) else ()
    return [module.weight for name, module in linears if not name.endswith(turned)]


def _width(layer: torch.nn.Module) -> int:
    """Elements of a token that the outputs of those linears, and of those that kernels.rope turns, take."""
    return sum([module.out_features for module in layer.modules() if isinstance(module, torch.nn.Linear)][:-1])


def _where(attention: Place | None, weights: list[torch.Tensor], op: Any, args: Any) -> Place | None:
    """Where the operator's outputs are kept; None: nowhere."""
    if op.namespace in NAMESPACES or op in SDPA or op is torch.ops.longalign.flash4.default:
        return attention
    if weights and (op is torch.ops.longalign.rope.default or (op in MATMULS and _is_of(args[-1], weights))):
        return "device"
    return None


def _is_of(matrix: torch.Tensor, weights: list[torch.Tensor]) -> bool:
    return any(matrix.data_ptr() == weight.data_ptr() for weight in weights)
