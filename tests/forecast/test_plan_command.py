"""The plan command: time is what the slowest rank takes, money follows, and what does not fit is said with a way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longalign.config import compose_config
from longalign.errors import UserError
from longalign.forecast import run
from longalign.forecast.gpus import H200

Plan = Callable[..., dict[str, Any]]


@pytest.fixture
def plan(tmp_path: Path, base_words: list[str], data_dir: Path) -> Plan:
    def make(*words: str) -> dict[str, Any]:
        here = [f"data_dir={data_dir}", f"output_dir={tmp_path / 'plan'}", "plan.gpu=H200", "strategy.packs_per_step=4"]
        config = compose_config("plan", [*base_words, *here, *words])
        assert run.plan(config, dry_run=False) == 0
        found: dict[str, Any] = json.loads((tmp_path / "plan" / "plan.json").read_text())
        return found

    return make


def test_ranks_share_the_work_and_none_is_faster_than_its_share(plan: Plan) -> None:
    one, two = plan("cluster.processes=1"), plan("cluster.processes=2")
    for name, alone in one["strategies"].items():
        shared = two["strategies"][name]
        assert alone["steps"] == shared["steps"]
        assert alone["idle"] < 0.05, "one rank waits for nobody"
        assert alone["seconds_per_step"] / 2 <= shared["seconds_per_step"] <= alone["seconds_per_step"]
        assert shared["tokens_per_s_per_gpu"] == pytest.approx(shared["tokens_per_s"] / 2)


def test_a_group_of_ranks_works_as_one(plan: Plan) -> None:
    """Four ranks in two groups leave as many idle as two ranks do."""
    two = plan("cluster.processes=2")
    four = plan("cluster.processes=4", "cluster.sequence_parallel=2")
    assert four["sequence_parallel"] == 2
    for name, row in four["strategies"].items():
        assert row["steps"] == two["strategies"][name]["steps"]
        assert row["idle"] == pytest.approx(two["strategies"][name]["idle"], abs=0.05)
    with pytest.raises(UserError, match=r"sequence_parallel=8 must divide .*; allowed: 1, 2, 4"):
        plan("cluster.processes=8", "cluster.sequence_parallel=8")


def test_money_is_gpu_hours_times_price(plan: Plan) -> None:
    for row in plan("cluster.processes=8", "plan.price_per_gpu_hour=2.5")["strategies"].values():
        assert row["gpu_hours"] == pytest.approx(8 * row["hours"])
        assert row["cost"] == pytest.approx(2.5 * row["gpu_hours"])
        assert row["hours"] == pytest.approx(row["steps"] * row["seconds_per_step"] / 3600)
    assert plan()["strategies"]["naive"]["cost"] is None


def test_what_does_not_fit_is_said_with_a_setting(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = H200._replace(memory=1e5)
    monkeypatch.setitem(run.gpus.GPUS, "H200", tiny)
    with pytest.raises(UserError, match=r"does not fit one H200, whatever is offloaded; use more GPUs"):
        plan("cluster.processes=1", "cluster.zero_stage=1")


def test_no_gpu_here_is_said(plan: Plan) -> None:
    with pytest.raises(UserError, match=r"plan.gpu=auto: this machine has none; give plan.gpu=H200\|H100"):
        plan("plan.gpu=auto")


def test_the_nearest_setting_that_fits(base_words: list[str]) -> None:
    shape = {"layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "kv_heads": 32, "head_dim": 128}
    config = compose_config("plan", [*base_words, "cluster=1gpu", "cluster.offload_optimizer=false"])
    told = lambda tokens, config: run.does_not_fit(config, np.array([tokens]), shape, H200, 6_740_000_000, 400e9)
    assert told(131072, config).endswith("it would with activations=offload")
    assert told(700_000, config).endswith("it would with cluster.offload_optimizer=true activations=offload")
    two = config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update={"processes": 2, "zero_stage": 1, "offload_optimizer": True})
        }
    )
    assert told(200_000, two).endswith("it would with activations=offload")
    assert told(1_600_000, two).endswith("it would with activations=offload cluster.sequence_parallel=2")
    assert "whatever is offloaded" in told(2**22, config)
