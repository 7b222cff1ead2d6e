"""Layer inputs and attention outputs in host memory between the forward and the backward pass.

They leave while the device computes the layer, and come back while it computes the layer behind. Host memory is
registered with CUDA (cudaHostRegister) in exactly the size needed: torch's own pinned memory is rounded up to powers of
two. Bytes a token and layer in bf16: 2h for the input, 2q + 4 heads for the attention.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

SHARE = 0.85  # of the host memory that is free, for all ranks of the host together
TILE = 32768  # tokens that an MLP runs at a time
Key = tuple[int, int]  # layer, place: 0 its input, then what its attentions return


class Offload:
    """For the layers of one model. is_kept: which operators' outputs are kept rather than computed again."""

    def __init__(self, layers: int, is_kept: Callable[[Any], bool]):
        self.layers, self.is_kept = layers, is_kept
        self.host: dict[Key, torch.Tensor] = {}  # buffers, used again in the next micro-step
        self.away: dict[Key, tuple[torch.Size, torch.device]] = {}
        self.coming: dict[Key, torch.Tensor] = {}  # on their way back
        self.small: dict[Key, Any] = {}
        self.kept_layers = layers  # so many layers, from the last, keep attention outputs
        self.planned = 0  # tokens that kept_layers was counted for
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def run(self, layer: int, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), a layer, under torch's checkpoint; args[0] is its input [1, T, h]."""
        self.plan(args[0])
        contexts = None
        if layer >= self.layers - self.kept_layers:
            contexts = partial(lambda n: (Leave(self, n), Recall(self, n)), layer)
        with torch.autograd.graph.saved_tensors_hooks(partial(self._leave_input, layer), self._return_input):
            if contexts:
                return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)
            return checkpoint(function, *args, use_reentrant=False)

    def plan(self, hidden: torch.Tensor) -> None:
        """Count the layers whose attention outputs, about as large as their inputs, host memory holds too."""
        if hidden.shape[1] <= self.planned:
            return
        self.planned = hidden.shape[1]
        have = sum(buffer.nbytes for buffer in self.host.values())
        room = SHARE * (free_host_memory() + have) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.kept_layers = max(0, min(self.layers, int(room / hidden.nbytes) - self.layers))

    def keep(self, key: Key, value: Any) -> None:
        """What an operator returned; numbers and seeds stay where they are."""
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 1:
            self.leave(key, value)
        else:
            self.small[key] = value

    def recall(self, key: Key) -> Any:
        return self.small.pop(key) if key in self.small else self.take(key)

    def leave(self, key: Key, tensor: torch.Tensor) -> None:
        """Begin to copy it to the host."""
        host = self._buffer(key, tensor)
        self.away[key] = (tensor.shape, tensor.device)
        if self.stream is None or not tensor.is_cuda:
            host.copy_(tensor)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)

    def take(self, key: Key) -> torch.Tensor:
        """It, on its device again."""
        self._begin(key)
        tensor = self.coming.pop(key)
        if self.stream is not None and tensor.is_cuda:
            torch.cuda.current_stream().wait_stream(self.stream)
            tensor.record_stream(torch.cuda.current_stream())
        return tensor

    def _begin(self, key: Key) -> None:
        if key in self.coming:
            return
        shape, device = self.away.pop(key)
        host = self.host[key][: shape.numel()].view(shape)
        if self.stream is None or device.type != "cuda":
            self.coming[key] = host.to(device, copy=True)
            return
        with torch.cuda.stream(self.stream):
            self.coming[key] = host.to(device, non_blocking=True)

    def _leave_input(self, layer: int, tensor: torch.Tensor) -> torch.Tensor | int:
        if not tensor.dtype.is_floating_point or tensor.dim() != 3:
            return tensor
        self.leave((layer, 0), tensor.detach())
        return layer

    def _return_input(self, kept: torch.Tensor | int) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        tensor = self.take((kept, 0))
        for key in sorted(key for key in self.away if key[0] in (kept, kept - 1)):
            self._begin(key)  # while this layer is computed
        return tensor

    def _buffer(self, key: Key, tensor: torch.Tensor) -> torch.Tensor:
        have = self.host.get(key)
        if have is None or have.numel() < tensor.numel() or have.dtype != tensor.dtype:
            if have is not None and tensor.is_cuda:
                torch.cuda.cudart().cudaHostUnregister(have.data_ptr())
            have = torch.empty(tensor.numel(), dtype=tensor.dtype)
            if tensor.is_cuda:
                torch.cuda.cudart().cudaHostRegister(have.data_ptr(), have.nbytes, 0)
            self.host[key] = have
        return have[: tensor.numel()].view(tensor.shape)


class Leave(TorchDispatchMode):
    """Of the forward pass: outputs that are kept leave for the host."""

    def __init__(self, offload: Offload, layer: int):
        super().__init__()
        self.offload, self.layer, self.place = offload, layer, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if self.offload.is_kept(func):
            for value in outputs if isinstance(outputs, tuple) else (outputs,):
                self.place += 1
                self.offload.keep((self.layer, self.place), value)
        return outputs


class Recall(TorchDispatchMode):
    """Of the recomputation: they return instead of being computed."""

    def __init__(self, offload: Offload, layer: int):
        super().__init__()
        self.offload, self.layer, self.place = offload, layer, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.offload.is_kept(func):
            return func(*args, **(kwargs or {}))
        found = []
        for _ in func._schema.returns:
            self.place += 1
            found.append(self.offload.recall((self.layer, self.place)))
        return found[0] if len(found) == 1 else tuple(found)


def tile(mlp: torch.nn.Module) -> None:
    """Make an MLP run TILE tokens at a time where there are more, computing each tile again in the backward pass.

    In place of several widths of the MLP for every token, only its input and output stand in memory at once.
    """
    whole = mlp.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        """[1, T, h] -> [1, T, h]."""
        if hidden.shape[1] <= TILE:
            return whole(hidden)
        return torch.cat([checkpoint(whole, piece, use_reentrant=False) for piece in hidden.split(TILE, dim=1)], dim=1)

    mlp.forward = forward  # type: ignore[method-assign]


def free_host_memory() -> int:
    """Bytes that programs may still take: of the machine, or of the container if that is less (cgroup 2 and 1)."""
    free = psutil.virtual_memory().available
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = ((Path("/sys/fs/cgroup") / name).read_text().strip() for name in (limit, used))
        except OSError:
            continue
        if most.isdigit():
            free = min(free, int(most) - int(now))
    return max(free, 0)
