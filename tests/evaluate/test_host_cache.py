"""Keys and values in host memory: the same answers, and no more memory than they need."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from longalign.errors import UserError
from longalign.evaluate.host_cache import host_cache
from longalign.model import offload
from longalign.model.offload import Host, free_host_memory


def generate(model: Any, prompts: torch.Tensor, **settings: Any) -> list[list[int]]:
    mask = torch.ones_like(prompts)
    mask[0, :3] = 0  # padding
    made = model.generate(
        prompts, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0, **settings
    )
    return made[:, prompts.shape[1] :].tolist()


@pytest.fixture
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers orders copies by CUDA streams; on a CPU everything happens in order."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, "Stream", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: SimpleNamespace(wait_stream=lambda s: None))


@pytest.mark.usefixtures("no_streams")
@pytest.mark.parametrize("chunk", [None, 7])
def test_answers_are_those_of_a_cache_on_the_device(model_dir: Path, chunk: int | None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(device).eval()
    config, host = model.config, Host()
    for prompts, length in ((2, 23), (3, 11)):  # the second batch uses the first one's memory again
        ids = torch.randint(5, 60, (prompts, length), generator=torch.Generator().manual_seed(1)).to(device)
        cache = host_cache(config, host, prompts, length + 9, torch.float32)
        assert generate(model, ids, past_key_values=cache, prefill_chunk_size=chunk) == generate(model, ids)
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    assert len(host.buffers) == 2 * config.num_hidden_layers
    bytes_of_first = 4 * 2 * config.num_hidden_layers * 2 * (23 + 9) * heads * size
    assert sum(buffer.nbytes for buffer in host.buffers.values()) == bytes_of_first


@pytest.mark.usefixtures("no_streams")
def test_too_little_host_memory_is_told_before_it_is_taken(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoModelForCausalLM.from_pretrained(model_dir).config
    monkeypatch.setattr(offload, "free_host_memory", lambda: 2**20)
    with pytest.raises(UserError, match=r"2 prompts of 100,000 tokens need .* GiB of main memory, and 0\.0 GiB can be"):
        host_cache(config, Host(), 2, 100_000, torch.bfloat16)


def test_files_in_memory_count_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container of 1 GB that uses 900 MB, 600 MB of them files that were read."""
    monkeypatch.setattr(offload, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000000\n")
    (tmp_path / "memory.current").write_text("900000000\n")
    (tmp_path / "memory.stat").write_text("anon 250000000\nfile 650000000\ninactive_file 600000000\n")
    assert free_host_memory() == 700_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_host_memory() > 700_000_000
