"""Every activation policy computes the same gradients, and keeps what it says it keeps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longalign.data.batch import cut
from longalign.model import attention, offload
from longalign.model.activations import Activations, Policy
from longalign.model.keep import Kept
from longalign.model.loss import StepTotals, WeightedLoss, batch_weights
from tests.model.test_attention import pack


class Count(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def build(model_dir: Path, policy: Policy) -> tuple[WeightedLoss, Activations]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    attention.install(model, "sdpa")
    activations = Activations(model, policy)
    return WeightedLoss(model.train()), activations


def batch_of(*lengths: int) -> tuple[object, torch.Tensor]:
    _, batch = pack(*lengths)
    totals = StepTotals(len(lengths), 1, int(batch.n_target.sum()))
    return batch, batch_weights("sequence", batch, torch.zeros(len(lengths), dtype=torch.int64), totals)


def gradients(module: WeightedLoss, batch: object, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    module(batch, weights)[0].backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("policy", ["full", "selective", "budget", "offload"])
def test_every_policy_gives_the_gradients_of_keeping_everything(policy: Policy, model_dir: Path) -> None:
    batch, weights = batch_of(40, 3, 25, 1)
    truth = gradients(build(model_dir, "none")[0], batch, weights)
    module, activations = build(model_dir, policy)
    for with_matmuls in (0, 1, len(activations.layers)):
        activations.with_matmuls = with_matmuls
        for _ in range(2):  # offload uses its buffers again
            for name, gradient in gradients(module, batch, weights).items():
                assert torch.equal(gradient, truth[name]), name


@pytest.mark.parametrize("lengths", [(40, 3, 25), (64,), (7, 9)])  # of which freed memory is used again or not
@pytest.mark.parametrize("policy", ["full", "selective", "budget", "offload"])
def test_a_bias_that_is_added_in_place_counts_once(
    policy: Policy, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO-3 puts such a linear in place of torch's, for the whole process."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        attention_bias=True,
        mlp_bias=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    batch, weights = batch_of(*lengths)
    attention.install(model, "sdpa")
    truth = gradients(WeightedLoss(model.train()), batch, weights)
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    activations = Activations(model, policy)
    for with_matmuls in (0, 1, 2):
        activations.with_matmuls = with_matmuls
        for name, gradient in gradients(WeightedLoss(model), batch, weights).items():
            nil = 1e-6 if name.endswith("k_proj.bias") else 0  # which moves no softmax but by its turning
            assert (gradient - truth[name]).norm() <= 1e-5 * truth[name].norm() + nil, name
        assert not activations.kept.here, "nothing stays behind"


def test_memory_of_what_left_for_the_host_may_be_written_to() -> None:
    """It is used again as soon as the copy is made, by anything."""
    a, b = torch.randn(4, 5), torch.randn(5, 6)
    kept = Kept()
    forward, backward = kept.modes(0, lambda op, args: "host" if op is torch.ops.aten.mm.default else None)
    results = []
    for mode in (forward, backward):
        with mode:
            results.append(torch.mm(a, b).add_(1))
    assert torch.equal(*results)
    assert not kept.here


def test_what_is_computed_again(model_dir: Path) -> None:
    """Forward and backward together: matmuls and attentions beyond those of keeping everything."""
    batch, weights = batch_of(40, 3, 25)

    def calls(policy: Policy, with_matmuls: int = 0) -> tuple[int, int, int]:
        module, activations = build(model_dir, policy)
        activations.with_matmuls = with_matmuls
        with Count() as count:
            gradients(module, batch, weights)
        attentions = sum(n for name, n in count.calls.items() if name.startswith("_scaled_dot") and "back" not in name)
        return count.calls["mm"], attentions, len(activations.layers)

    mm, attentions, layers = calls("none")
    assert calls("full")[:2] == (mm + 6 * layers, 2 * attentions)  # all but down_proj, whose output nobody needs
    assert calls("offload")[:2] == (mm + 6 * layers, attentions)
    assert calls("selective")[:2] == (mm + 6 * layers, attentions)
    assert calls("budget", 1)[:2] == (mm + 6 * (layers - 1), attentions)
    assert calls("budget", layers)[:2] == (mm, attentions)


def test_budget_with_inputs_and_attention_on_the_host(model_dir: Path) -> None:
    batch, weights = batch_of(40, 3, 25)
    truth = gradients(build(model_dir, "none")[0], batch, weights)
    module, activations = build(model_dir, "budget")
    activations.inputs_on_host = activations.attention_on_host = len(activations.layers)
    for with_matmuls in (0, 1, len(activations.layers)):
        activations.with_matmuls = with_matmuls
        for name, gradient in gradients(module, batch, weights).items():
            assert torch.equal(gradient, truth[name]), name
        assert not activations.kept.here, "nothing stays behind"
        assert not activations.kept.host.coming


def test_host_memory_of_the_measuring_micro_step_is_given_back_once(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """budget begins with the host; where the device then serves, nothing stays pinned. A later use keeps its buffers."""
    batch, weights = batch_of(40, 3, 25)
    truth = gradients(build(model_dir, "none")[0], batch, weights)
    module, activations = build(model_dir, "budget")
    # What the memory's measures say, micro-step by micro-step: the layers that it holds, and the tokens.
    micro_steps = [(-1, 68), (1, 10), (1, 68), (-1, 68), (1, 68)]
    fake = SimpleNamespace(
        fits_whole=lambda _: False, fitting=lambda *_, **__: holds, choose=lambda *_: 1, learn=lambda: None
    )
    activations.memory, fake.measured = fake, {True: 68}  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    buffers = []
    for holds, tokens in micro_steps:  # noqa: B007 - fake.fitting reads it
        activations.before(tokens)
        found = gradients(module, batch, weights)
        assert all(torch.equal(found[name], truth[name]) for name in truth)
        activations.after()
        buffers.append(len(activations.kept.host.buffers))
    assert buffers[0] > 0
    assert buffers == [buffers[0], buffers[0], 0, buffers[0], buffers[0]]


@pytest.mark.parametrize(("inputs", "kept"), [(2, 1), (2, 0), (1, 0), (0, 0)])
def test_offload_keeps_what_host_memory_holds(
    inputs: int, kept: int, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, weights = batch_of(40, 3, 25)
    truth = gradients(build(model_dir, "none")[0], batch, weights)
    module, activations = build(model_dir, "offload")
    assert len(activations.layers) == 2
    one_input = 68 * module.model.config.hidden_size * 4  # bytes, float32, of a layer
    one_attention = one_input + 68 * module.model.config.num_attention_heads * 4  # output and sums
    room = inputs * one_input + kept * one_attention
    monkeypatch.setattr(offload, "free_host_memory", lambda: int((room + 0.1 * one_input) / offload.SHARE))
    activations.before(68)
    with Count() as count:
        found = gradients(module, batch, weights)
    assert activations.describe(1) == f"in host memory: inputs of {inputs}, attention of {kept} of 2 layers"
    forwards = sum(n for name, n in count.calls.items() if name.startswith("_scaled_dot") and "back" not in name)
    assert forwards == 3 * (2 * 2 - kept), "three documents"
    assert sum(buffer.nbytes for buffer in activations.kept.host.buffers.values()) == room
    for name, gradient in found.items():
        assert torch.equal(gradient, truth[name]), name


def test_mlp_in_tiles(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, weights = batch_of(40, 3, 25)
    truth = gradients(build(model_dir, "none")[0], batch, weights)
    monkeypatch.setattr(offload, "TILE", 17)
    monkeypatch.setattr(offload, "TILE_FROM", 68)
    module, _ = build(model_dir, "offload")
    widest = 0

    def seen(_: object, args: tuple[torch.Tensor]) -> None:
        nonlocal widest
        widest = max(widest, args[0].shape[1])

    for name, part in module.named_modules():
        if name.endswith("gate_proj"):
            part.register_forward_pre_hook(seen)
    for name, gradient in gradients(module, batch, weights).items():
        assert (gradient - truth[name]).norm() <= 1e-6 * truth[name].norm(), name
    assert widest == 17


@pytest.mark.parametrize("limit", [1, 30, 44, 1000])
def test_slices_add_up_to_the_batch(limit: int, model_dir: Path) -> None:
    batch, weights = batch_of(40, 3, 25, 1, 17)
    module, _ = build(model_dir, "none")
    whole, slices = gradients(module, batch, weights), cut(batch, weights, limit)  # type: ignore[arg-type]
    assert torch.cat([piece.input_ids for piece, _ in slices], dim=1).equal(batch.input_ids)  # type: ignore[attr-defined]
    assert all(len(piece.n_target) == 1 or piece.input_ids.numel() <= limit for piece, _ in slices)
    assert len(slices) == {1: 5, 30: 3, 44: 2, 1000: 1}[limit]
    module.zero_grad()
    for piece, its_weights in slices:
        module(piece, its_weights)[0].backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad - whole[name]).norm() <= 1e-5 * whole[name].norm(), name  # type: ignore[operator]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_host_memory_is_registered_and_released_again_and_again() -> None:
    """Sizes below and above a page and malloc's thresholds, growing, in one offloader after another."""
    for _ in range(3):
        host = offload.Host()
        for numel in (5, 3000, 3001, 200_000, 2**24 + 1):
            tensors = {(0, place): torch.randn(numel + place, device="cuda") for place in range(3)}
            for key, tensor in tensors.items():
                host.leave(key, tensor)
            for key, tensor in tensors.items():
                assert torch.equal(host.take(key), tensor)
