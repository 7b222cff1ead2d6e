"""Whole runs: rows of metrics, clipping and updates are the same on 1 and 2 processes, under every ZeRO stage and with
sequence parallelism.

test_gradients.py holds what a step computes, on every layout; this is what training makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from longalign.config import load_frozen
from longalign.data.plan import Plan, read_data
from longalign.schema import Config
from longalign.train.engine import clip_gradients
from longalign.train.metrics import read_metrics
from tests.conftest import launch_all
from tests.train.plain import averages, losses_alone

WORDS = ["strategy=packing", "strategy.packs_per_step=3", "max_steps=3", "lr=1e-2", "grad_clip=0.5", "epochs=1"]
TWO = {f"zero{stage}": [f"cluster.zero_stage={stage}"] for stage in (0, 1, 2, 3)}
TWO["together"] = ["cluster.zero_stage=2", "cluster.sequence_parallel=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, run_config: Callable[..., Config]) -> Path:
    """Folders "one" (one process) and those of TWO (two)."""
    root = tmp_path_factory.mktemp("runs")
    words = [*WORDS, "save_every=null"]
    two = [run_config(root / name, *words, "cluster.processes=2", *more) for name, more in TWO.items()]
    assert launch_all([run_config(root / "one", *words)], root) == 0
    assert launch_all(two, root) == 0
    return root


@pytest.mark.slow
def test_first_row_is_that_of_plain_transformers(runs: Path) -> None:
    config = load_frozen(runs / "one" / "config.yaml")
    model = AutoModelForCausalLM.from_pretrained(config.model.path, attn_implementation="eager", dtype=torch.float64)
    dataset, data = read_data(config.data_dir)
    packs = Plan(runs / "one" / "plan", data).step(1)
    with torch.no_grad():
        wanted = averages([[losses_alone(model, dataset[sample]) for sample in pack.sample_ids] for pack in packs])
    row = read_metrics(runs / "one" / "metrics.jsonl")[0]
    assert row["loss"] == pytest.approx(float(wanted["pack"]), rel=1e-5)
    assert row["loss_sequence"] == pytest.approx(float(wanted["sequence"]), rel=1e-5)
    assert row["loss_token"] == pytest.approx(float(wanted["token"]), rel=1e-5)
    assert row["targets"] == sum(dataset[sample]["n_target"] for pack in packs for sample in pack.sample_ids)
    assert abs(wanted["pack"] - wanted["sequence"]) > 1e-3 * wanted["sequence"], "the averages must differ"


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_layout_changes_nothing(name: str, runs: Path) -> None:
    rows = [read_metrics(runs / run / "metrics.jsonl") for run in ("one", name)]
    assert len(rows[0]) == len(rows[1]) == 3
    for a, b in zip(*rows, strict=True):
        for key in ("loss", "loss_sequence", "loss_token", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=2e-5), (a["step"], key)
        for key in ("step", "lr", "tokens", "targets", "sequences", "packs"):
            assert a[key] == b[key]
    assert rows[0][0]["grad_norm"] > 0.5, "clipping must take part"
    one, other = (load_file(runs / run / "model" / "model.safetensors") for run in ("one", name))
    start = load_file(Path(load_frozen(runs / "one" / "config.yaml").model.path) / "model.safetensors")
    assert one.keys() == other.keys() == start.keys()
    for key in start:
        moved = (one[key] - start[key]).norm()
        assert moved > 0, key
        # Adam divides by the gradient's own size, so rounding of tiny gradients shows as larger relative moves
        assert (one[key] - other[key]).norm() <= 1e-3 * moved, key


def test_the_norm_of_many_gradients_is_exact() -> None:
    """30 million of them, as an embedding has: a float32 sum of their squares is off by 3e-3 on a CPU."""
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(shape, dtype=np.float32) / 1000 for shape in (30_000_000, 5)]
    parameters = [torch.nn.Parameter(torch.zeros(len(value))) for value in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = torch.tensor(value)
    truth = np.sqrt(sum(np.square(value.astype(np.float64)).sum() for value in values))
    norm = clip_gradients([*parameters, torch.nn.Parameter(torch.zeros(1))], 2.0)
    assert float(norm) == pytest.approx(truth, rel=1e-6)
    assert float(np.abs(parameters[0].grad.numpy() * truth / 2 - values[0]).max()) < 1e-8, "scaled to a norm of 2"
