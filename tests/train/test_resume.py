"""A run that is stopped or killed and resumed ends with the weights of a run that never was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from longalign.train.metrics import read_metrics
from tests.conftest import longalign

STEPS = 24


@pytest.fixture(scope="module")
def words(base_words: list[str], data_dir: Path) -> list[str]:
    """24 steps of 27 samples on two processes, a checkpoint every 5."""
    made = [*base_words, f"data_dir={data_dir}", "strategy=naive", "strategy.batch_size=27", "cluster.processes=2"]
    return [*made, "cluster.zero_stage=2", "epochs=100", f"max_steps={STEPS}", "lr=1e-2", "save_every=5", "keep_last=2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    """A run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = longalign("train", *words, "output_dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).with_name("longalign")), "train", *words, "output_dir=run"]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if len(read_metrics(run / "metrics.jsonl")) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was never reached")


def assert_same(run: Path, whole: Path) -> None:
    weights, expected = (load_file(r / "model" / "model.safetensors") for r in (run, whole))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    rows, wanted = read_metrics(run / "metrics.jsonl"), read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows] == [row["loss"] for row in wanted]


def resume(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    done = longalign("train", *words, "output_dir=run", "resume=auto", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_run_folder(whole: Path) -> None:
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "model", "plan"} <= {p.name for p in whole.iterdir()}
    assert [p.name for p in sorted((whole / "checkpoints").iterdir())] == ["step-000015", "step-000020"]
    rows = read_metrics(whole / "metrics.jsonl")
    keys = "step epoch loss loss_sequence loss_token loss_by_source loss_by_length lr grad_norm tokens targets sequences packs tokens_per_s step_s peak_mem_gb"
    assert list(rows[0]) == keys.split()
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["lr"] == pytest.approx(1e-2), "ceil(0.03 * 24) = 1 step of warm-up"
    assert rows[-1]["lr"] == 0


@pytest.mark.slow
def test_exported_model_is_plain_transformers(whole: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "what"}], tokenize=False)
    assert text.endswith("[INST]what[/INST]")
    assert model(torch.tensor([tokenizer(text)["input_ids"]])).logits.isfinite().all()
    assert "longalign" not in (whole / "model" / "config.json").read_text()
    assert json.loads((whole / "model" / "longalign.json").read_text())["template"] == "longalign-llama"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_resumes_exactly(
    number: int, code: int, tmp_path: Path, words: list[str], whole: Path
) -> None:
    process = start(words, tmp_path)
    wait_for_step(tmp_path / "run", 7)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "resume=auto continues" in said
    steps = len(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert 7 <= steps < STEPS
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:06d}").is_dir(), "the very last step was saved"
    assert not (tmp_path / "run" / "model").exists()
    resume(words, tmp_path)
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_killed_rank_ends_the_run_which_resumes_exactly(tmp_path: Path, words: list[str], whole: Path) -> None:
    process = start(words, tmp_path)
    wait_for_step(tmp_path / "run", 12)
    workers = [p for p in psutil.Process(process.pid).children() if "longalign.train.worker" in p.cmdline()]
    assert len(workers) == 2
    os.kill(workers[1].pid, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1 failed with signal 9" in said
    assert not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers)
    resume(words, tmp_path)
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_damaged_checkpoint_is_skipped_and_refused(tmp_path: Path, words: list[str], whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    newest = tmp_path / "run" / "checkpoints" / "step-000020"
    victim = max((newest / "state").iterdir(), key=lambda p: p.stat().st_size)
    with open(victim, "r+b") as file:
        file.truncate(victim.stat().st_size // 2)
    whole_record = (newest / "checkpoint.json").read_text()
    (newest / "checkpoint.json").write_text(whole_record[:20])
    cut = longalign("train", *words, "output_dir=run", f"resume={newest}", cwd=tmp_path)
    assert cut.returncode == 2
    assert "checkpoint.json is cut short" in cut.stderr
    (newest / "checkpoint.json").write_text(whole_record)
    refused = longalign("train", *words, "output_dir=run", f"resume={newest}", cwd=tmp_path)
    assert refused.returncode == 2
    assert "is damaged" in refused.stderr
    assert victim.name in refused.stderr
    said = resume(words, tmp_path).stderr
    assert "skipping damaged checkpoint step-000020" in said
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_what_cannot_be_resumed_is_refused(tmp_path: Path, words: list[str], whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    twice = longalign("train", *words, "output_dir=run", cwd=tmp_path)
    assert twice.returncode == 2
    assert "resume=auto continues it, overwrite=true starts it over" in twice.stderr
    finished = longalign("train", *words, "output_dir=run", "resume=auto", cwd=tmp_path)
    assert finished.returncode == 0
    assert "this run is finished" in finished.stderr
    other = longalign("train", *words, "output_dir=run", f"resume={whole}/checkpoints/step-000020", cwd=tmp_path)
    assert other.returncode == 2, "a run is not continued over another one"
    for change, said in (
        ("cluster.processes=1", "another processes"),
        ("cluster.zero_stage=1", "another zero_stage"),
        ("seed=8", "another plan"),
    ):
        done = longalign("train", *words, "output_dir=run", "resume=auto", change, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
    assert_same(tmp_path / "run", whole)
