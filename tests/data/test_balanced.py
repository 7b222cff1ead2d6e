"""strategy=balanced: packs of like cost, little waiting, steps that are as good a sample of the data as random ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from longalign import launch
from longalign.data import plan as planning
from longalign.data.packing import (
    Packs,
    deal,
    epoch_packs,
    equal_cost,
    idle_share,
)
from longalign.errors import UserError
from longalign.files import read_json
from longalign.forecast.gpus import H200
from longalign.forecast.predict import predict
from longalign.model.cost import Cost, cost_of, fit
from longalign.schema import Config
from tests.data.test_plan import MIX, strategy

LLAMA2_7B = {"layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "kv_heads": 32, "head_dim": 128}
COST = cost_of(LLAMA2_7B)
MAX_LENGTH, RANKS, PER_RANK = 65536, 8, 4
LENGTHS = np.random.default_rng(0).choice(MIX, 40_000)  # some 100 steps


def packs_of(name: str, lengths: np.ndarray = LENGTHS, **changes: object) -> Packs:
    """balanced: with the packer of conf/strategy/balanced.yaml if none is given."""
    settings = {"packer": "spread" if name == "balanced" else "best_fit", "window": 5000} | changes
    return epoch_packs(
        lengths, strategy(name, packs_per_step=RANKS * PER_RANK, **settings), MAX_LENGTH, 0, 0, cost=COST
    )


def split(packs: Packs, values: np.ndarray) -> list[np.ndarray]:
    """The values of each pack's samples."""
    return np.split(values[packs.samples], packs.offsets[1:-1])


def whole_steps(packs: Packs, values: np.ndarray) -> np.ndarray:
    """The sums of `values` over each pack, [steps, packs of a step], without a shorter last step."""
    sums, size = np.array([v.sum() for v in split(packs, values)]), RANKS * PER_RANK
    return sums[: len(sums) // size * size].reshape(-1, size)


def waiting(packs: Packs) -> float:
    """Of all ranks' time in an epoch's whole steps, dealt as in training."""
    steps = whole_steps(packs, COST(LENGTHS))
    time = sum(costs.sum() / (1 - idle_share(costs.tolist(), RANKS)) for costs in steps)
    return 1 - steps.sum() / time


def test_waiting_is_under_5_percent_where_packing_waits_more() -> None:
    assert waiting(packs_of("balanced")) < 0.01
    assert waiting(packs_of("packing", packer="equal_cost", pack_tokens=3 * MAX_LENGTH // 2)) < 0.01, "steps at random"
    assert waiting(packs_of("packing", packer="next_fit")) > 0.12
    assert waiting(packs_of("packing")) > 0.07


def test_waiting_by_predicted_seconds() -> None:
    """Not only by the FLOPs that the plan goes by."""
    packs = packs_of("balanced", MIX)
    passes = [predict(pack, LLAMA2_7B, H200, "selective", 30e9) for pack in split(packs, MIX)]
    times = np.array([one.seconds for one in passes if one])
    costs, size = whole_steps(packs, COST(MIX)), RANKS * PER_RANK
    of_steps = zip(times[: costs.size].reshape(costs.shape), costs, strict=True)
    slowest = sum(
        max(own[p] for mine in micro for p in mine) for own, c in of_steps for micro in deal(c.tolist(), RANKS)
    )
    assert len(times) == len(packs.offsets) - 1
    assert 1 - times[: len(costs) * size].sum() / RANKS / slowest < 0.05


def test_larger_packs_cost_the_same() -> None:
    costs = np.array(
        [
            v.sum()
            for v in split(packs_of("balanced", packer="equal_cost", pack_tokens=3 * MAX_LENGTH // 2), COST(LENGTHS))
        ]
    )
    assert costs.max() / costs.min() < 1.03
    assert COST(LENGTHS.max()) <= costs.max() <= 1.01 * COST(MAX_LENGTH)
    tokens = [v.sum() for v in split(packs_of("balanced", packer="equal_cost", pack_tokens=70_000), LENGTHS)]
    assert MAX_LENGTH < max(tokens) <= 70_000


def spread(sums: np.ndarray) -> float:
    return float(sums.std() / sums.mean())


def test_steps_are_no_worse_a_sample_than_random_ones() -> None:
    """Long samples and cost are spread over steps more evenly than over random batches; sorting steps is far off."""
    is_long = (LENGTHS > 8192).astype(float)
    balanced, by_cost = packs_of("balanced"), packs_of("balanced", strata=1)
    n = len(LENGTHS) // len(whole_steps(balanced, is_long))
    drawn = np.random.default_rng(1).permutation(len(LENGTHS))[: len(LENGTHS) // n * n].reshape(-1, n)
    for values in (is_long, COST(LENGTHS)):
        random = spread(values[drawn].sum(1))
        assert spread(whole_steps(balanced, values).sum(1)) < random
        assert spread(whole_steps(by_cost, values).sum(1)) > 1.15 * random
    sequences = whole_steps(balanced, np.ones(len(LENGTHS))).sum(1)
    best_fit = whole_steps(packs_of("packing"), np.ones(len(LENGTHS))).sum(1)
    assert spread(sequences) < 0.2 < spread(best_fit)
    mean_length = whole_steps(balanced, LENGTHS).sum(1) / sequences
    assert abs(np.corrcoef(np.arange(len(mean_length)), mean_length)[0, 1]) < 4 / np.sqrt(len(mean_length))


def test_equal_cost_by_hand() -> None:
    square = Cost(1e-9, 1.0)
    packs = lambda lengths, tokens: sorted(
        sorted(lengths[s] for s in pack)
        for pack in split(
            equal_cost(np.array(lengths), square, tokens, 1e9, np.arange(len(lengths)), 100), np.arange(99)
        )
    )
    assert packs([8, 1, 1, 1, 1, 1, 1, 1, 1], 8) == [[1] * 8, [8]]
    assert packs([5, 5, 5], 8) == [[5], [5], [5]], "nothing fits: a new pack"
    assert packs([4, 3, 2, 1], 5) == [[1, 4], [2, 3]]
    assert packs([7], 8) == [[7]]


def test_cost_is_fitted_to_seconds() -> None:
    documents = [[65536], [1024] * 64, [30000, 20000, 1000], [8192] * 8]
    seconds = [sum(7e-5 * s + 1.5e-9 * s * s for s in pack) for pack in documents]
    assert fit(documents, seconds) == pytest.approx((7e-5, 1.5e-9))
    noisy = fit(documents, [s * f for s, f in zip(seconds, (1.02, 0.98, 1.01, 0.99), strict=True)])
    assert noisy == pytest.approx((7e-5, 1.5e-9), rel=0.1)
    for alike in ([[1024] * 64], [[1024] * 64, [1024] * 32]):
        with pytest.raises(ValueError, match="pack"):
            fit(alike, [1.0, 0.5][: len(alike)])


def test_train_tells_how_long_ranks_wait(tmp_path: Path, run_config: Callable[..., Config], data_dir: Path) -> None:
    config = run_config(tmp_path, "strategy=balanced", "strategy.packs_per_step=4", "epochs=2")
    planning.group(config, tmp_path / "plan")
    plan = planning.Plan(tmp_path / "plan", read_json(data_dir / "manifest.json"))
    assert launch.waiting(config, plan, 1) == "0.0% of the time of 1 ranks, if all wait at every micro-step"
    costs = [[pack.cost for pack in plan.step(n)] for n in range(1, plan.n_steps + 1)]
    of_epochs = [[c for n, c in enumerate(costs, 1) if plan.epoch(n) == epoch] for epoch in range(2)]
    shares = [1 - sum(map(sum, e)) / 3 / sum(c for step in e for c in sorted(step)[::-3]) for e in of_epochs]
    assert launch.waiting(config, plan, 3).startswith(f"{np.mean(shares):.1%} of the time of 3 ranks")
    assert launch.waiting(config, plan, 8).endswith("; less with strategy.packs_per_step=32")


def test_packs_of_more_tokens_than_max_length(
    tmp_path: Path, run_config: Callable[..., Config], data_dir: Path
) -> None:
    words = ["strategy=balanced", "strategy.packer=equal_cost", "strategy.pack_tokens=200", "epochs=1"]
    manifest = planning.group(run_config(tmp_path, *words), tmp_path / "plan")
    rows = pq.read_table(tmp_path / "plan" / "plan.parquet").to_pylist()
    assert sorted(s for row in rows for s in row["sample_ids"]) == list(range(27))
    assert 128 < max(row["tokens"] for row in rows) <= 200
    told = manifest["epochs"][0]
    assert told["fill_ratio"] == pytest.approx(told["tokens"] / len(rows) / 200, abs=1e-4)
    with pytest.raises(UserError, match=r"strategy.pack_tokens=100 is less than the longest sample, 128 tokens"):
        planning.group(run_config(tmp_path, "strategy.pack_tokens=100"), tmp_path / "other")
    assert not (tmp_path / "other").exists()
