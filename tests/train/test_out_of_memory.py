"""A GPU that runs out of memory ends a run with a setting that fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longalign.config import compose_config
from longalign.errors import UserError
from longalign.train.worker import out_of_memory_told
from tests.model.test_attention import pack


def run_out(words: list[str]) -> None:
    _, batch = pack(40, 3)
    with out_of_memory_told(compose_config("train", words), batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_unknown_device_gets_all_there_is(base_words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"micro-step of 43 tokens in 2 documents: set activations=offload, cluster"):
        run_out(base_words)


def test_known_device_gets_the_nearest_setting(base_words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from longalign.forecast import gpus, run

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    large: dict[str, Any] = {"layers": 32, "hidden": 4096, "intermediate": 11008}
    monkeypatch.setattr(run, "shape_of", lambda _: {**large, "heads": 32, "kv_heads": 32, "head_dim": 128})
    monkeypatch.setattr(run, "count_parameters", lambda _: 6_740_000_000)
    monkeypatch.setattr(run, "free_host_memory", lambda: int(900e9))
    monkeypatch.setattr(gpus, "find", lambda _: gpus.H200._replace(memory=80e9))
    with pytest.raises(UserError, match=r"does not fit one H200; it would with cluster.offload_optimizer=true$"):
        run_out([*base_words, "cluster=1gpu", "cluster.offload_optimizer=false"])
