"""Keys and values in host memory: on the device stands the layer that is computed, and the next on its way.

A layer's rows go to the host once, into memory of exactly the size that the prompt and its answer need. transformers'
own offloaded cache writes the whole layer again after every piece of the prompt and every token, into pinned memory
that torch rounds up to powers of two and keeps: Llama-2-7B's 64 GiB for 128k tokens took twice that.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from longalign.errors import UserError
from longalign.model.cost import shape_of
from longalign.model.offload import Host


class HostLayer(DynamicLayer):
    """A layer's keys and values, [B, K, T, D], for at most `capacity` tokens; on the host as [T, B, K, D].

    transformers' Cache calls `update` for the layer that is computed, then `offload`, and `prefetch` a layer ahead.
    """

    def __init__(self, host: Host, number: int, capacity: int):
        super().__init__()
        self.host, self.number, self.capacity = host, number, capacity
        self.rows = 0  # on the host
        self.written = torch.cuda.Event() if torch.cuda.is_available() else None

    def offload(self) -> None:
        assert self.keys is not None, "offload follows update"
        assert self.values is not None
        self.keys, self.values = self._to_host(0, self.keys), self._to_host(1, self.values)
        self.rows = self.keys.shape[-2]
        if self.written is not None:
            self.written.record()

    def _to_host(self, place: int, tensor_BKTD: torch.Tensor) -> torch.Tensor:
        tensor_TBKD = tensor_BKTD.permute(2, 0, 1, 3)
        rows, *row = tensor_TBKD.shape
        assert rows <= self.capacity
        buffer_TBKD = self.host.buffer((self.number, place), (self.capacity, *row), tensor_BKTD)
        buffer_TBKD[self.rows : rows].copy_(tensor_TBKD[self.rows :].contiguous(), non_blocking=True)
        return buffer_TBKD[:rows].permute(1, 2, 0, 3)

    def prefetch(self) -> None:
        """Called with the cache's own stream as the current one."""
        if self.keys is None or self.values is None:
            return
        self.rows = self.keys.shape[-2]  # fewer after a crop
        if self.written is not None:
            self.written.wait()  # this stream may be far ahead of the one that computes
        self.keys, self.values = self._to_device(self.keys), self._to_device(self.values)

    def _to_device(self, tensor_BKTD: torch.Tensor) -> torch.Tensor:
        coming = tensor_BKTD.permute(2, 0, 1, 3).to(self.device, non_blocking=True, copy=True)
        if coming.is_cuda:
            coming.record_stream(torch.cuda.default_stream(coming.device))
        return coming.permute(1, 2, 0, 3)


def host_cache(config: Any, host: Host, prompts: int, tokens: int, dtype: torch.dtype) -> DynamicCache:
    """An empty cache for so many prompts of at most so many tokens, answers included. config: the model's.

    Layers that hold more than keys and values of every token (sliding windows, recurrent states) stay on the device.
    Raises UserError if the host has too little memory.
    """
    shape = shape_of(config)
    cache = DynamicCache(config=config, offloading=True, offload_only_non_sliding=True)
    full = [number for number, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
    need = 2 * len(full) * prompts * tokens * shape["kv_heads"] * shape["head_dim"] * dtype.itemsize
    if need > (room := host.room()):
        raise UserError(
            f"generation.cache=offloaded: keys and values of {prompts} prompts of {tokens:,} tokens need "
            f"{need / 2**30:.1f} GiB of main memory, and {room / 2**30:.1f} GiB can be used; lower "
            "generation.batch_tokens, or ask shorter prompts"
        )
    for number in full:
        cache.layers[number] = HostLayer(host, number, tokens)
    return cache
