"""The stats command: a ledger that adds up, warnings for real losses only, figures of every strategy's plan."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_from_disk

from longalign import commands
from longalign.bench.tokens import write_random
from longalign.config import compose_config
from longalign.data.plan import group
from longalign.data.tokenize import tokenize
from longalign.errors import UserError
from longalign.files import read_json, write_json
from longalign.schema import Config
from longalign.stats import loss_warnings, stats, targets_lost
from tests.conftest import conversation, longalign, write_jsonl

Data = Callable[..., dict[str, Any]]


@pytest.fixture
def tokenised(tmp_path: Path, base_words: list[str]) -> Data:
    """Tokenise 8 short conversations and 8 whose answers reach over 128 tokens; the manifest."""

    def make(*words: str) -> dict[str, Any]:
        long = write_jsonl(tmp_path / "long.jsonl", [conversation(20, 200 + i, i) for i in range(8)])
        short = write_jsonl(tmp_path / "short.jsonl", [*(conversation(5, 3, i) for i in range(8)), "{broken"])
        files = [f"long_file={long}", f"short_file={short}", f"data_dir={tmp_path / 'data'}"]
        return tokenize(compose_config("tokenize", [*base_words, *files, *words]))

    return make


@pytest.fixture
def make(base_words: list[str], data_dir: Path) -> Callable[..., Config]:
    steps = ["strategy.packs_per_step=2", "strategy.strata=1"]
    return lambda folder, *words: compose_config(
        "stats", [*base_words, f"data_dir={data_dir}", f"output_dir={folder}", *steps, *words]
    )


def test_a_source_that_loses_targets_is_named_with_what_to_change(tokenised: Data) -> None:
    data = tokenised()
    entry = data["ledger"]["long"]
    lost = targets_lost(entry)
    assert lost["targets"] == entry["targets_in"] - entry["targets_kept"] > 0
    assert lost["share"] == pytest.approx(lost["targets"] / entry["targets_in"], abs=1e-4)
    assert targets_lost(data["ledger"]["short"]) == {"targets": 0, "share": 0.0}, "a broken line had no targets"
    (message,) = loss_warnings(data)
    for said in (f"long lost {lost['share']:.1%}", "8 rows cut to max_length=128", "truncate=middle"):
        assert said in message


def test_what_is_dropped_is_lost_and_what_datanum_leaves_out_is_not(tokenised: Data) -> None:
    (message,) = loss_warnings(tokenised("truncate=drop", "overwrite=true"))
    assert "long lost 100.0% of its targets" in message
    assert "8 dropped (too long)" in message
    data = tokenised("datanum.n_long=2", "max_length=512", "overwrite=true")
    assert data["ledger"]["long"]["rows_not_chosen"] == 6
    assert loss_warnings(data) == []
    everything = targets_lost(tokenised("overwrite=true")["ledger"]["long"])
    for words in (["datanum.n_long=4"], ["eval_fraction=0.5"], ["datanum.n_long=2", "eval_fraction=0.3"]):
        assert targets_lost(tokenised(*words, "overwrite=true")["ledger"]["long"]) == everything, words


def test_figures_are_those_of_the_plans(tmp_path: Path, make: Callable[..., Config], data_dir: Path) -> None:
    config = make(tmp_path / "stats", "cluster.processes=2")
    report = stats(config)
    assert report == read_json(tmp_path / "stats" / "stats.json")
    assert set(report["strategies"]) == {"naive", "sorted", "packing", "packing+weighting", "balanced"}
    group(config, tmp_path / "plan")
    plan = pq.read_table(tmp_path / "plan" / "plan.parquet")
    cost, step, tokens = (plan[name].to_numpy() for name in ("cost", "step", "tokens"))
    # two packs a step on two ranks: each rank runs one
    balance = [cost[step == s].sum() / 2 / cost[step == s].max() for s in np.unique(step)]
    mine = report["strategies"]["packing+weighting"]
    assert mine["balance"] == pytest.approx(np.mean(balance), abs=1e-4)
    assert mine["balance_worst"] == pytest.approx(min(balance), abs=1e-4)
    assert mine["fill_ratio"] == pytest.approx(tokens.mean() / 128, abs=1e-4)
    assert (mine["steps"], mine["packs"]) == (step.max(), len(plan))
    assert report["strategies"]["naive"]["sequences_per_pack"] == 1.0
    length = np.array(load_from_disk(str(data_dir))["length"])
    assert report["lengths"]["all"]["tokens"] == length.sum()
    assert report["lengths"]["all"]["p50"] == np.median(length)
    assert (tmp_path / "stats" / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_a_fresh_plan_is_used(tmp_path: Path, make: Callable[..., Config], data_dir: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(data_dir, data, ignore=shutil.ignore_patterns("plans"))
    config = make(tmp_path / "out", f"data_dir={data}", "strategy=sorted")
    made = stats(config)["strategies"]["sorted"]
    group(config, data / "plans" / "sorted")
    read = stats(config)["strategies"]["sorted"]
    assert (made.pop("plan"), read.pop("plan")) == ("made for these figures", str(data / "plans" / "sorted"))
    assert made == read


def test_a_setting_of_the_command_holds_for_every_strategy(tmp_path: Path, make: Callable[..., Config]) -> None:
    report = stats(make(tmp_path / "out", "strategy=naive", "strategy.batch_size=3", "strategy.packs_per_step=1"))
    found = report["strategies"]
    assert {name for name, made in found.items() if made["steps"] == made["packs"]} >= {"packing", "balanced"}
    samples, epochs = report["samples"], found["naive"]["epochs"]
    assert {found[name]["steps"] for name in ("naive", "sorted")} == {epochs * -(-samples // 3)}
    refused = stats(make(tmp_path / "out", "strategy.packs_per_step=6", "strategy.strata=4"))["strategies_refused"]
    assert set(refused) == {"balanced"}
    assert "strategy.strata=4 does not divide" in refused["balanced"], "as it would be in training"


def test_what_was_not_counted_is_left_out(tmp_path: Path, tokenised: Data, capsys: pytest.CaptureFixture[str]) -> None:
    """Data of an earlier version, whose ledger is shorter, and a benchmark's random data, which have none."""
    manifest = tokenised()
    shown = lambda data: (commands.stats(make(data), dry_run=False), capsys.readouterr().err)[1]
    make = lambda data: compose_config(
        "stats", [f"data_dir={data}", f"output_dir={tmp_path / 'out'}", "max_length=128"]
    )
    assert "tokens held out or not chosen" in shown(tmp_path / "data")
    for entry in manifest["ledger"].values():
        del entry["tokens_elsewhere"]
    write_json(tmp_path / "data" / "manifest.json", manifest)
    without = shown(tmp_path / "data")
    assert "tokens held out or not chosen" not in without
    assert "tokens kept" in without
    write_random(tmp_path / "random", np.array([100, 20, 30]), np.array([9, 2, 3]), vocab=50, seed=0)
    random = shown(tmp_path / "random")
    assert "packing+weighting" in random
    assert "tokens kept" not in random


def test_a_setting_that_no_strategy_takes(tmp_path: Path, make: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match="max_length=100"):
        stats(make(tmp_path / "out", "max_length=100"))
    report = stats(make(tmp_path / "out", "shuffle=false"))
    assert set(report["strategies"]) == {"naive"}
    assert "shuffle=false" in report["strategies_refused"]["sorted"]


def test_command(tmp_path: Path, tokenised: Data, base_words: list[str]) -> None:
    tokenised()
    words = [*base_words, f"data_dir={tmp_path / 'data'}"]
    assert commands.stats(compose_config("stats", words), dry_run=True) == 0
    assert not (tmp_path / "data" / "stats").exists()
    done = longalign("stats", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for said in ("rows cut to max_length", "dropped: malformed JSON", "balance on", "packing+weighting", "long lost"):
        assert said in done.stderr
    assert sorted(p.name for p in (tmp_path / "data" / "stats").iterdir()) == ["lengths.png", "stats.json"]
