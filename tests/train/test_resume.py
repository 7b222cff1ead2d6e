"""A run that is stopped or killed and resumed ends with the weights of a run that never was."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import psutil
import pytest
import torch
from safetensors.torch import load_file

from longalign import launch
from longalign.config import load_frozen
from longalign.errors import UserError
from longalign.schema import Config
from longalign.train import checkpoint
from longalign.train.metrics import read_metrics
from tests.conftest import launch_all, longalign

STEPS = 24


@pytest.fixture(scope="module")
def words(base_words: list[str], data_dir: Path) -> list[str]:
    """24 steps of 27 samples on two processes, a checkpoint every 5."""
    made = [*base_words, f"data_dir={data_dir}", "strategy=naive", "strategy.batch_size=27", "cluster.processes=2"]
    return [*made, "cluster.zero_stage=2", "epochs=100", f"max_steps={STEPS}", "lr=1e-2", "save_every=5", "keep_last=3"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    """A run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = longalign("train", *words, "output_dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def terminated(config: Config, script: Path, step: int) -> tuple[int, float]:
    """A run of the worker in `script`, told to end after `step`: its exit code, and the seconds that it took to end."""
    command, sent = [sys.executable, str(script), f"{config.output_dir}/config.yaml"], []

    def terminate() -> None:
        wait_for_step(Path(str(config.output_dir)), step)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    code = launch.finish(config, lambda: launch.run_workers(command, config, script.parent / "logs"))
    thread.join()
    return code, time.monotonic() - sent[0]


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
    assert [p.name for p in sorted((whole / "checkpoints").iterdir())] == [f"step-0000{n}" for n in (15, 20, 24)]
    rows = read_metrics(whole / "metrics.jsonl")
    keys = "step epoch loss loss_sequence loss_token loss_by_source loss_by_length lr grad_norm skipped tokens targets sequences packs tokens_per_s step_s time peak_mem_gb"
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
    assert json.loads((whole / "model" / "longalign.json").read_text())["step"] == STEPS


def stop(process: subprocess.Popen[str], number: int, code: int, folder: Path) -> None:
    """Signal the launcher: the run saves its very last step and ends."""
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert "stopping: the step in progress is finished and saved; killed before that" in said
    steps = len(read_metrics(folder / "run" / "metrics.jsonl"))
    assert f"the checkpoint of step {steps} stands; resume=auto continues from it" in said
    assert steps < STEPS
    assert (folder / "run" / "checkpoints" / f"step-{steps:06d}").is_dir(), "the very last step was saved"
    assert not (folder / "run" / "model").exists()


def kill(process: subprocess.Popen[str], random: Random) -> None:
    """Kill a rank: the launcher ends the others and says so."""
    workers = [p for p in psutil.Process(process.pid).children() if "longalign.train.worker" in p.cmdline()]
    if workers:
        os.kill(workers[random.randrange(len(workers))].pid, signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == (1 if workers else 0), said
    assert not workers or "failed with signal 9" in said
    assert not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers)


def interrupt(words: list[str], folder: Path, seed: int, signals: list[tuple[int, int]], kills: int) -> None:
    """Start, signal or kill at a random moment, resume, signal or kill, ...; and let the last resumed run end."""
    random, run = Random(seed), folder / "run"
    for number in range(len(signals) + kills):
        again = ["resume=auto"] if (run / "config.yaml").is_file() else []
        done = len(read_metrics(run / "metrics.jsonl"))
        process = start([*words, *again], folder)
        wait_for_step(run, min(done + 1 + random.randrange(4), STEPS - 1))
        if number < len(signals):
            stop(process, *signals[number], folder)
        else:
            time.sleep(random.random() / 4)  # within a step, or while a checkpoint is written
            kill(process, random)
    resume(words, folder)


@pytest.mark.slow
def test_signals_and_kills_change_nothing(tmp_path: Path, words: list[str], whole: Path) -> None:
    signals = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
    interrupt([*words, "save_every=1"], tmp_path, seed=0, signals=signals, kills=3)
    assert_same(tmp_path / "run", whole)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*")), "no half of a checkpoint is left"


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 6))
def test_twenty_kills(seed: int, tmp_path: Path, words: list[str], whole: Path) -> None:
    interrupt([*words, "save_every=2"], tmp_path, seed, signals=[], kills=4)
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_step_that_outlasts_the_grace_leaves_the_last_checkpoint(
    tmp_path: Path, words: list[str], run_config: Callable[..., Config], capfd: pytest.CaptureFixture[str]
) -> None:
    """watched.py's way: a worker whose steps from the 7th on take 20 s, and a SIGTERM with 2 s of grace."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, time\n"
        "from longalign.train import worker\n"
        "made, step = [], worker.train_step\n"
        "def slowly(*given):\n"
        "    made.append(1)\n"
        "    if len(made) == 7:\n"
        "        time.sleep(20)\n"
        "    return step(*given)\n"
        "worker.train_step = slowly\n"
        "sys.exit(worker.main(sys.argv[1:]))\n"
    )
    config, _ = launch.prepare_run(run_config(tmp_path / "run", *words, "grace_s=2"), dry_run=False)
    code, seconds = terminated(config, slow, 6)
    assert code == 143
    assert seconds < 5
    said = capfd.readouterr().err
    assert "was not finished and saved within grace_s=2" in said
    assert "the checkpoint of step 5 stands; resume=auto continues from it" in said


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 8]))


@pytest.fixture
def refused(tmp_path: Path, words: list[str], run_config: Callable[..., Config]) -> Callable[..., str]:
    """refused("resume=auto", ...) -> what the user is told before a process of the run in tmp_path/run is started."""

    def told(*more: str) -> str:
        with pytest.raises(UserError) as error:
            launch.prepare_run(run_config(tmp_path / "run", *words, *more), dry_run=False)
        return str(error.value)

    return told


@pytest.mark.slow
def test_damaged_checkpoints_are_skipped_and_refused(
    tmp_path: Path, words: list[str], whole: Path, refused: Callable[..., str]
) -> None:
    """The newest has a file cut short, the one before a flipped bit: the third is taken."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step-000024")
    flipped, newest = sorted(checkpoints.iterdir())
    shutil.copytree(flipped, checkpoints / "step-000014")  # any name: what it holds says which step
    whole_record = (newest / "checkpoint.json").read_text()
    (newest / "checkpoint.json").write_text(whole_record[:20])
    assert "checkpoint.json is cut short" in refused(f"resume={newest}")
    (newest / "checkpoint.json").write_text(whole_record)
    victim = newest / "rank-00001.bin"
    os.truncate(victim, victim.stat().st_size // 2)
    assert "is damaged: rank-00001.bin has" in refused(f"resume={newest}")
    (newest / "checkpoint.json").write_text(whole_record.replace('"step": 20', '"step": 21'))
    assert "checkpoint.json does not have the checksum" in refused(f"resume={newest}")
    (newest / "checkpoint.json").write_text(whole_record)
    assert checkpoint.bit_damage(flipped, 0, 1) is None
    flip(flipped / "rank-00000.bin")
    assert checkpoint.bit_damage(flipped, 1, 2) is None, "the other rank's share"
    assert "rank-00000.bin does not have the checksum" in str(checkpoint.bit_damage(flipped, 0, 2))
    said = resume(words, tmp_path).stderr
    assert re.search(r"goes on  after step \d+, which \S+/checkpoints/step-0000\d\d holds", said), said
    assert "skipping damaged checkpoint step-000020: rank-00001.bin has" in said
    assert "skipping damaged checkpoint step-000015: rank-00000.bin does not have the checksum" in said
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_resumes_on_other_ranks_and_stages(
    tmp_path: Path, words: list[str], whole: Path, run_config: Callable[..., Config]
) -> None:
    """From two ranks and ZeRO-2 to one rank and every other stage, and from these back to two."""

    def resumed(name: str, checkpoint: Path, stage: int, ranks: int) -> Config:
        layout = [f"cluster.zero_stage={stage}", f"cluster.processes={ranks}"]
        more = ["save_every=1", "keep_last=2", "keep_every=20", f"resume={checkpoint}"]
        return run_config(tmp_path / name, *words, *layout, *more)

    first = whole / "checkpoints" / "step-000015"
    alone = [resumed(f"one{stage}", first, stage, 1) for stage in (0, 1, 3)]
    assert launch_all(alone, tmp_path / "a") == 0
    assert {p.name for p in (tmp_path / "one3" / "checkpoints").iterdir()} == {
        f"step-0000{step}" for step in (20, 23, 24)
    }, "the last two, and every twentieth"
    back = [(3, 0), (0, 3), (1, 2)]
    pairs = [resumed(f"two{to}", tmp_path / f"one{of}" / "checkpoints" / "step-000020", to, 2) for of, to in back]
    assert launch_all(pairs, tmp_path / "b") == 0
    expected = load_file(whole / "model" / "model.safetensors")
    before = load_file(Path(load_frozen(whole / "config.yaml").model.path) / "model.safetensors")
    wanted = read_metrics(whole / "metrics.jsonl")
    for config in (*alone, *pairs):
        run = Path(config.output_dir or "")
        rows = read_metrics(run / "metrics.jsonl")
        assert rows[-1]["step"] == STEPS
        for row in rows:
            assert row["loss"] == pytest.approx(wanted[row["step"] - 1]["loss"], rel=1e-4), (run.name, row["step"])
            assert row["tokens"] == wanted[row["step"] - 1]["tokens"]
        found = load_file(run / "model" / "model.safetensors")
        for key, value in expected.items():
            # Adam divides by the gradient's own size, so rounding of tiny gradients shows as larger relative moves
            assert (found[key] - value).norm() <= 1e-3 * (value - before[key]).norm(), (run.name, key)


@pytest.mark.slow
def test_what_cannot_be_resumed_is_refused(
    tmp_path: Path, words: list[str], whole: Path, refused: Callable[..., str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    assert "resume=auto continues it, overwrite=true starts it over" in refused()
    finished = longalign("train", *words, "output_dir=run", "resume=auto", cwd=tmp_path)
    assert finished.returncode == 0
    assert "this run is finished" in finished.stderr
    assert "continues it" in refused(f"resume={whole}/checkpoints/step-000020"), "not over another run"
    assert "another plan (seed changed)" in refused("resume=auto", "seed=8")
    record = tmp_path / "run" / "checkpoints" / "step-000024" / "checkpoint.json"
    record.write_text(json.dumps({"step": STEPS, "layout": 1}))
    assert "has the layout of an older longalign" in refused("resume=auto")
    assert_same(tmp_path / "run", whole)
