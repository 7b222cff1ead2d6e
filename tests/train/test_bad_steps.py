"""A loss or gradient that is not finite: the step is not applied on any rank, under any ZeRO stage, and is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longalign.data.plan import Plan, read_data
from longalign.schema import Config
from longalign.train.bad_steps import poisoned
from longalign.train.checkpoint import complete
from longalign.train.metrics import read_metrics
from tests.conftest import launch_all
from tests.train import faulty

WORDS = ["strategy=packing", "strategy.packs_per_step=4", "lr=1e-2", "save_every=null", "epochs=2"]
LAYOUTS = {f"zero{stage}": [f"cluster.zero_stage={stage}", "model.dtype=float32"] for stage in range(4)}
LAYOUTS["bf16zero2"] = ["cluster.zero_stage=2", "model.dtype=bfloat16"]
STEPS = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, run_config: Callable[..., Config]) -> Path:
    """LAYOUT-nan and LAYOUT-left (see faulty.py) on two processes, and zero2-always, which ends the launch."""
    root = tmp_path_factory.mktemp("runs")
    make = lambda name, *words: run_config(root / name, *WORDS, "cluster.processes=2", f"max_steps={STEPS}", *words)
    configs = [make(f"{name}-{kind}", *words) for name, words in LAYOUTS.items() for kind in ("nan", "left")]
    configs.append(make("zero2-always", *LAYOUTS["zero2"], "max_bad_steps=3"))
    assert launch_all(configs, root, worker=[faulty.__file__]) == 1
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_skipped_steps_leave_no_mark(name: str, runs: Path) -> None:
    """Weights, and with them Adam's states, are those of a run whose optimizer was not called in these steps."""
    found, wanted = (load_file(runs / f"{name}-{kind}" / "model" / "model.safetensors") for kind in ("nan", "left"))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    rows, others = (read_metrics(runs / f"{name}-{kind}" / "metrics.jsonl") for kind in ("nan", "left"))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["skipped"] for row in rows] == [False, True, False, True, False, False]
    assert not any(row["skipped"] for row in others)
    assert [row["lr"] for row in rows] == [row["lr"] for row in others], "the schedule goes on"
    assert (rows[1]["loss"], rows[1]["loss_token"], rows[1]["grad_norm"]) == (None, None, None)
    assert (rows[3]["loss"], rows[3]["grad_norm"]) == (others[3]["loss"], None)
    for step in (1, 3, 5, 6):
        assert rows[step - 1]["loss"] == others[step - 1]["loss"]
        assert rows[step - 1]["grad_norm"] == others[step - 1]["grad_norm"]


@pytest.mark.slow
def test_samples_are_named(runs: Path, data_dir: Path) -> None:
    dataset, data = read_data(str(data_dir))
    plan = Plan(runs / "zero1-nan" / "plan", data)
    of_loss, of_gradient = read_metrics(runs / "zero1-nan" / "bad_steps.jsonl")
    assert (of_loss["step"], of_loss["what"]) == (2, "loss")
    assert (of_gradient["step"], of_gradient["what"]) == (4, "gradient")
    packs = [sorted(pack.sample_ids) for pack in plan.step(2)]
    assert [named["sample_id"] for named in of_loss["samples"]] in packs, "one pack's, not the whole step's"
    every = sorted(sample for pack in plan.step(4) for sample in pack.sample_ids)
    assert [named["sample_id"] for named in of_gradient["samples"]] == every
    for named in of_loss["samples"]:
        row = dataset[named["sample_id"]]
        assert named == {key: row[key] for key in ("sample_id", "source", "source_line")}


@pytest.mark.slow
def test_many_in_a_row_end_the_run(runs: Path) -> None:
    run = runs / "zero2-always"
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [False, False, True, True, True], "max_bad_steps=3 from step 3 on"
    assert [path.name for path in complete(run / "checkpoints")] == ["step-000002"]
    assert not (run / "model").exists()
    beat = json.loads((run / "logs" / "rank-0.heartbeat").read_text())
    assert beat["ended"].startswith("failed: 3 steps in a row")


def test_poisoned() -> None:
    for value, gradient in ((2.5, 1.0), (torch.inf, torch.nan), (-torch.inf, torch.nan), (torch.nan, torch.nan)):
        weight = torch.tensor(1.0, requires_grad=True)
        loss = weight + (value - 1)
        poisoned(loss).backward()
        assert weight.grad is not None
        assert torch.equal(weight.grad.isnan(), torch.tensor(gradient != gradient))
        assert value != 2.5 or (weight.grad == 1 and poisoned(loss) == 2.5)
