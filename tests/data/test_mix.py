"""How often each sample stands in the epochs of a plan, by source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_from_disk

from longalign.config import compose_config
from longalign.data import plan as planning
from longalign.data.batch import load_batch
from longalign.data.mix import epoch_samples, loss_weights
from longalign.data.packing import epoch_packs, packs_per_step
from longalign.errors import UserError
from longalign.model.cost import Cost
from longalign.model.loss import StepTotals, micro_batch
from longalign.schema import Config, Mix
from longalign.verify.data import check_plan

SIZES = {"a": 7, "b": 40, "c": 1}
SOURCE = np.random.default_rng(0).permutation(np.repeat(np.arange(3), list(SIZES.values())))


def epochs(n: int, seed: int = 0, **mix: Mix) -> list[np.ndarray]:
    return [epoch_samples(SOURCE, list(SIZES), mix, seed, epoch) for epoch in range(n)]


def test_without_a_mix_every_sample_once_in_order() -> None:
    for chosen in epochs(3):
        assert chosen.tolist() == list(range(len(SOURCE)))


@pytest.mark.parametrize("weight", [0, 0.1, 0.25, 0.5, 1, 1.5, 2, 2.5, 3.3])
def test_samples_are_seen_evenly_and_as_often_as_the_weight_says(weight: float) -> None:
    seen = np.zeros(len(SOURCE), int)
    for number, chosen in enumerate(epochs(40, b=Mix(weight=weight)), start=1):
        times = np.bincount(chosen, minlength=len(SOURCE))
        seen += times
        assert (times[SOURCE != 1] == 1).all(), "other sources are left alone"
        exactly = Fraction(str(weight))
        assert np.isin(times[SOURCE == 1], (int(exactly), -int(-exactly // 1))).all()
        assert seen[SOURCE == 1].max() - seen[SOURCE == 1].min() <= 1
        assert abs(seen[SOURCE == 1].sum() - number * exactly * SIZES["b"]) <= Fraction(1, 2)
    assert (seen[SOURCE == 1] == 40 * Fraction(str(weight))).all(), "40 epochs are whole turns of every weight here"


def test_two_halves_make_a_whole_and_a_seed_chooses_them() -> None:
    first, second = epochs(2, a=Mix(weight=0), b=Mix(weight=0.5), c=Mix(weight=0))
    assert len(first) == len(second) == 20
    assert sorted([*first, *second]) == np.flatnonzero(SOURCE == 1).tolist()
    other = epochs(1, seed=1, a=Mix(weight=0), b=Mix(weight=0.5), c=Mix(weight=0))[0]
    assert sorted(other) != sorted(first)


def test_max_samples_caps_an_epoch_and_all_are_seen_in_turn() -> None:
    chosen = epochs(5, b=Mix(weight=2, max_samples=16), a=Mix(max_samples=100))
    assert [Counter(SOURCE[c])[1] for c in chosen] == [16] * 5
    assert [Counter(SOURCE[c])[0] for c in chosen] == [7] * 5
    assert Counter(s for c in chosen for s in c if SOURCE[s] == 1) == dict.fromkeys(np.flatnonzero(SOURCE == 1), 2)


STRATEGIES = [
    ["strategy=naive", "strategy.batch_size=5"],
    ["strategy=sorted", "strategy.batch_size=5"],
    ["strategy=packing", "strategy.packer=next_fit"],
    ["strategy=packing+weighting"],
]


@pytest.mark.parametrize("words", STRATEGIES, ids=lambda words: " ".join(words))
def test_plans_hold_the_mix(
    words: list[str], tmp_path: Path, run_config: Callable[..., Config], data_dir: Path
) -> None:
    mix = ["mix.long.weight=2.5", "mix.short.max_samples=5"]
    config = run_config(tmp_path, *words, *mix, "epochs=4", "seed=3")
    manifest = planning.group(config, tmp_path / "plan")
    dataset = load_from_disk(str(data_dir))
    source, length, n_target = (dataset[name][:] for name in ("source", "length", "n_target"))
    seen: Counter[int] = Counter()
    for epoch, told in enumerate(manifest["epochs"]):
        rows = [row for row in pq.read_table(tmp_path / "plan" / "plan.parquet").to_pylist() if row["epoch"] == epoch]
        ids = [sample for row in rows for sample in row["sample_ids"]]
        seen.update(ids)
        assert all(row["tokens"] == sum(length[s] for s in row["sample_ids"]) <= 128 for row in rows)
        assert all(row["n_sequences"] == len(row["sample_ids"]) for row in rows)
        for name, entry in told["sources"].items():
            mine = [s for s in ids if source[s] == name]
            sums = (len(mine), sum(length[s] for s in mine), sum(n_target[s] for s in mine))
            assert (entry["samples"], entry["tokens"], entry["targets"]) == sums
            assert entry["samples"] in {"long": (22, 23), "short": (5,)}[name]
    assert {times for s, times in seen.items() if source[s] == "long"} == {10}, "9 samples x 2.5 x 4 epochs"
    assert {seen[s] for s in range(27) if source[s] == "short"} == {1, 2}, "20 places for 18 samples"
    checks = check_plan(tmp_path / "plan", dataset, 4, 128)
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("words", [*STRATEGIES, ["strategy=balanced"], ["strategy=packing", "strategy.average=token"]])
def test_a_plan_tells_what_a_source_weighs(
    words: list[str], tmp_path: Path, run_config: Callable[..., Config], data_dir: Path
) -> None:
    """Against the weights that training gives every target."""
    config = run_config(tmp_path, *words, "mix.long.weight=2", "epochs=2")
    manifest = planning.group(config, tmp_path / "plan")
    dataset, data = planning.read_data(str(data_dir))
    plan, source = planning.Plan(tmp_path / "plan", data), dataset["source"][:]
    weighed = [dict.fromkeys(("long", "short"), 0.0) for _ in range(2)]
    for step in range(1, plan.n_steps + 1):
        totals = StepTotals.of(plan.step(step))
        for pack in plan.step(step):
            batch, weights = micro_batch(dataset, [pack], config.strategy.average, totals)
            sample = torch.searchsorted(batch.cu_seqlens, batch.target_rows, right=True) - 1
            for place, weight in zip(sample.tolist(), weights[:, 0].tolist(), strict=True):
                weighed[plan.epoch(step)][source[pack.sample_ids[place]]] += weight
    for epoch, told in enumerate(manifest["epochs"]):
        for name, entry in told["sources"].items():
            assert entry["loss_weight"] == pytest.approx(weighed[epoch][name] / told["steps"], abs=1e-4)
        assert 0.05 < told["sources"]["short"]["loss_weight"] < 0.95


@pytest.mark.parametrize(
    ("words", "least", "most"),
    [
        (["strategy=packing+weighting"], 0.98, 1.02),
        (["strategy=balanced"], 0.98, 1.02),
        (["strategy=naive"], 0.98, 1.02),
        (["strategy=packing+weighting", "strategy.packer=next_fit"], 1.05, 1.25),
        (["strategy=packing+weighting", "strategy.packer=best_fit"], 1.8, 3.0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_long_samples_weigh_what_they_are_among_all(words: list[str], least: float, most: float) -> None:
    """The default packer keeps the mixture of the paper's lengths, one in eight of them long; the others do not."""
    rng = np.random.default_rng(0)
    short = rng.lognormal(np.log(800), 1, 17_500).clip(16, 8191)
    length = np.concatenate([rng.uniform(8192, 65536, 2500), short])[rng.permutation(20_000)].astype(np.int64)
    strategy = compose_config("group", words).strategy
    packs = epoch_packs(length, strategy, 65536, seed=1, epoch=0, cost=Cost(1.0, 1e-5))
    n_target, source = np.full(len(length), 300), (length >= 8192).astype(np.int32)
    weight = loss_weights(packs, n_target, source, 2, strategy.average, packs_per_step(strategy))
    assert weight.sum() == pytest.approx(1)
    assert least < weight[1] / source.mean() < most


def test_verify_sees_a_plan_that_is_not_its_mix(
    tmp_path: Path, run_config: Callable[..., Config], data_dir: Path
) -> None:
    planning.group(run_config(tmp_path, "epochs=1"), tmp_path / "plan")
    manifest = (tmp_path / "plan" / "manifest.json").read_text()
    wrong = manifest.replace('"mix": {}', '"mix": {"short": {"weight": 2}}')
    (tmp_path / "plan" / "manifest.json").write_text(wrong)
    missing = check_plan(tmp_path / "plan", load_from_disk(str(data_dir)), 1, 128)[0]
    assert missing.figure == 18


def test_two_copies_in_a_pack_are_two_sequences(data_dir: Path) -> None:
    batch, alone = (load_batch(load_from_disk(str(data_dir)), ids) for ids in ([3, 3], [3]))
    assert batch.input_ids[0].tolist() == 2 * alone.input_ids[0].tolist()
    assert batch.position_ids[0].tolist() == 2 * alone.position_ids[0].tolist()
    assert batch.n_target.tolist() == 2 * alone.n_target.tolist()


def test_a_changed_mix_makes_a_plan_stale(tmp_path: Path, run_config: Callable[..., Config]) -> None:
    planning.group(run_config(tmp_path), tmp_path / "plan")
    data = planning.read_data(run_config(tmp_path).data_dir)[1]
    fresh = lambda *words: planning.is_fresh(tmp_path / "plan", planning.identity(run_config(tmp_path, *words), data))
    assert fresh()
    assert not fresh("mix.long.weight=2")


def test_mistakes(tmp_path: Path, run_config: Callable[..., Config], base_words: list[str]) -> None:
    with pytest.raises(UserError, match=r"mix\.lnog: the data has no such source, only long, short"):
        planning.group(run_config(tmp_path, "mix.lnog.weight=2"), tmp_path / "plan")
    with pytest.raises(UserError, match="mix leaves no sample for epoch 0"):
        planning.group(run_config(tmp_path, "mix={long: {weight: 0}, short: {weight: 0}}"), tmp_path / "plan")
    with pytest.raises(UserError, match=r"mix\.long\.weight=-1 is not allowed"):
        compose_config("group", [*base_words, "mix.long.weight=-1"])
    with pytest.raises(UserError, match=r"unknown key 'mix\.long\.wieght'"):
        compose_config("group", [*base_words, "mix.long.wieght=1"])
