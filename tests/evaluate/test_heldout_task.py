"""task=heldout measures what plain transformers measure in float64, and leaves the model as it was."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM

from longalign.config import compose_config
from longalign.data.synthetic import conversations
from longalign.data.tokenize import tokenize
from longalign.errors import UserError
from longalign.evaluate import run as evaluation
from longalign.evaluate.models import Local
from longalign.evaluate.tasks import heldout
from longalign.files import read_json, write_json
from longalign.schema import Config
from tests.conftest import in_process, write_jsonl
from tests.train.plain import losses_alone
from tests.train.test_heldout import table

# (source, tokens, targets): a whole pack, buckets' edges, one target, only targets, none; a source named as a bucket
SHAPES = [("new", 1100, 9), ("a", 1024, 5), ("a", 1023, 60), ("a", 17, 16), ("<1k", 33, 2), ("b", 300, 50)]
SHAPES += [("b", 12, 0), ("a", 2, 1), ("b", 1, 0)]
COUNTS = {"samples": 7, "tokens": sum(t for _, t, n in SHAPES if n), "targets": sum(n for *_, n in SHAPES)}

Make = Callable[..., Config]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heldout_task") / "data"
    table(folder, [("a", 9, 2)], 0)
    table(folder / "eval", SHAPES, 1)
    return folder


@pytest.fixture(scope="module")
def make(model_dir: Path, data: Path) -> Make:
    words = ["model=hf", f"model.path={model_dir}", "model.template=longalign-llama", "cluster=cpu", "task=heldout"]
    return lambda *more: compose_config("eval", [*words, f"data_dir={data}", "max_length=1100", *more])


def by_hand(model_dir: Path, folder: Path, limit: int | None = None) -> dict[str, Any]:
    """The summary, of every sample run alone in float64."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    groups: dict[tuple[str, str], list[tuple[int, np.ndarray]]] = defaultdict(list)
    with torch.no_grad():
        measured = [(row, losses_alone(model, row).numpy()) for row in load_from_disk(str(folder)) if row["n_target"]]
    for row, losses in measured[:limit]:
        tokens = len(row["input_ids"])
        for group in (("", ""), ("source", row["source"]), ("length", "<1k" if tokens < 1024 else "1k-4k")):
            groups[group].append((tokens, losses))
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for group, found in groups.items():
        losses = np.concatenate([one for _, one in found])
        counts = {"samples": len(found), "tokens": sum(tokens for tokens, _ in found), "targets": len(losses)}
        of_samples = float(np.mean([one.mean() for _, one in found]))
        entries[group] = {
            "loss": of_samples,
            "loss_token": losses.mean(),
            "perplexity": math.exp(losses.mean()),
            **counts,
        }
    by = lambda kind: {name: entry for (its, name), entry in entries.items() if its == kind}
    return {**entries["", ""], "by_source": by("source"), "by_length": by("length")}


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if isinstance(value, dict):
            assert_same(found[key], value)
        else:
            assert found[key] == pytest.approx(value, rel=1e-4 if key == "perplexity" else 1e-5), key


@pytest.mark.parametrize("words", [[], ["cluster.packs_per_micro_step=2", "max_length=1500"], ["task.heldout.limit=3"]])
def test_losses_are_those_of_plain_transformers(words: list[str], make: Make, model_dir: Path, data: Path) -> None:
    config = make(*words)
    found = heldout.measure(config, Local(config))
    assert config.task.heldout is not None
    if config.task.heldout.limit is None:
        assert {key: found[key] for key in COUNTS} == COUNTS
        assert found["by_source"]["<1k"]["samples"] == 1
        assert found["by_length"]["<1k"]["samples"] == 5
    assert_same(found, by_hand(model_dir, data / "eval", config.task.heldout.limit))


def test_questions_of_other_tasks_are_answered_as_before(make: Make) -> None:
    config = make("model.attention=sdpa")
    model = Local(config)
    prompts = [model.template.prompt_ids([{"role": "user", "content": "the quiet river " * n}]) for n in (3, 9)]
    before, own = model.generator.generate(prompts, 12), model.generator.model.config._attn_implementation
    first = heldout.measure(config, model)
    assert model.generator.model.config._attn_implementation == own
    assert model.generator.generate(prompts, 12) == before
    assert heldout.measure(config, model) == first


def test_what_is_refused(make: Make, data: Path, model_dir: Path, tmp_path: Path) -> None:
    endpoint = make("model.endpoint=http://localhost:1/v1", f"model.tokenizer={model_dir}", "task=[heldout,needle]")
    for dry_run in (True, False):
        with pytest.raises(
            UserError, match=r"task=heldout needs the model's weights, .*localhost.*model.endpoint=null"
        ):
            evaluation.run(endpoint, dry_run)
    bare = tmp_path / "bare"
    table(bare, [("a", 9, 2)], 0)

    def refusal(*words: str) -> str:
        with pytest.raises(UserError) as refused:
            evaluation.run(make(f"task.heldout.path={bare}", *words), True)
        return str(refused.value)

    assert refusal() == (
        f"task.heldout.path={bare} has no held-out samples; run `longalign tokenize` with eval_fraction=0.01"
    ), "not a word of training's settings"
    table(bare / "eval", [("a", 5, 0)], 3)
    assert "has no sample with a target" in refusal()
    table(bare / "eval", [("a", 1101, 1)], 3)
    assert "a sample of 1101 tokens, max_length=1100; raise max_length" in refusal()
    write_json(bare / "manifest.json", {**read_json(bare / "manifest.json"), "tokenizer_hash": "another"})
    assert "was tokenised with" in refusal("max_length=1200")


def test_another_template_is_told(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = make("template=chatglm3")
    heldout.prepare(config, Local(make()))
    said = " ".join(capsys.readouterr().err.split())
    assert "tokenised with template=longalign-llama, the model asks with chatglm3" in said


def test_dry_run_tells_samples_and_tokens(make: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert evaluation.run(make(f"output_dir={tmp_path}/out"), True) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"heldout: 7 samples, {COUNTS['tokens']:,} tokens, {COUNTS['targets']} of them targets" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_on_the_bundled_model(tmp_path: Path) -> None:
    """heldout and retrieval in one run, on data that tokenize held out."""
    for kind in ("long", "short"):
        write_jsonl(tmp_path / f"{kind}.jsonl", list(conversations(kind, "train", 20, seed=0, max_tokens=400)))
    files = [f"long_file={tmp_path}/long.jsonl", f"short_file={tmp_path}/short.jsonl", f"data_dir={tmp_path}/tokens"]
    words = ["model=tiny", "cluster=cpu", "datanum=all"]
    manifest = tokenize(compose_config("tokenize", [*words, *files, "eval_fraction=0.4"]))
    small = ["lengths=[600]", "samples=1", "max_new_tokens=8"]
    words += [f"data_dir={tmp_path}/tokens", "task=[heldout,retrieval]", *(f"task.retrieval.{word}" for word in small)]
    done = in_process("eval", *words, "output_dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    assert results["heldout"]["settings"] == {"path": f"{tmp_path}/tokens", "limit": None}
    held_out = sum(ledger["rows_held_out"] for ledger in manifest["ledger"].values())
    assert results["heldout"]["samples"] == held_out
    assert set(results["heldout"]["by_source"]) == {"long", "short"}
    assert f"heldout: loss {results['heldout']['loss']:.4f}" in done.stderr
    assert results["retrieval"]["questions"] == 6
    assert results["retrieval"]["missing"] == 0
    assert not (tmp_path / "out" / "heldout.jsonl").exists()


def test_a_test_set(model_dir: Path, tmp_path: Path) -> None:
    """eval_fraction=1 holds everything out: nothing is left to train on, and all of it is measured."""
    lines = list(conversations("long", "test", 6, 0, 128, 300))
    write_jsonl(tmp_path / "test.jsonl", lines)
    words = ["model=hf", f"model.path={model_dir}", "model.template=longalign-llama", "cluster=cpu", "max_length=900"]
    files = ["long_file=test.jsonl", "short_file=null", "datanum=all", "output_dir=tokens"]
    assert in_process("tokenize", *words, *files, "eval_fraction=1", cwd=tmp_path).returncode == 0
    assert len(load_from_disk(str(tmp_path / "tokens"))) == 0
    done = in_process("eval", *words, "task=heldout", "task.heldout.path=tokens", "output_dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_json(tmp_path / "out" / "results.json")["tasks"]["heldout"]["samples"] == 6
    refused = in_process("group", *words, "data_dir=tokens", cwd=tmp_path)
    assert refused.returncode == 2
    assert "data_dir=tokens has no sample with a target" in refused.stderr
