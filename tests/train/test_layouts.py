"""The same plan gives the same losses and weights on any number of processes, ZeRO stage and micro-step layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longalign.data.plan import Plan, read_data
from longalign.data.template import IGNORE
from longalign.schema import Config
from longalign.train.metrics import read_metrics
from tests.conftest import launch_all

STRATEGIES = {
    "naive": ["strategy=naive", "strategy.batch_size=5"],
    "sorted": ["strategy=sorted", "strategy.batch_size=6", "strategy.group_size=3"],
    "packing": ["strategy=packing", "strategy.packs_per_step=3"],
    "packing+weighting": ["strategy=packing+weighting", "strategy.packs_per_step=3"],
    "token": ["strategy=packing+weighting", "strategy.packs_per_step=3", "strategy.average=token"],
}
COMMON = ["max_steps=3", "lr=1e-2", "save_every=null", "grad_clip=0.5", "epochs=1"]


def reference_losses(config: Config) -> dict[str, float]:
    """The first step's losses from plain transformers, one sample at a time, by the formulas of the paper."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(config.model.path, attn_implementation="eager")
    dataset, data = read_data(config.data_dir)
    sequences: list[float] = []
    packs: list[float] = []
    total, n_tokens = 0.0, 0
    for pack in Plan(Path(config.output_dir or "") / "plan", data).step(1):
        in_pack, targets_in_pack = 0.0, 0
        for sample in pack.sample_ids:
            row = dataset[sample]
            ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="none")
            n = int((labels != IGNORE).sum())
            sequences.append(float(losses.sum()) / n)
            in_pack, targets_in_pack = in_pack + float(losses.sum()), targets_in_pack + n
        packs.append(in_pack / targets_in_pack)
        total, n_tokens = total + in_pack, n_tokens + targets_in_pack
    mean = lambda values: sum(values) / len(values)
    return {"sequence": mean(sequences), "pack": mean(packs), "token": total / n_tokens}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, run_config: Callable[..., Config]) -> Path:
    """Folders NAME-1 and NAME-2 for one and two processes; every strategy, and every ZeRO stage."""
    root = tmp_path_factory.mktemp("runs")
    one = [run_config(root / f"{name}-1", *words, *COMMON) for name, words in STRATEGIES.items()]
    one.append(run_config(root / "micro-1", *STRATEGIES["packing"], *COMMON, "cluster.packs_per_micro_step=4"))
    two = [run_config(root / f"{name}-2", *words, *COMMON, "cluster.processes=2") for name, words in STRATEGIES.items()]
    two += [
        run_config(
            root / f"zero{stage}-2",
            *STRATEGIES["packing"],
            *COMMON,
            "cluster.processes=2",
            f"cluster.zero_stage={stage}",
        )
        for stage in (0, 2, 3)
    ]
    assert launch_all(one, root) == 0
    assert launch_all(two, root) == 0
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", [*STRATEGIES])
def test_first_loss_is_that_of_plain_transformers(name: str, runs: Path, run_config: Callable[..., Config]) -> None:
    config = run_config(runs / f"{name}-1", *STRATEGIES[name], *COMMON)
    expected = reference_losses(config)
    row = read_metrics(runs / f"{name}-1" / "metrics.jsonl")[0]
    assert row["loss"] == pytest.approx(expected[config.strategy.average], rel=1e-5)
    assert row["loss_sequence"] == pytest.approx(expected["sequence"], rel=1e-5)
    assert row["loss_token"] == pytest.approx(expected["token"], rel=1e-5)
    assert abs(expected["pack"] - expected["sequence"]) > 1e-3 * expected["sequence"] or "pack" not in name


PAIRS = [(f"{name}-1", f"{name}-2") for name in STRATEGIES]
PAIRS += [("packing-1", "micro-1")] + [("packing-1", f"zero{stage}-2") for stage in (0, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_layout_changes_nothing(first: str, second: str, runs: Path) -> None:
    rows = [read_metrics(runs / name / "metrics.jsonl") for name in (first, second)]
    assert len(rows[0]) == len(rows[1]) == 3
    for a, b in zip(*rows, strict=True):
        for key in ("loss", "loss_sequence", "loss_token", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=2e-5), (a["step"], key)
        for key in ("step", "lr", "tokens", "targets", "sequences", "packs"):
            assert a[key] == b[key]
    assert rows[0][0]["grad_norm"] > 0.5, "clipping must take part"
    weights = [load_file(runs / name / "model" / "model.safetensors") for name in (first, second)]
    start = load_file(Path(read_start(runs / first)) / "model.safetensors")
    assert weights[0].keys() == weights[1].keys() == start.keys()
    for key in start:
        moved = (weights[0][key] - start[key]).norm()
        assert moved > 0, key
        # Adam divides by the gradient's own size, so rounding of tiny gradients shows as larger relative moves
        assert (weights[0][key] - weights[1][key]).norm() <= 1e-3 * moved, key


def read_start(run: Path) -> str:
    from longalign.config import load_frozen

    return load_frozen(run / "config.yaml").model.path
