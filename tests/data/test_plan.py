"""Properties of plans: nothing lost, nothing too long, the same from the same seed; and the reference's packs, corrected."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from longalign.data import plan as planning
from longalign.data.packing import (
    Packs,
    balance,
    best_fit,
    deal,
    epoch_packs,
    idle_share,
    next_fit,
    sort_in_runs,
    spread,
)
from longalign.data.plan import Plan, read_data
from longalign.errors import UserError
from longalign.files import read_json, write_json
from longalign.model.cost import Cost
from longalign.schema import Config, Strategy
from tests.conftest import conversation, write_jsonl

MIX = np.load(Path(__file__).parent.parent / "fixtures" / "lengths.npy")  # 5,000 samples of 30 to 65,536 tokens


def strategy(name: str, **changes: object) -> Strategy:
    values = {"average": "sequence", "batch_size": 96, "group_size": 8, "packs_per_step": 8}
    values |= {"packer": "best_fit", "window": 1000, "strata": 4, "pack_tokens": None, "cost": None}
    return Strategy(**{"name": name, **values, **changes})  # type: ignore[arg-type]


ALL = [
    strategy("naive"),
    strategy("sorted"),
    strategy("packing", packer="next_fit"),
    strategy("packing"),
    strategy("packing", window=7),
    strategy("balanced", packer="spread"),
    strategy("balanced", packer="next_fit", packs_per_step=6, strata=3),
    strategy("balanced", packer="equal_cost", window=700),
]
BALANCED = strategy("balanced", packer="spread", packs_per_step=32, window=5000)
COST = Cost(linear=6 * 32 * 202e6, quadratic=6 * 32 * 4096)  # Llama-2-7B's


def packs_of(chosen: Strategy) -> Packs:
    return epoch_packs(MIX, chosen, 65536, 0, 0, cost=COST)


def sizes(packs: Packs, lengths: np.ndarray) -> np.ndarray:
    return np.add.reduceat(lengths[packs.samples], packs.offsets[:-1])


@pytest.mark.parametrize("chosen", ALL, ids=lambda s: f"{s.name}-{s.packer}-{s.window}")
def test_every_sample_once_and_no_pack_too_long(chosen: Strategy) -> None:
    packs = packs_of(chosen)
    assert sorted(packs.samples.tolist()) == list(range(len(MIX)))
    assert packs.offsets[0] == 0
    assert packs.offsets[-1] == len(MIX)
    assert (np.diff(packs.offsets) > 0).all()
    assert sizes(packs, MIX).max() <= 65536
    assert sizes(packs, MIX).sum() == MIX.sum()


@pytest.mark.parametrize("chosen", ALL, ids=lambda s: f"{s.name}-{s.packer}-{s.window}")
def test_seed_and_epoch_decide(chosen: Strategy) -> None:
    make = lambda seed, epoch: epoch_packs(MIX, chosen, 65536, seed, epoch, cost=COST).samples.tolist()
    assert make(1, 0) == make(1, 0)
    assert make(1, 0) != make(2, 0)
    assert make(1, 0) != make(1, 1)


def test_without_shuffle_samples_keep_their_order() -> None:
    for chosen in (strategy("naive"), strategy("packing", packer="next_fit")):
        assert epoch_packs(MIX, chosen, 65536, 0, 0, shuffle=False).samples.tolist() == list(range(len(MIX)))


def test_next_fit_allows_an_exact_fill_and_keeps_the_last_pack() -> None:
    packs = next_fit(np.array([3, 5, 4, 8, 1]), 8, np.arange(5))
    assert packs.offsets.tolist() == [0, 2, 3, 4, 5]


def test_best_fit_fills_packs() -> None:
    packs = best_fit(MIX, 65536, np.random.default_rng(0).permutation(len(MIX)), 5000)
    assert sizes(packs, MIX).sum() / (len(packs.offsets) - 1) / 65536 > 0.99
    assert best_fit(np.array([5, 3, 4, 4]), 8, np.arange(4), 4).offsets.tolist() == [0, 2, 4]


@pytest.mark.parametrize(("n", "group_size"), [(24, 8), (25, 8), (7, 8), (16, 1)])
def test_sorted_runs_are_neighbours_and_nobody_is_dropped(n: int, group_size: int) -> None:
    lengths = np.random.default_rng(0).permutation(n) + 1  # a length is its place in length order
    order = sort_in_runs(lengths, group_size, np.random.default_rng(1))
    assert sorted(order.tolist()) == list(range(n))
    for start in range(0, n, group_size):
        run = np.sort(lengths[order[start : start + group_size]])
        assert run[-1] - run[0] == len(run) - 1
    if n > group_size > 1:
        assert lengths[order].tolist() != sorted(lengths), "runs come in random order"


@pytest.mark.parametrize(("packs", "ranks", "per"), [(8, 2, 1), (5, 2, 1), (1, 4, 1), (9, 2, 4), (3, 3, 2)])
def test_deal_gives_every_pack_to_one_rank(packs: int, ranks: int, per: int) -> None:
    costs = np.random.default_rng(0).random(packs).tolist()
    dealt = deal(costs, ranks, per)
    assert sorted(p for micro in dealt for rank in micro for p in rank) == list(range(packs))
    assert all(len(micro) == ranks for micro in dealt)
    assert all(len(rank) <= per for micro in dealt for rank in micro)
    assert len(dealt) == -(-packs // (ranks * per))


def test_idle_share() -> None:
    assert idle_share([1.0, 1.0], 2) == 0
    assert idle_share([1.0], 4) == 0.75
    assert idle_share([4.0, 4.0, 1.0, 1.0], 2) == 0, "equal packs run at the same time"


@pytest.mark.parametrize(("packs", "per_step", "ranks"), [(40, 8, 2), (41, 8, 3), (5, 8, 2), (7, 1, 4), (90, 9, 16)])
def test_balance_is_what_dealing_gives(packs: int, per_step: int, ranks: int) -> None:
    costs = np.random.default_rng(packs).random(packs)
    steps = [costs[at : at + per_step].tolist() for at in range(0, packs, per_step)]
    busy = sum(max(costs[p] for rank in micro for p in rank) for costs in steps for micro in deal(costs, ranks))
    assert balance(costs, per_step, ranks) == pytest.approx(costs.sum() / ranks / busy)
    assert balance(costs, per_step, ranks, 2 * costs) == pytest.approx(balance(costs, per_step, ranks))
    assert balance(costs, per_step, 1) == pytest.approx(1)


def balanced_at(chosen: Strategy, ranks: int) -> float:
    return balance(np.add.reduceat(COST(MIX)[packs_of(chosen).samples], packs_of(chosen).offsets[:-1]), 32, ranks)


def test_balanced_ranks_do_not_wait() -> None:
    """Eight ranks, four packs each: under 5% idle, and more for packing."""
    assert 1 - balanced_at(BALANCED, 8) < 0.02
    assert 1 - balanced_at(BALANCED, 4) < 0.02, "fewer ranks than a group has packs"
    assert 1 - balanced_at(strategy("packing", packs_per_step=32), 8) > 0.05


def scatter(chosen: Strategy) -> float:
    """The standard deviation over steps of the mean length of their samples."""
    packs = packs_of(chosen)
    whole = (len(packs.offsets) - 1) // chosen.packs_per_step * chosen.packs_per_step
    bounds = packs.offsets[: whole + 1 : chosen.packs_per_step].tolist()
    return float(np.std([MIX[packs.samples[a:b]].mean() for a, b in pairwise(bounds)]))


def test_balanced_steps_are_more_alike_than_random_ones() -> None:
    random = scatter(strategy("packing", packs_per_step=32))
    assert scatter(BALANCED) < 0.5 * random
    assert scatter(BALANCED.model_copy(update={"strata": 1})) > 2 * scatter(BALANCED), "sorted by cost"


def test_spread_fills_packs_and_mixes_long_and_short() -> None:
    order = np.random.default_rng(0).permutation(len(MIX))
    packs = spread(MIX, 65536, order, 5000)
    assert sizes(packs, MIX).sum() / (len(packs.offsets) - 1) / 65536 > 0.99
    alone = lambda packs: sum(MIX[p].max() < 8192 for p in np.split(packs.samples, packs.offsets[1:-1]))
    assert alone(packs) == 0 < alone(best_fit(MIX, 65536, order, 5000)), "packs of short samples alone"
    assert spread(np.array([7, 7, 7, 1]), 8, np.arange(4), 4).offsets.tolist() == [0, 2, 3, 4], "nothing is dropped"


def test_costs_given_replace_those_of_the_model() -> None:
    by_tokens = epoch_packs(MIX, BALANCED, 65536, 0, 0, cost=Cost(1.0, 0.0)).samples.tolist()
    assert by_tokens != packs_of(BALANCED).samples.tolist()


def test_strata_that_do_not_fit_a_step(tmp_path: Path, run_config: Callable[..., Config]) -> None:
    config = run_config(tmp_path, "strategy=balanced", "strategy.packs_per_step=6")
    with pytest.raises(UserError, match=r"strategy\.strata=4 does not divide strategy\.packs_per_step=6"):
        planning.group(config, tmp_path / "plan")


def test_cost_of_the_plan_can_be_given(tmp_path: Path, run_config: Callable[..., Config]) -> None:
    config = run_config(tmp_path, "strategy=balanced", "strategy.cost=[2,0.5]", "epochs=1")
    manifest = planning.group(config, tmp_path / "plan")
    table = pq.read_table(tmp_path / "plan" / "plan.parquet").to_pylist()
    lengths = {row["sample_id"]: row["length"] for row in read_data(config.data_dir)[0]}
    for row in table:
        mine = [lengths[i] for i in row["sample_ids"]]
        assert row["cost"] == sum(2 * s + 0.5 * s * s for s in mine)
    assert set(manifest["epochs"][0]["balance"]) == {"2", "8", "64"}


def test_plan_file(tmp_path: Path, run_config: Callable[..., Config], data_dir: Path) -> None:
    config = run_config(tmp_path, "strategy=packing", "strategy.packs_per_step=3", "epochs=3")
    manifest = planning.group(config, tmp_path / "plan")
    table = pq.read_table(tmp_path / "plan" / "plan.parquet")
    assert table.schema.names == [f.name for f in planning.SCHEMA]
    assert table["epoch"].to_pylist() == sorted(table["epoch"].to_pylist())
    assert table["pack"].to_pylist() == list(range(len(table)))
    data = read_json(data_dir / "manifest.json")
    plan = Plan(tmp_path / "plan", data)
    seen: dict[int, list[int]] = {}
    for step in range(1, plan.n_steps + 1):
        packs = plan.step(step)
        assert 1 <= len(packs) <= 3
        for pack in packs:
            assert pack.tokens <= 128
            assert pack.n_sequences == len(pack.sample_ids)
            seen.setdefault(plan.epoch(step), []).extend(pack.sample_ids)
    assert {epoch: sorted(ids) for epoch, ids in seen.items()} == {e: list(range(27)) for e in range(3)}
    assert seen[0] != seen[1]
    assert manifest["steps"] == plan.n_steps
    assert sum(e["tokens"] for e in manifest["epochs"]) == 3 * data["tokens"]


@pytest.fixture(scope="module")
def big_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50,000 rows with the lengths of MIX; one token each, since planning never reads them."""
    folder, n = tmp_path_factory.mktemp("big"), 50_000
    length = np.random.default_rng(0).choice(MIX, n)
    columns = {"length": length, "n_target": length // 2, "sample_id": np.arange(n), "source_line": np.arange(n) + 1}
    one_token = [[1]] * n
    source = np.where(length < 8192, "short", "long")
    Dataset.from_dict({"input_ids": one_token, "labels": one_token, "source": source, **columns}).save_to_disk(folder)
    write_json(folder / "manifest.json", {"fingerprint": "big", "model_shape": None})
    return folder


@pytest.mark.parametrize("chosen", ALL[:4], ids=lambda s: f"{s.name}-{s.packer}")
def test_a_large_plan_is_read_a_part_at_a_time(
    chosen: Strategy, big_data: Path, tmp_path: Path, run_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(tmp_path, f"data_dir={big_data}", "max_length=65536", "epochs=1")
    config = config.model_copy(update={"strategy": chosen.model_copy(update={"window": 5000})})
    manifest = planning.group(config, tmp_path / "plan")
    if chosen.name == "packing" and chosen.packer == "best_fit":
        assert manifest["epochs"][0]["fill_ratio"] > 0.999
        planning.group(config, tmp_path / "again")
        files = [tmp_path / name / "plan.parquet" for name in ("plan", "again")]
        assert files[0].read_bytes() == files[1].read_bytes()
    plan, read = Plan(tmp_path / "plan", {"fingerprint": "big"}), []
    whole = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda file, n: [read.append(n), whole(file, n)][1])
    seen = [s for step in range(1, plan.n_steps + 1) for pack in plan.step(step) for s in pack.sample_ids]
    assert sorted(seen) == list(range(50_000))
    assert read == list(range(plan.file.num_row_groups)), "each once, in order"
    assert plan.file.num_row_groups == -(-manifest["packs"] // planning.ROWS_PER_GROUP)


def test_plan_of_other_data_is_refused(tmp_path: Path, run_config: Callable[..., Config]) -> None:
    planning.group(run_config(tmp_path), tmp_path / "plan")
    with pytest.raises(UserError, match="made for other data"):
        Plan(tmp_path / "plan", {"fingerprint": "another"})


def test_samples_without_target_stay_out(
    tmp_path: Path, run_config: Callable[..., Config], base_words: list[str]
) -> None:
    from longalign.config import compose_config
    from longalign.data.tokenize import tokenize

    rows = [conversation(9, 3, 0), conversation(8, 2, 1)]
    long = write_jsonl(tmp_path / "long.jsonl", rows)
    words = [*base_words, f"long_file={long}", "short_file=null", f"data_dir={tmp_path / 'data'}"]
    tokenize(compose_config("tokenize", words))
    config = compose_config("group", words)
    assert planning.group(config, tmp_path / "plan")["samples_without_target"] == 0

    read, data = planning.read_data(config.data_dir)
    emptied = read.map(lambda row: {"n_target": 0 if row["sample_id"] == 0 else row["n_target"]})
    emptied.save_to_disk(str(tmp_path / "emptied"))
    write_json(tmp_path / "emptied" / "manifest.json", data)
    config = compose_config("group", [*words, f"data_dir={tmp_path / 'emptied'}"])
    assert planning.group(config, tmp_path / "plan")["samples_without_target"] == 1
    assert pq.read_table(tmp_path / "plan" / "plan.parquet")["sample_ids"].to_pylist() == [[1], [1]]


def test_a_run_keeps_its_own_plan(tmp_path: Path, run_config: Callable[..., Config], data_dir: Path) -> None:
    first = run_config(tmp_path / "run", "strategy=sorted", "seed=100")
    _, how = planning.prepare_plan(first, tmp_path / "run")
    assert "grouped now" in how
    _, how = planning.prepare_plan(run_config(tmp_path / "other", "strategy=sorted", "seed=101"), tmp_path / "other")
    assert "stale" in how
    _, how = planning.prepare_plan(first, tmp_path / "run")
    assert how == "the run's own"
    assert planning.is_fresh(tmp_path / "run" / "plan", planning.identity(first, read_json(data_dir / "manifest.json")))


def test_data_longer_than_max_length_is_refused(tmp_path: Path, run_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match="max_length=100"):
        planning.group(run_config(tmp_path, "max_length=100"), tmp_path / "plan")
    with pytest.raises(UserError, match="holds no tokenised data"):
        planning.group(run_config(tmp_path, f"data_dir={tmp_path}"), tmp_path / "plan")
