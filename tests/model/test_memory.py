"""The budget of activations on a device whose memory is played: every pass fits it, and soon little is left idle."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from longalign.model.activations import Activations, Memory

TOTAL, TOKENS, PASSING = 140 * 2**30, 65536, 90_000  # PASSING: bytes a token, while a layer is computed
WEIGHTS = GRADIENTS = int(12.6 * 2**30)
FORMULA = 2 * 32 * (4 * 4096 + 3 * 4096 + 3 * 11008 + 4096)  # bytes a token, see Memory.whole


class Device:
    """Plays torch.cuda's counters for Llama-2-7B's shape."""

    whole = 1.25 * FORMULA  # bytes a token if all is kept

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.stands, self.peak, self.others = WEIGHTS, 0, 0  # others: CUDA's and other programs' bytes
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: self.stands)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: self.stands)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (TOTAL - self.stands - self.others, TOTAL))

    def pass_over(self, memory: Memory, tokens: int, on_host: bool, states: int) -> int:
        """A forward and backward pass; returns the layers that kept their matmuls."""
        whole = memory.fits_whole(tokens)
        layers = memory.choose(tokens, whole, on_host)
        kept = 2 * (32 * 4096 * 2 + 64) * (not on_host) + 1.01 * memory.matmuls * layers
        if whole:
            kept = self.whole
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
        0.04 * TOTAL + memory.constant + 2 * TOKENS * memory.matmuls + (GRADIENTS if packs == 1 else 0)
    )  # margin, lm_head's, a layer, and one more
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
    assert memory.fitting(16384, on_host=False) == -1, "nothing was measured yet"
    for _ in range(3):
        device.pass_over(memory, TOKENS, True, 0)
    assert memory.fitting(32768, on_host=False) == 32
    assert memory.fitting(TOKENS, on_host=False) < memory.fitting(TOKENS, on_host=True) < 32
    for _ in range(2):
        assert device.pass_over(memory, 32768, False, 0) == 32
        assert device.peak < TOTAL
    memory.fixed += 80 * 2**30  # optimizer states
    assert memory.fitting(TOKENS, on_host=False) == -1, "not even attention outputs"
    assert memory.fitting(TOKENS, on_host=True) >= 0


@pytest.mark.parametrize("factor", [1.25, 1.76])  # as with fused kernels and as of Qwen3 without
def test_everything_is_kept_where_it_fits_and_never_where_it_does_not(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch)
    device.whole = factor * FORMULA
    memory = llama2_7b()
    sizes = (TOKENS, 20_000, 24_000, 16_000, 30_000, 12_000, 8_000)
    for number in range(60):
        device.pass_over(memory, sizes[number % len(sizes)], False, 0)
        assert device.peak < TOTAL, number
    assert memory.whole == pytest.approx(device.whole + PASSING, rel=0.1), "measured"
    filled = memory.whole_tokens()
    assert memory.fits_whole(filled)
    assert filled * (device.whole + PASSING) + WEIGHTS + GRADIENTS > 0.8 * TOTAL


def test_what_others_hold_is_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, shared = ([], [])
    for others, layers in ((0, alone), (40 * 2**30, shared)):
        device = Device(monkeypatch)
        device.others = others
        memory = llama2_7b()
        layers += [device.pass_over(memory, TOKENS, True, 0) for _ in range(6)]
        assert device.peak + others < TOTAL
    assert shared[-1] < alone[-1]


def test_a_rank_that_only_keeps_up_measures_nothing_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    memory = llama2_7b()
    device.pass_over(memory, 2, True, 0)
    memory.passing[True] = 1e9  # two tokens, and workspaces of 2 GB
    assert [device.pass_over(memory, TOKENS, True, 0) for _ in range(3)][-1] > 15


def test_the_peak_of_a_step_is_that_of_its_largest_micro_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though what the device counts begins anew in every micro-step."""
    device = Device(monkeypatch)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(device, "peak", device.stands))
    shape = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=99)
    model = AutoModelForCausalLM.from_config(shape)
    activations = Activations(model, "budget")
    activations.memory = Memory(model, 100)  # as on a GPU
    for peaks in ([5, 9, 7], [6, 3]):
        for gib in peaks:
            activations.before(100)
            device.peak = device.stands + gib * 2**30
            activations.after()
        assert activations.take_peak() == device.stands + max(peaks) * 2**30
