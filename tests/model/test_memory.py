"""The budget of activations on a device whose memory is played: every pass fits it, and soon little is left idle."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from longalign.model.activations import Memory

TOTAL, TOKENS, PASSING = 140 * 2**30, 65536, 90_000  # PASSING: bytes a token, while a layer is computed
WEIGHTS = GRADIENTS = int(12.6 * 2**30)


class Device:
    """Plays torch.cuda's counters for Llama-2-7B's shape."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.stands, self.peak = WEIGHTS, 0
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: self.stands)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=TOTAL))

    def pass_over(self, memory: Memory, tokens: int, on_host: bool, states: int) -> int:
        """A forward and backward pass; returns the layers that kept their matmuls."""
        layers = memory.choose(tokens, memory.fits_whole(tokens), on_host)
        kept = 2 * (32 * 4096 * 2 + 64) * (not on_host) + 1.01 * memory.matmuls * layers
        at_the_loss = self.stands + tokens * (kept + PASSING)
        self.stands = WEIGHTS + GRADIENTS + states
        self.peak = int(max(at_the_loss, self.stands + tokens * PASSING))
        memory.learn()
        return layers


def llama2_7b() -> Memory:
    shape = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    return Memory(model, 2 * (4 * 4096 + 2 * 11008))


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("packs", [1, 2, 8])
def test_the_device_is_filled_and_never_overfilled(on_host: bool, packs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    memory = llama2_7b()
    states = 0
    slack = (
        0.04 * TOTAL + 2 * TOKENS * memory.matmuls + (GRADIENTS if packs == 1 else 0)
    )  # margin, a layer, and one more
    for step in range(6):
        for number in range(packs):
            layers = device.pass_over(memory, TOKENS, on_host, states)
            assert device.peak < TOTAL, (step, number, layers)
        if step == 5:
            assert TOTAL - device.peak < slack or layers == 0, (layers, device.peak)
        states = 20 * 2**30  # the optimizer has made its states, and gradients are freed
        device.stands = WEIGHTS + states


def test_a_document_that_needs_all_memory_once_does_not_starve_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    memory = llama2_7b()
    layers = [device.pass_over(memory, tokens, True, 0) for tokens in (1024, 1024, 65536, 65536, 512, 65536, 16384)]
    assert layers[3] == layers[5] > 15
    assert layers[-1] == 32


def test_what_the_device_holds_whole_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack whose inputs, attention and matmuls all fit is told to, from measures of passes with the host."""
    device = Device(monkeypatch)
    memory = llama2_7b()
    assert memory.fitting(16384, on_host=False) == 0, "nothing was measured yet"
    for _ in range(3):
        device.pass_over(memory, TOKENS, True, 0)
    assert memory.fitting(32768, on_host=False) == 32
    assert memory.fitting(TOKENS, on_host=False) < memory.fitting(TOKENS, on_host=True) < 32
    for _ in range(2):
        assert device.pass_over(memory, 32768, False, 0) == 32
        assert device.peak < TOTAL
