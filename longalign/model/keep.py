"""Operators whose outputs a checkpointed layer keeps for its backward pass, on the device or in host memory.

As torch.utils.checkpoint.create_selective_checkpoint_contexts, which knows no host memory: one mode watches the forward
pass and keeps, the other returns what was kept when the layer is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longalign.model.offload import Host, Key

Where = Callable[[Any, Any], Literal["device", "host"] | None]  # of an operator and its arguments; None: compute again
WRITTEN = object()  # in place of what was written to since: it is computed again


class Kept:
    """What the layers of a model keep, by layer and place."""

    def __init__(self) -> None:
        self.host = Host()
        self.here: dict[Key, tuple[Any, int]] = {}  # with its version, which tells whether it was written to since

    def modes(self, layer: int, where: Where) -> tuple[Keep, Recall]:
        """For checkpoint's context_fn."""
        return Keep(self, layer, where), Recall(self, layer, where)

    def put(self, key: Key, value: Any, where: Literal["device", "host"]) -> None:
        is_tensor = isinstance(value, torch.Tensor)
        if where == "host" and is_tensor and value.is_floating_point() and value.numel() > 1:
            self.host.leave(key, value)
        else:  # numbers and seeds stay where they are
            self.here[key] = (value.detach(), value._version) if is_tensor else (value, 0)

    def written(self, key: Key) -> None:
        """What was put there is no more what the operator gave."""
        self.here[key] = (WRITTEN, 0)

    def get(self, key: Key) -> Any:
        if key not in self.here:
            return self.host.take(key)
        value, version = self.here.pop(key)
        assert not isinstance(value, torch.Tensor) or value._version == version, "a kept tensor was written to"
        return value


class Keep(TorchDispatchMode):
    """Of the forward pass.

    What is written to later in the layer is not kept: ZeRO-3's linear adds its bias to the product in place, and would
    add it to the kept product once more. torch's version counters do not tell, as views made by _unsafe_view have
    their own; so memory is compared.
    """

    def __init__(self, kept: Kept, layer: int, where: Where):
        super().__init__()
        self.kept, self.layer, self.where, self.place = kept, layer, where, 0
        self.keys: dict[int, Key] = {}  # by address, of what stays on the device: other memory is used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if self.keys and func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                written = argument.is_write and isinstance(value, torch.Tensor)
                if written and (key := self.keys.pop(value.untyped_storage().data_ptr(), None)):
                    self.kept.written(key)
        if place := self.where(func, args):
            for value in outputs if isinstance(outputs, tuple | list) else (outputs,):
                self.place += 1
                self.kept.put((self.layer, self.place), value, place)
                if isinstance(value, torch.Tensor) and (self.layer, self.place) in self.kept.here:
                    self.keys[value.untyped_storage().data_ptr()] = (self.layer, self.place)
        return outputs


class Recall(TorchDispatchMode):
    """Of the computation for the backward pass."""

    def __init__(self, kept: Kept, layer: int, where: Where):
        super().__init__()
        self.kept, self.layer, self.where, self.place = kept, layer, where, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.where(func, args):
            return func(*args, **(kwargs or {}))
        found = []
        for _ in func._schema.returns:
            self.place += 1
            found.append(self.kept.get((self.layer, self.place)))
        if any(value is WRITTEN for value in found):
            return func(*args, **(kwargs or {}))
        return found[0] if len(found) == 1 else tuple(found)
