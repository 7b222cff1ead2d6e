"""Losses by source, by length and on held-out samples: those of plain transformers, and looking changes nothing."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from longalign.data.plan import Plan, read_data
from longalign.data.template import IGNORE
from longalign.errors import UserError
from longalign.files import read_json, write_json
from longalign.launch import prepare_run
from longalign.model.load import tokenizer_hash
from longalign.schema import Config
from longalign.train.checkpoint import complete
from longalign.train.heldout import heldout_packs
from longalign.train.metrics import read_metrics
from tests.conftest import TINY, launch_all
from tests.train.plain import losses_alone

MAX_LENGTH = 1200
TRAIN = [("a", 1200, 7), ("b", 1024, 60), ("b", 1023, 3), ("a", 30, 29), ("c", 40, 1), ("a", 9, 4), ("b", 70, 20)]
TRAIN += [("c", 25, 24), ("b", 5, 2), ("a", 300, 100), ("b", 64, 0)]
EVAL = [("new", 1100, 9), ("a", 1024, 5), ("a", 17, 16), ("b", 33, 2), ("b", 300, 50), ("b", 12, 0), ("a", 2, 1)]
STEPS = 5
WORDS = ["strategy=packing", "strategy.packs_per_step=3", "lr=1e-2", "epochs=9", "mix.c.weight=2.5", "keep_last=9"]
WORDS += [f"max_length={MAX_LENGTH}", f"max_steps={STEPS}", "save_every=null"]
LAYOUTS = {
    "one": ["cluster.processes=1"],
    "zero3": ["cluster.processes=2", "cluster.zero_stage=3"],
    "together": ["cluster.processes=2", "cluster.zero_stage=3", "cluster.sequence_parallel=2"],
}


def table(folder: Path, shapes: list[tuple[str, int, int]], seed: int) -> None:
    """A tokenised folder of (source, tokens, targets)."""
    rng, tokenizer = np.random.default_rng(seed), AutoTokenizer.from_pretrained(TINY)
    rows = []
    for number, (source, length, n_target) in enumerate(shapes):
        labels = np.full(length, IGNORE)
        labels[1 + rng.permutation(length - 1)[:n_target]] = rng.integers(len(tokenizer), size=n_target)
        row = {"input_ids": rng.integers(len(tokenizer), size=length), "labels": labels, "length": length}
        rows.append({**row, "n_target": n_target, "source": source, "source_line": number + 1, "sample_id": number})
    Dataset.from_list(rows).save_to_disk(str(folder))
    manifest = {"fingerprint": str(seed), "tokenizer": str(TINY), "tokenizer_hash": tokenizer_hash(tokenizer)}
    write_json(folder / "manifest.json", {**manifest, "template": "longalign-llama", "model_shape": None})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heldout") / "data"
    table(folder, TRAIN, 0)
    table(folder / "eval", EVAL, 1)
    return folder


Make = Callable[..., Config]


@pytest.fixture(scope="module")
def make(run_config: Make, data: Path) -> Make:
    return lambda folder, *words: run_config(folder, f"data_dir={data}", *WORDS, *words)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, make: Make) -> Path:
    """A run of every layout with eval_every=2, and one without."""
    root = tmp_path_factory.mktemp("runs")
    saves = {"one": ["save_every=2"]}
    configs = {n: make(root / n, *words, "eval_every=2", *saves.get(n, [])) for n, words in LAYOUTS.items()}
    configs |= {f"{name}-blind": make(root / f"{name}-blind", *words) for name, words in LAYOUTS.items()}
    for processes in (1, 2):
        mine = [config for config in configs.values() if config.cluster.processes == processes]
        assert launch_all(mine, root) == 0
    return root


def losses_by(model: Any, dataset: Dataset, ids: Iterable[int]) -> dict[str, Any]:
    """Every average from plain transformers, each sample run alone."""
    by: dict[str, dict[str, list[float]]] = {"source": defaultdict(list), "length": defaultdict(list)}
    sequences, tokens = [], []
    for sample in ids:
        row = dataset[sample]
        with torch.no_grad():
            losses = losses_alone(model, row)
        if len(losses):
            mean = float(losses.mean())
            sequences.append(mean)
            tokens += losses.tolist()
            by["source"][row["source"]].append(mean)
            by["length"]["<1k" if len(row["input_ids"]) < 1024 else "1k-4k"].append(mean)
    groups = {f"loss_by_{k}": {name: float(np.mean(v)) for name, v in found.items()} for k, found in by.items()}
    return {"loss_sequence": float(np.mean(sequences)), "loss_token": float(np.mean(tokens)), **groups}


def assert_close(row: dict[str, Any], wanted: dict[str, Any], rel: float) -> None:
    for key, value in wanted.items():
        assert row[key] == pytest.approx(value, rel=rel), key


@pytest.mark.slow
def test_training_rows_by_source_and_length(runs: Path, make: Make, data: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make(runs).model.path, dtype=torch.float64)
    dataset, manifest = read_data(str(data))
    packs = Plan(runs / "one" / "plan", manifest).step(1)
    ids = [sample for pack in packs for sample in pack.sample_ids]
    assert any(len(set(pack.sample_ids)) < len(pack.sample_ids) for pack in packs), "two copies must share a pack"
    wanted = losses_by(model, dataset, ids)
    assert len(wanted["loss_by_source"]) > 1
    assert len(wanted["loss_by_length"]) == 2
    rows = [read_metrics(runs / name / "metrics.jsonl") for name in LAYOUTS]
    for one, *others in zip(*rows, strict=True):
        for other in others:
            assert_close(other, {key: one[key] for key in wanted}, 1e-4)
    for row in rows:
        assert_close(row[0], wanted, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_heldout_loss_is_that_of_the_exported_weights(name: str, runs: Path, data: Path) -> None:
    rows = read_metrics(runs / name / "eval.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 5], "every second step, and the last"
    model = AutoModelForCausalLM.from_pretrained(runs / name / "model", dtype=torch.float64)
    wanted = losses_by(model, load_from_disk(str(data / "eval")), range(len(EVAL)))
    assert set(wanted["loss_by_source"]) == {"new", "a", "b"}
    assert_close(rows[-1], wanted, 1e-5)
    assert rows[-1]["sequences"] == 6
    assert rows[-1]["targets"] == 83
    assert rows[0]["loss_sequence"] != rows[1]["loss_sequence"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_looking_changes_nothing(name: str, runs: Path) -> None:
    seen, blind = (load_file(runs / run / "model" / "model.safetensors") for run in (name, f"{name}-blind"))
    assert all(torch.equal(seen[key], blind[key]) for key in blind)
    rows, others = (read_metrics(runs / run / "metrics.jsonl") for run in (name, f"{name}-blind"))
    for key in ("loss", "grad_norm", "loss_by_source"):
        assert [row[key] for row in rows] == [row[key] for row in others]
    assert not (runs / f"{name}-blind" / "eval.jsonl").exists()


@pytest.mark.slow
def test_a_resumed_run_evaluates_every_step_once(runs: Path, tmp_path: Path, make: Make) -> None:
    """Continued from step 4: once with the row of that step, once stopped before it was written."""
    resumed = []
    for name, kept in (("with", (2, 4, 5)), ("without", (2,))):
        run = tmp_path / name
        shutil.copytree(runs / "one", run)
        shutil.rmtree(run / "model")
        shutil.rmtree(run / "checkpoints" / "step-000005")
        assert complete(run / "checkpoints")[-1].name == "step-000004"
        rows = [row for row in read_metrics(run / "eval.jsonl") if row["step"] in kept]
        (run / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        resumed.append(make(run, "cluster.processes=1", "eval_every=2", "resume=auto"))
    assert launch_all(resumed, tmp_path) == 0
    whole = read_metrics(runs / "one" / "eval.jsonl")
    for config in resumed:
        rows = read_metrics(Path(config.output_dir or "") / "eval.jsonl")
        assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in whole]


def test_heldout_packs(make: Make, tmp_path: Path) -> None:
    _, packs = heldout_packs(make(tmp_path, "eval_every=1"))
    assert sorted(sample for pack in packs for sample in pack.sample_ids) == [0, 1, 2, 3, 4, 6]
    assert all(pack.tokens == sum(EVAL[s][1] for s in pack.sample_ids) <= MAX_LENGTH for pack in packs)
    assert sum(pack.n_target for pack in packs) == 83
    assert len(packs) == 3, "1100 | 1024 ... | 300 ..."


def test_eval_every_needs_heldout_samples(make: Make, data: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(data, bare)
    shutil.rmtree(bare / "eval")
    with pytest.raises(UserError, match=r"eval_every=3 but .* has no held-out samples; .*eval_fraction=0\.01"):
        prepare_run(make(tmp_path / "run", f"data_dir={bare}", "eval_every=3"), dry_run=True)
    table(bare / "eval", [("a", 5, 0)], 3)
    with pytest.raises(UserError, match="has no sample with a target"):
        prepare_run(make(tmp_path / "run", f"data_dir={bare}", "eval_every=3"), dry_run=True)
    shutil.rmtree(bare / "eval")
    table(bare / "eval", [("a", MAX_LENGTH + 1, 1)], 3)
    with pytest.raises(UserError, match=f"a sample of {MAX_LENGTH + 1} tokens, max_length={MAX_LENGTH}"):
        prepare_run(make(tmp_path / "run", f"data_dir={bare}", "eval_every=3"), dry_run=True)
    assert read_json(bare / "manifest.json")["fingerprint"] == "0"
