"""Multirun is Hydra's own: launchers and sweepers work, a failed run does not end the sweep, a table ends it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longalign.config import compose_config
from longalign.sweep import own_folder
from tests.conftest import longalign


def sweep_rows(folder: Path) -> list[dict]:
    (file,) = folder.glob("runs/sweeps/*/sweep.json")
    return json.loads(file.read_text())


@pytest.mark.slow
def test_joblib_launcher_runs_every_combination_and_survives_a_failure(
    tmp_path: Path, base_words: list[str], data_dir: Path
) -> None:
    words = [*base_words, f"data_dir={data_dir}", "max_steps=2", "save_every=null", "max_length=128,64"]
    words += ["strategy=naive,packing+weighting", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    words = [word for word in words if word != "max_length=128"]
    done = longalign("train", "-m", *words, cwd=tmp_path)
    assert done.returncode == 1, "two of the four runs cannot work"
    rows = sweep_rows(tmp_path)
    assert [row["exit_code"] for row in rows] == [0, 0, 2, 2]
    assert all("max_length=64" in row["error"] for row in rows[2:])
    for row in rows[:2]:
        assert row["step"] == 2
        assert (Path(row["output_dir"]) / "model" / "config.json").is_file()
    assert {Path(row["output_dir"]).name for row in rows[:2]} == {"max_length=128"}
    assert len({row["output_dir"] for row in rows[:2]}) == 2
    assert "sweep of 4 runs" in done.stderr
    assert "failed (2)" in done.stderr


@pytest.mark.slow
def test_optuna_sweeper_gets_the_objective(tmp_path: Path, base_words: list[str], data_dir: Path) -> None:
    words = [*base_words, f"data_dir={data_dir}", "strategy=packing", "strategy.packer=next_fit,best_fit"]
    words += ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1", "objective=packs"]
    done = longalign("group", "-m", *words, f"output_dir={tmp_path}/plans", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    best = min(row["packs"] for row in sweep_rows(tmp_path))
    results = next(tmp_path.glob("runs/sweeps/*/optimization_results.yaml")).read_text()
    assert f"best_value: {float(best)}" in results


def test_each_run_of_a_sweep_has_its_own_folder() -> None:
    config = compose_config("train", ["strategy=sorted", "seed=3"])
    folder = lambda swept, fixed=(): own_folder(config, "train", list(swept), list(fixed)).output_dir
    assert folder(["strategy=sorted"]) == "runs/llama2-7b/10k/sorted", "already in the path"
    assert folder(["strategy=sorted", "seed=3"]) == "runs/llama2-7b/10k/sorted/seed=3"
    assert folder(["strategy=sorted"], ["output_dir"]) == "runs/llama2-7b/10k/sorted/strategy=sorted"


def test_a_dry_sweep_leaves_nothing(tmp_path: Path, base_words: list[str], data_dir: Path) -> None:
    words = [*base_words, f"data_dir={data_dir}", "strategy=naive,packing", f"output_dir={tmp_path}/plans"]
    done = longalign("group", "-m", *words, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sweep of 2 runs" in done.stderr
    assert list(tmp_path.iterdir()) == []
