"""Weights against the paper's formulas, cross-entropy against float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from longalign.data.batch import concatenate
from longalign.model import loss as module
from longalign.model.loss import StepTotals, batch_weights, token_losses

# Two packs of one step: targets per sequence. M = 4 sequences with a target, K = 2, N = 14.
PACKS = [[3, 1, 0], [2, 8]]
TOTALS = StepTotals(sequences=4, packs=2, targets=14)


def batch_of(counts: list[int]):
    ids = [np.arange(10 + n) for n in counts]
    labels = [np.array([-100] * 10 + [1] * n) for n in counts]
    return concatenate(ids, labels)


def expected(average: str, losses: list[list[np.ndarray]]) -> float:
    """Paper Eq. 2, Eq. 3 and the mean over tokens, written as they stand there."""
    with_target = [s for pack in losses for s in pack if len(s)]
    if average == "sequence":
        return float(np.mean([s.mean() for s in with_target]))
    if average == "pack":
        return float(np.mean([np.concatenate(pack).mean() for pack in losses]))
    return float(np.concatenate(with_target).mean())


@pytest.mark.parametrize("average", ["sequence", "pack", "token"])
@pytest.mark.parametrize("together", [True, False], ids=["one micro-step", "a pack at a time"])
def test_weighted_sum_is_the_papers_average(average: str, together: bool) -> None:
    rng = np.random.default_rng(0)
    losses = [[rng.random(n) for n in pack] for pack in PACKS]
    micro_steps = [[0, 1]] if together else [[0], [1]]
    total = torch.zeros(3)
    for packs in micro_steps:
        batch = batch_of([n for p in packs for n in PACKS[p]])
        pack_of_sample = torch.tensor([i for i, p in enumerate(packs) for _ in PACKS[p]])
        weights = batch_weights(average, batch, pack_of_sample, TOTALS)  # type: ignore[arg-type]
        values = torch.from_numpy(np.concatenate([s for p in packs for s in losses[p]])).float()
        total += values @ weights
    assert total[0] == pytest.approx(expected(average, losses), rel=1e-6)
    assert total[1] == pytest.approx(expected("sequence", losses), rel=1e-6)
    assert total[2] == pytest.approx(expected("token", losses), rel=1e-6)


@pytest.mark.parametrize("n", [0, 1, 5, 64, 131])
def test_token_losses_and_gradients_against_float64(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 64)
    torch.manual_seed(0)
    head = torch.nn.Linear(24, 101, bias=False)
    hidden = torch.randn(n, 24, requires_grad=True)
    targets, weights = torch.randint(101, (n,)), torch.rand(n)
    (token_losses(hidden, head, targets) * weights).sum().backward()
    hidden64 = hidden.detach().double().requires_grad_()
    weight64 = head.weight.detach().double().requires_grad_()
    log_p = (hidden64 @ weight64.T).log_softmax(-1)
    (-log_p[torch.arange(n), targets] * weights.double()).sum().backward()
    torch.testing.assert_close(hidden.grad.double(), hidden64.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(head.weight.grad.double(), weight64.grad, rtol=1e-5, atol=1e-6)


def test_the_weights_gradient_is_as_good_in_many_chunks_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, where 64 rounded additions lose a bit or two of the eight. With a bias."""
    torch.manual_seed(0)
    n, errors = 1024, {}
    hidden, head = torch.randn(n, 24).bfloat16(), torch.nn.Linear(24, 101).bfloat16()
    targets, weights = torch.randint(101, (n,)), torch.rand(n)
    wide = torch.nn.Linear(24, 101).double()
    wide.load_state_dict(head.state_dict())
    (-wide(hidden.double()).log_softmax(-1)[torch.arange(n), targets] * weights.double()).sum().backward()
    for chunk in (n, n // 64):
        monkeypatch.setattr(module, "CHUNK", chunk)
        head.zero_grad()
        (token_losses(hidden, head, targets) * weights).sum().backward()
        for ours, truth in zip(head.parameters(), wide.parameters(), strict=True):
            error = float((ours.grad.double() - truth.grad).norm() / truth.grad.norm())
            errors[chunk, truth.ndim] = error
    assert errors[n, 2] < 4e-3
    assert errors[n // 64, 2] < 1.5 * errors[n, 2]
    assert max(errors[n, 1], errors[n // 64, 1]) < 4e-3


def test_batch_of_the_docstring() -> None:
    batch = concatenate([np.array([5, 6, 7]), np.array([8, 9])], [np.array([-100, -100, 7]), np.array([-100, 9])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.target_rows.tolist() == [1, 3]
    assert batch.target_ids.tolist() == [7, 9]
    assert batch.target_sample.tolist() == [0, 1]
    assert batch.max_seqlen == 3


def test_targets_never_cross_documents() -> None:
    """The hidden state that predicts a target belongs to the target's own sample, for odd shapes too."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 9, rng.integers(1, 6))
        labels = [np.concatenate([[-100], np.where(rng.random(n - 1) < 0.5, 1, -100)]) for n in lengths]
        batch = concatenate([np.zeros(n, np.int64) for n in lengths], labels)
        sample_of_row = np.repeat(np.arange(len(lengths)), lengths)
        assert (sample_of_row[batch.target_rows.numpy()] == batch.target_sample.numpy()).all()
        assert batch.n_target.tolist() == [(row != -100).sum() for row in labels]


GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "loss" / "formula_cases.json").read_text())


def step_loss(average: str, losses: list[list[list[float]]], micro_steps: list[list[int]]) -> float:
    """The sum over micro-steps of weight * loss; losses[pack][sequence][token]."""
    counts = [[len(sequence) for sequence in pack] for pack in losses]
    totals = StepTotals(
        sequences=sum(n > 0 for pack in counts for n in pack),
        packs=sum(sum(pack) > 0 for pack in counts),
        targets=sum(map(sum, counts)),
    )
    total = 0.0
    for packs in micro_steps:
        batch = batch_of([n for p in packs for n in counts[p]])
        pack_of_sample = torch.tensor([i for i, p in enumerate(packs) for _ in counts[p]])
        weights = batch_weights(average, batch, pack_of_sample, totals)[:, 0].double()  # type: ignore[arg-type]
        total += float(weights @ torch.tensor([t for p in packs for s in losses[p] for t in s], dtype=torch.float64))
    return total


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_golden_losses(case: dict) -> None:
    packs = case["token_losses"]
    for micro_steps in ([list(range(len(packs)))], [[p] for p in range(len(packs))]):
        assert step_loss("sequence", packs, micro_steps) == pytest.approx(case["eq2"], rel=1e-6)
        assert step_loss("pack", packs, micro_steps) == pytest.approx(case["eq3"], rel=1e-6)
    for pack, counts in zip(case["per_token_weight_after_scaling"], case["N"], strict=True):
        for weight, n in zip(pack, counts, strict=True):  # the reference scales by K, and its devices average over K
            ours = module.token_weights("sequence", torch.tensor([n]), torch.tensor([n]), StepTotals(case["M"], 1, 1))
            assert float(ours) * case["K"] == pytest.approx(weight, rel=1e-12)


def test_golden_accumulation_is_the_whole_steps_average() -> None:
    """The reference takes M within each micro-step; Eq. 2 takes it over the step."""
    case = GOLDEN["gradient_accumulation"]
    packs = [pack for micro_step in case["micro_steps"] for pack in micro_step]
    for micro_steps in ([[0, 1], [2, 3]], [[0], [1], [2], [3]], [[3, 0, 1, 2]]):
        assert step_loss("sequence", packs, micro_steps) == pytest.approx(case["eq2_over_whole_batch"], rel=1e-7)
    assert abs(case["eq2_over_whole_batch"] - case["reference_loss_after_accumulation"]) > 0.1
