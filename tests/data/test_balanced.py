"""strategy=balanced: packs of like cost, little waiting, steps that are as good a sample of the data as random ones."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_from_disk

from longalign import launch
from longalign.data import plan as planning
from longalign.data.packing import (
    Packs,
    deal,
    dealt,
    epoch_packs,
    equal_cost,
    idle,
    idle_share,
    mean_over_max,
    stratify,
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
    chosen = strategy(name, window=5000, packs_per_step=RANKS * PER_RANK, **changes)
    return epoch_packs(lengths, chosen, MAX_LENGTH, 0, 0, cost=COST)


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
    assert waiting(packs_of("balanced", pack_tokens=3 * MAX_LENGTH // 2, strata=10**6)) < 0.01, "steps at random"
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
    costs = np.array([v.sum() for v in split(packs_of("balanced", pack_tokens=3 * MAX_LENGTH // 2), COST(LENGTHS))])
    assert costs.max() / costs.min() < 1.03
    assert COST(LENGTHS.max()) <= costs.max() <= 1.01 * COST(MAX_LENGTH)
    tokens = [v.sum() for v in split(packs_of("balanced", pack_tokens=70_000), LENGTHS)]
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


@pytest.mark.parametrize(("n", "per_step", "strata"), [(53, 10, 4), (64, 8, 4), (31, 6, 3), (12, 12, 1), (9, 2, 1)])
def test_steps_have_a_run_of_every_stratum(n: int, per_step: int, strata: int) -> None:
    costs = np.random.default_rng(0).permutation(n).astype(float)
    order = stratify(costs, per_step, strata, np.random.default_rng(1))
    assert sorted(order.tolist()) == list(range(n))
    steps = n // per_step
    kept = np.sort(costs[order[: steps * per_step]])
    place = np.searchsorted(kept, costs[order[: steps * per_step]]).reshape(steps, per_step)
    for step in np.sort(place, axis=1):
        assert (np.diff(step) > 1).sum() <= strata - 1, "runs of neighbours, one for each stratum"
        assert {int(p * strata / len(kept)) for p in step} == set(range(strata)) or per_step % strata


def test_steps_too_small_for_runs_are_random() -> None:
    costs = np.arange(1000.0)
    pairs = np.sort(stratify(costs, 2, 4, np.random.default_rng(0)).reshape(-1, 2), axis=1)
    assert np.diff(pairs).mean() == pytest.approx(1000 / 3, rel=0.1), "as far apart as two random numbers"


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


@pytest.mark.parametrize(("ranks", "per"), [(1, 1), (2, 1), (3, 2), (4, 3), (64, 1)])
def test_dealt_is_what_deal_does(ranks: int, per: int) -> None:
    rng = np.random.default_rng(0)
    sizes = [7, 7, 12, 1, 3]
    step = np.repeat(np.arange(5, 10), sizes)
    cost, values = rng.random(len(step)), rng.random(len(step))
    found, starts = dealt(step, cost, values, ranks, per), np.cumsum([0, *sizes])
    busy, time = 0.0, 0.0
    for n, (start, stop) in enumerate(pairwise(starts)):
        micro_steps = deal(cost[start:stop].tolist(), ranks, per)
        for m, of_ranks in enumerate(micro_steps):
            assert found[n, m].tolist() == pytest.approx([values[start:stop][mine].sum() for mine in of_ranks])
        assert not found[n, len(micro_steps) :].any()
        busy += cost[start:stop].sum()
        time += cost[start:stop].sum() / (1 - idle_share(cost[start:stop].tolist(), ranks, per))
    assert idle(dealt(step, cost, cost, ranks, per)) == pytest.approx(1 - busy / time)


def test_mean_over_max() -> None:
    assert mean_over_max(np.array([[[1.0, 3.0], [3.0, 1.0]]])) == 1
    assert mean_over_max(np.array([[[1.0, 3.0]], [[2.0, 2.0]]])) == pytest.approx((2 / 3 + 1) / 2)
    assert mean_over_max(np.zeros((3, 1, 2))) == 1


def test_cost_is_fitted_to_seconds() -> None:
    documents = [[65536], [1024] * 64, [30000, 20000, 1000], [8192] * 8]
    seconds = [sum(7e-5 * s + 1.5e-9 * s * s for s in pack) for pack in documents]
    assert fit(documents, seconds) == pytest.approx((7e-5, 1.5e-9))
    noisy = fit(documents, [s * f for s, f in zip(seconds, (1.02, 0.98, 1.01, 0.99), strict=True)])
    assert noisy == pytest.approx((7e-5, 1.5e-9), rel=0.1)
    for alike in ([[1024] * 64], [[1024] * 64, [1024] * 32]):
        with pytest.raises(ValueError, match="pack"):
            fit(alike, [1.0, 0.5][: len(alike)])


def test_the_plan_and_its_manifest(tmp_path: Path, run_config: Callable[..., Config], data_dir: Path) -> None:
    words = ["strategy=balanced", "strategy.packs_per_step=4", "strategy.pack_tokens=200", "strategy.cost=[2,0.5]"]
    manifest = planning.group(run_config(tmp_path, *words, "strategy.strata=2", "epochs=2"), tmp_path / "plan")
    length = np.array(load_from_disk(str(data_dir))["length"])
    rows = pq.read_table(tmp_path / "plan" / "plan.parquet").to_pylist()
    for row in rows:
        s = length[row["sample_ids"]]
        assert row["tokens"] == s.sum() <= 200
        assert row["cost"] == pytest.approx((2 * s + 0.5 * s**2).sum())
    for epoch, told in enumerate(manifest["epochs"]):
        mine = [row for row in rows if row["epoch"] == epoch]
        assert sorted(s for row in mine for s in row["sample_ids"]) == list(range(27))
        assert told["fill_ratio"] == pytest.approx(length.sum() / len(mine) / 200, abs=1e-4)
        assert told["balance"].keys() == {"2 ranks", "8 ranks"}
        step = np.array([row["step"] for row in mine])
        cost = np.array([row["cost"] for row in mine])
        attention = np.array([0.5 * (length[row["sample_ids"]] ** 2.0).sum() for row in mine])
        even = {"step": [], "attention": []}  # type: ignore[var-annotated]
        for number in np.unique(step):
            here = np.flatnonzero(step == number)
            of_ranks = [[p for micro in deal(cost[here].tolist(), 2) for p in micro[rank]] for rank in range(2)]
            for key, values in (("step", cost), ("attention", attention)):
                sums = [values[here][mine_].sum() for mine_ in of_ranks]
                even[key].append(np.mean(sums) / max(sums))
        for key, values in even.items():
            assert told["balance"]["2 ranks"][key] == pytest.approx(np.mean(values), abs=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["strategy.pack_tokens=100"], r"strategy.pack_tokens=100 is less than the longest sample, 128 tokens"),
        (["shuffle=false", "strategy.packer=next_fit"], "shuffle=false keeps the order"),
    ],
)
def test_what_is_refused(words: list[str], said: str, tmp_path: Path, run_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=said):
        planning.group(run_config(tmp_path, "strategy=balanced", *words), tmp_path / "plan")
    assert not (tmp_path / "plan").exists()


def test_train_tells_how_long_ranks_wait(tmp_path: Path, run_config: Callable[..., Config], data_dir: Path) -> None:
    def told(ranks: int, *words: str) -> str:
        config = run_config(tmp_path, "strategy=balanced", *words)
        planning.group(config, tmp_path / "plan")
        return launch.waiting(config, planning.Plan(tmp_path / "plan", read_json(data_dir / "manifest.json")), ranks)

    assert told(1) == "0.0% of the time of 1 ranks, if all wait at every micro-step"
    assert told(8, "strategy.packs_per_step=4").endswith(
        "; less with strategy.packs_per_step=32 or a larger strategy.pack_tokens"
    )
