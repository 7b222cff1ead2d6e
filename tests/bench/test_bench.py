"""The bench command: what it runs is what it says, and its figures agree with one another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from longalign.bench import run
from longalign.bench.layouts import lengths
from longalign.bench.plot import plot
from longalign.cluster.workers import ALLOCATOR, common_environment, set_allocator
from longalign.config import compose_config
from longalign.errors import UserError
from longalign.schema import Config

WORDS = ["model=tiny", "cluster=cpu", "max_length=512", "bench.repeat=2", "bench.warm_up=1"]


def bench(tmp_path: Path, *words: str, dry_run: bool = False) -> dict[str, Any]:
    config = compose_config("bench", [*WORDS, f"output_dir={tmp_path}/out", *words])
    assert run.bench(config, dry_run) == 0
    return {} if dry_run else json.loads((tmp_path / "out" / "bench.json").read_text())


def test_rows_and_picture(tmp_path: Path) -> None:
    made = bench(tmp_path, "bench.packs=[1x300,6x50]", "bench.activations=[full,none]")
    cases = [(row["pack"], row["activations"]) for row in made["rows"]]
    assert cases == [("1x300", "full"), ("6x50", "full"), ("1x300", "none"), ("6x50", "none")]
    for row in made["rows"]:
        assert row["tokens"] == 300
        assert len(row["passes"]) == 3
        assert row["seconds"] == np.median([p["seconds"] for p in row["passes"][1:]]), "the first is the warm-up"
        assert row["tokens_per_s"] == pytest.approx(300 / row["seconds"])
        assert row["of_matmul"] == pytest.approx(row["tflops"] / made["matmul_tflops"])
    # the tiny model: 2 layers, hidden 128, see its config; attention of 300 tokens costs 6 times that of 6 x 50
    flops = {row["pack"]: row["tflops"] * row["seconds"] * 1e12 for row in made["rows"]}
    config = json.loads((Path(run.__file__).parent.parent / "assets" / "tiny" / "config.json").read_text())
    heads = config["num_attention_heads"] * config["head_dim"]
    attention = 6 * config["num_hidden_layers"] * heads * (300**2 - 6 * 50**2)
    assert flops["1x300"] - flops["6x50"] == pytest.approx(attention)
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_whole_steps_run_the_training_engine(tmp_path: Path) -> None:
    words = ["bench.packs=[2x100]", "bench.activations=[full]", "bench.step_packs=3", "cluster.zero_stage=1"]
    of_pass, of_step = bench(tmp_path, *words, "bench.repeat=1")["rows"]
    assert (of_step["of"], of_step["tokens"]) == ("step", 3 * of_pass["tokens"])
    assert len(of_step["all_seconds"]) == 2, "one to warm up"


def test_steps_run_the_attention_that_their_row_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And take GPU memory as a run's workers do."""
    from longalign.bench import step

    built: list[Any] = []

    def build(config: Config, _: int) -> None:
        built.append(config)
        raise InterruptedError

    def start(command: list[str], **_: Any) -> SimpleNamespace:
        with pytest.raises(InterruptedError):
            step.main(*command[3:])
        return SimpleNamespace(returncode=1)

    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(step, "join", lambda _: None)
    monkeypatch.setattr(step, "build_engine", build)
    monkeypatch.setattr(run.subprocess, "run", start)
    monkeypatch.setattr(run.attention, "choose_backend", lambda *_: ("varlen", "asked for"))
    monkeypatch.setattr(run, "run_case", lambda *_: {"failed": "not run"})
    bench(tmp_path, "bench.packs=[2x100]", "bench.attention=[varlen]", "bench.step_packs=2")
    assert [(one.model.attention, one.activations) for one in built] == [("varlen", "budget")]


@pytest.mark.parametrize(
    ("given", "words", "setting"),
    [
        (None, [], "expandable_segments:True"),
        ("max_split_size_mb:64", [], "max_split_size_mb:64"),
        (None, ["cluster.env={PYTORCH_CUDA_ALLOC_CONF: 'max_split_size_mb:8'}"], "max_split_size_mb:8"),
    ],
)
def test_gpu_memory_is_taken_as_workers_take_it(
    monkeypatch: pytest.MonkeyPatch, given: str | None, words: list[str], setting: str
) -> None:
    config = compose_config("bench", [*WORDS, *words])
    monkeypatch.setenv(ALLOCATOR, given or "")
    assert common_environment(config)[ALLOCATOR] == setting
    set_allocator(config)
    assert os.environ[ALLOCATOR] == setting


@pytest.mark.parametrize("command", ["bench", "plan"])
def test_torch_sees_the_setting_for_gpu_memory(command: str) -> None:
    """It reads its environment when it is imported."""
    code = (
        "import os, sys\n"
        "from longalign import commands\n"
        "from longalign.config import compose_config\n"
        f"config = compose_config('{command}', ['model=tiny', 'cluster=cpu', 'plan.gpu=H200', 'data_dir=nowhere'])\n"
        "commands.set_allocator = lambda config: print('torch' in sys.modules)\n"
        f"commands.{command}(config, True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("False\n"), done.stderr


def test_mix_is_long_and_short_and_fills_the_pack() -> None:
    drawn = lengths("mix", 65536, np.random.default_rng(0))
    assert 0.9 * 65536 < sum(drawn) <= 65536
    assert min(drawn) < 2000 < 8192 < max(drawn)
    assert drawn == lengths("mix", 65536, np.random.default_rng(0))


@pytest.mark.parametrize("name", ["x64", "64x", "0x10", "1x1", "mixed"])
def test_a_pack_that_is_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"bench\.packs: '{name}' is no pack; write DOCUMENTSxTOKENS"):
        bench(tmp_path, f"bench.packs=[{name}]", dry_run=True)


def test_dry_run_counts_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(tmp_path, "bench.packs=[4x100]", "bench.peer=[trl,trl-defaults]", dry_run=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "4x100 sdpa budget pass: 4 documents, 400 tokens" in said
    assert "4x100 its own full trl-defaults: 4 documents" in said
    assert not (tmp_path / "out").exists()


def test_a_case_that_failed_stays_out_of_the_picture(tmp_path: Path) -> None:
    row = {"pack": "1x8", "attention": "sdpa", "activations": "full", "of": "pass"}
    rows = [{**row, "failed": "out of memory"}, {**row, "of": "trl", "tokens_per_s": 3.0, "of_matmul": 0.5}]
    plot({"rows": rows, "device": "CPU", "matmul_tflops": 0.1}, tmp_path / "p.png")
    plot({"rows": rows[:1], "device": "CPU", "matmul_tflops": 0.1}, tmp_path / "q.png")
    assert (tmp_path / "p.png").stat().st_size > (tmp_path / "q.png").stat().st_size > 0
