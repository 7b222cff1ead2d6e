"""Tensors in host memory between the forward and the backward pass, and MLPs in tiles.

Tensors leave while the device computes their layer, and come back while it computes the layer behind. Host memory is
registered with CUDA (cudaHostRegister) in just the size needed: torch's own pinned memory is rounded up to powers of
two.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from pathlib import Path

import numpy as np
import psutil
import torch
from torch.utils.checkpoint import checkpoint

CGROUP = Path("/sys/fs/cgroup")
SHARE = 0.85  # of the host memory that is free, for all ranks of the host together
TILE = 32768  # tokens that an MLP runs at a time, in micro-steps of
TILE_FROM = 131072  # so many or more
Key = tuple[int, int]  # layer, place: 0 its input, then what its kept operators return


class Host:
    """Buffers by key, used again in the next micro-step, and the copies on their way."""

    def __init__(self) -> None:
        self.buffers: dict[Key, torch.Tensor] = {}
        self.away: dict[Key, tuple[torch.Size, torch.device]] = {}
        self.coming: dict[Key, tuple[torch.Tensor, torch.cuda.Event | None]] = {}  # with the end of its copy
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def room(self) -> float:
        """Bytes that this rank's buffers may take."""
        have = sum(buffer.nbytes for buffer in self.buffers.values())
        return SHARE * (free_host_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + have)

    def leave(self, key: Key, tensor: torch.Tensor) -> None:
        """Begin to copy it to the host."""
        buffer = self.buffer(key, tensor.shape, tensor)
        self.away[key] = (tensor.shape, tensor.device)
        if self.stream is None or not tensor.is_cuda:
            buffer.copy_(tensor)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            buffer.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)

    def begin(self, layer: int) -> None:
        """Begin to bring back what left in `layer`."""
        for key in sorted(key for key in self.away if key[0] == layer):
            shape, device = self.away.pop(key)
            buffer = self.buffers[key][: shape.numel()].view(shape)
            if self.stream is None or device.type != "cuda":
                self.coming[key] = buffer.to(device, copy=True), None
                continue
            with torch.cuda.stream(self.stream):
                self.coming[key] = buffer.to(device, non_blocking=True), self.stream.record_event()

    def take(self, key: Key) -> torch.Tensor:
        """It, on its device again."""
        self.begin(key[0])
        tensor, copied = self.coming.pop(key)
        if copied:
            torch.cuda.current_stream().wait_event(copied)  # not for the whole stream: the layer behind comes on it
            tensor.record_stream(torch.cuda.current_stream())
        if key[1] == 0:
            self.begin(key[0] - 1)  # while this layer is computed
        return tensor

    def buffer(self, key: Key, shape: torch.Size | tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """The key's memory, for a tensor of this shape, and of the dtype and device of `like`."""
        have, numel = self.buffers.get(key), math.prod(shape)
        if have is None or have.numel() < numel or have.dtype != like.dtype:
            self.buffers.pop(key, None)  # give back first
            have = self.buffers[key] = host_memory(numel, like)
        return have[:numel].view(shape)


def host_memory(numel: int, like: torch.Tensor) -> torch.Tensor:
    """Uninitialised host memory for `numel` elements of the dtype of `like`, registered with CUDA if that is there.

    It has pages of its own (what is registered is pages, each once) and is released when its last tensor goes.
    """
    size = numel * like.dtype.itemsize
    pages = np.frombuffer(mmap.mmap(-1, max(1, size), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    memory = torch.from_numpy(pages)
    if like.is_cuda:
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), len(pages), 0)))
        weakref.finalize(pages, _unregister, memory.data_ptr()).atexit = False
    return memory[:size].view(like.dtype)


def _unregister(pointer: int) -> None:
    torch.cuda.synchronize()  # copies may be on their way
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(pointer)))


def free_host_memory() -> int:
    """Bytes that programs may still take: of the machine, or of the container if that is less (cgroup 2 and 1).

    What files in memory take counts as free, as the kernel gives it back when it is needed.
    """
    free = psutil.virtual_memory().available
    for most, used, stat, files in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        try:
            limit, taken, counts = ((CGROUP / name).read_text().strip() for name in (most, used, stat))
        except OSError:
            continue
        if limit.isdigit():
            given_back = dict(line.split() for line in counts.splitlines()).get(files, 0)
            free = min(free, int(limit) - int(taken) + int(given_back))
    return max(free, 0)


def tile(mlp: torch.nn.Module) -> None:
    """Make an MLP run TILE tokens at a time where there are many, computing each tile again in the backward pass.

    In place of several widths of the MLP for every token, only its input and output stand in memory at once.
    """
    whole = mlp.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        """[1, T, h] -> [1, T, h]."""
        if hidden.shape[1] < TILE_FROM:
            return whole(hidden)
        return torch.cat([checkpoint(whole, piece, use_reentrant=False) for piece in hidden.split(TILE, dim=1)], dim=1)

    mlp.forward = forward  # type: ignore[method-assign]
