"""A run that is stopped or killed and resumed ends with the weights of a run that never was."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from longalign import launch
from longalign.config import compose_config
from longalign.schema import Config
from longalign.train import checkpoint
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
def test_signals_save_and_resume_exactly(tmp_path: Path, words: list[str], whole: Path) -> None:
    run, more = tmp_path / "run", []
    for at, number, code in ((4, signal.SIGINT, 130), (11, signal.SIGTERM, 143)):
        process = start([*words, *more], tmp_path)
        wait_for_step(run, at)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code, said
        steps = len(read_metrics(run / "metrics.jsonl"))
        assert at <= steps < STEPS
        assert f"the last checkpoint, step {steps}, stands; resume=auto continues from it" in said
        assert (run / "checkpoints" / f"step-{steps:06d}").is_dir(), "the very last step was saved"
        assert not (run / "model").exists()
        more = ["resume=auto"]
    resume(words, tmp_path)
    assert_same(run, whole)


# -- runs that are killed -------------------------------------------------------------------------------------


@pytest.fixture
def slowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that last 0.2 s and files that take 0.5 s, so that something random happens within both."""
    worker = str(Path(__file__).with_name("slowed.py"))
    monkeypatch.setattr(launch, "worker_command", lambda run: [sys.executable, worker, str(run / "config.yaml")])
    monkeypatch.setenv("SLOW_STEP", "0.2")
    monkeypatch.setenv("SLOW_WRITE", "0.5")


def workers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if any("slowed.py" in word for word in p.cmdline())]


def while_training(config: Config, ready: Callable[[], bool], act: Callable[[], None]) -> int:
    """Train, and do something as soon as steps are made and something holds; returns the exit code."""
    metrics, started = Path(config.output_dir or "") / "metrics.jsonl", time.time()
    making_steps = lambda: len(workers()) == 2 and metrics.is_file() and metrics.stat().st_mtime > started

    def watch() -> None:
        deadline = time.monotonic() + 120
        while not (making_steps() and ready()) and time.monotonic() < deadline:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    code = launch.train(config)
    thread.join()
    return code


def writing(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step-*.partial/*.safetensors"))


def newest(run: Path) -> int:
    return max(map(checkpoint.step_of, checkpoint.complete(run / "checkpoints")), default=0)


def kill_once(config: Config, in_a_write: bool, draw: random.Random) -> None:
    """Train until a random rank is killed: at a random moment of a write, or of the steps beyond a checkpoint."""
    run = Path(config.output_dir or "")
    step = min(newest(run) + draw.randint(6, 11), STEPS - 3)
    rank, delay = draw.randrange(2), draw.uniform(0, 0.4)

    def ready() -> bool:
        rows = read_metrics(run / "metrics.jsonl")
        made = rows[-1]["step"] if rows else 0
        return made >= STEPS - 3 or (writing(run) if in_a_write else made >= step)

    def kill() -> None:
        time.sleep(delay)
        workers()[rank].kill()

    assert while_training(config, ready, kill) == 1
    assert not workers()
    assert not writing(run), "half a checkpoint is removed"


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=[pytest.mark.faults, pytest.mark.timeout(3600)])])
def test_killed_runs_resume_exactly(
    kills: int,
    slowed: None,
    tmp_path: Path,
    words: list[str],
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Kills at random moments, then a SIGTERM whose grace a step outlasts; the end is that of an uninterrupted run."""
    run, draw = tmp_path / "run", random.Random(kills)
    config = compose_config("train", [*words, f"output_dir={run}", "resume=auto"])
    for number in range(kills):
        kill_once(config, number % 2 == 1, draw)
    assert "failed with signal 9" in capfd.readouterr().err

    monkeypatch.setenv("SLOW_STEP", "6")
    sent: list[float] = []

    def terminate() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    stands = newest(run)
    code = while_training(config.model_copy(update={"grace_s": 2.0}), lambda: True, terminate)
    assert code == 143
    assert time.monotonic() - sent[0] < 3
    said = capfd.readouterr().err
    assert "was not finished and saved within grace_s=2" in said
    assert stands >= 5, "a checkpoint was written before the first kill"
    assert f"the last checkpoint, step {stands}, stands; resume=auto continues from it" in said

    monkeypatch.setenv("SLOW_STEP", "0")
    assert launch.train(config) == 0
    assert_same(run, whole)


# -- resuming elsewhere ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_damage_is_passed_over_and_another_layout_goes_on(
    tmp_path: Path, words: list[str], whole: Path, model_dir: Path
) -> None:
    """Two ranks with ZeRO-2 wrote it, one rank with ZeRO-3 continues, from the checkpoint before a flipped bit."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    victim = tmp_path / "run" / "checkpoints" / "step-000020" / "rank-00001.safetensors"
    data = bytearray(victim.read_bytes())
    data[-100] ^= 1
    victim.write_bytes(data)
    said = resume([*words, "cluster.processes=1", "cluster.zero_stage=3"], tmp_path).stderr
    assert "skipping damaged checkpoint step-000020: rank-00001.safetensors differs from its checksum" in said
    assert (tmp_path / "run" / "checkpoints" / "abandoned-step-000020").is_dir()
    rows, wanted = read_metrics(tmp_path / "run" / "metrics.jsonl"), read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for a, b in zip(rows, wanted, strict=True):
        assert (a["lr"], a["tokens"], a["targets"]) == (b["lr"], b["tokens"], b["targets"]), "the same samples"
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3 if a["step"] > 15 else 0)
    assert rows[15]["loss"] == pytest.approx(wanted[15]["loss"], rel=2e-6), "no update in between"
    weights, expected = (load_file(r / "model" / "model.safetensors") for r in (tmp_path / "run", whole))
    start = load_file(model_dir / "model.safetensors")
    for key in expected:  # bounds as in test_layouts.py
        assert (weights[key] - expected[key]).norm() <= 1e-3 * (expected[key] - start[key]).norm(), key


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
    done = longalign("train", *words, "output_dir=run", "resume=auto", "seed=8", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "another plan: seed changed" in done.stderr
    assert_same(tmp_path / "run", whole)
