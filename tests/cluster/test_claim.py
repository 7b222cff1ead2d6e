"""A run folder has one launch at a time, and a killed one leaves nothing to clean up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from longalign import launch
from longalign.cluster import claim
from longalign.errors import UserError
from longalign.files import write_json
from longalign.schema import Config
from longalign.train.checkpoint import complete
from longalign.train.heartbeat import Heartbeat, hung
from longalign.train.metrics import read_metrics
from tests.train.test_resume import wait_for_step


def test_a_living_launch_is_refused_by_name(tmp_path: Path) -> None:
    with (
        claim.claim(tmp_path),
        pytest.raises(
            UserError, match=rf"launcher on {os.uname().nodename}, process {os.getpid()}; .* 0 s old\. .*kill"
        ),
    ):
        claim.refuse_second(tmp_path)
    claim.refuse_second(tmp_path)
    with pytest.raises(ValueError, match="broken"), claim.claim(tmp_path):
        raise ValueError("broken")
    claim.refuse_second(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from longalign.cluster.claim import claim
with claim(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_launch_is_not_in_the_way(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode == -9
    assert json.loads((tmp_path / "logs" / "launcher.heartbeat").read_text())["ended"] is None
    began = time.monotonic()
    claim.refuse_second(tmp_path)
    assert time.monotonic() - began < 0.5


RANK = """
import sys, time
from pathlib import Path
from longalign.train.checkpoint import complete
from longalign.train.heartbeat import Heartbeat
with Heartbeat(Path(sys.argv[1]), 1, None) as beat:
    beat.beat("checkpoint", step=6)
    print("saving", flush=True)
    time.sleep(float(sys.argv[2]))
    beat.end("stopped")
"""


def test_ranks_that_a_dead_launcher_left_behind_may_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def rank(seconds: float) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", RANK, str(tmp_path / "logs"), str(seconds)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert process.stdout
        process.stdout.readline()
        return process

    process, began = rank(1.0), time.monotonic()
    claim.refuse_second(tmp_path)
    assert time.monotonic() - began > 0.5
    assert f"rank 1 on {os.uname().nodename}, process {process.pid}" in capfd.readouterr().err
    process.wait()
    monkeypatch.setattr(claim, "FRESH_S", 0.5)
    monkeypatch.setattr(claim, "BEAT_S", 0.5)
    process = rank(60)
    with pytest.raises(UserError, match=f"in use by another launch: rank 1 .* process {process.pid};"):
        claim.refuse_second(tmp_path)
    process.kill()
    process.wait()
    claim.refuse_second(tmp_path)


def test_another_host_is_known_by_its_heartbeats_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "FRESH_S", 1.5)
    (tmp_path / "logs").mkdir()
    file, beating = tmp_path / "logs" / "launcher.heartbeat", threading.Event()
    beat = lambda age: write_json(file, {"pid": 1, "host": "elsewhere", "ended": None, "time": time.time() - age})

    def took() -> float:
        began = time.monotonic()
        claim.refuse_second(tmp_path)
        return time.monotonic() - began

    beat(1000)
    assert took() < 0.5
    beat(0)
    assert 1 < took() < 3, "killed just now: its heartbeat grows old"

    def live() -> None:
        while not beating.wait(0.2):
            beat(0)

    beat(0)
    thread = threading.Thread(target=live)
    thread.start()
    with pytest.raises(UserError, match="launcher on elsewhere, process 1;"):
        took()
    beating.set()
    thread.join()


def test_what_an_earlier_launch_left_tells_nothing_of_this_one(tmp_path: Path) -> None:
    """A resumed launch that failed before its ranks wrote anything was taken for hung once more."""
    logs = tmp_path / "logs"
    with Heartbeat(logs, 0, None) as ended:
        ended.end("stopped")
        (logs / "rank-0.stacks").write_text("Timeout (0:00:02)!\nThread 0x1 (most recent call first):\n  File x\n")
    assert hung(logs, 1)
    with claim.claim(tmp_path):
        assert hung(logs, 1) is None


def test_overwriting_twice_keeps_the_first_run(tmp_path: Path, run_config: Callable[..., Config]) -> None:
    """Until one has ended well."""
    run = tmp_path / "run"
    (run / "plan").mkdir(parents=True)
    (run / "config.yaml").write_text("the good one")
    for _ in range(2):
        config, _ = launch.prepare_run(run_config(run, "overwrite=true"), dry_run=False)
        assert launch.finish(config, lambda: 1) == 1
    assert len(launch.replaced(run)) == 2
    assert (launch.replaced(run)[0] / "config.yaml").read_text() == "the good one"
    assert launch.finish(config, lambda: 0) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


class Launch:
    """`longalign train ... 2>&1 | tee log`, as far as tee has not gone away."""

    def __init__(self, folder: Path, words: list[str]):
        self.reader, write = os.pipe()
        command = [str(Path(sys.executable).with_name("longalign")), "train", *words, "output_dir=run"]
        self.process = subprocess.Popen(command, cwd=folder, stdout=write, stderr=write)
        os.close(write)

    def end(self, number: int) -> int:
        """The exit code, if the reader goes away and a signal comes."""
        os.close(self.reader)
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.mark.slow
def test_a_run_outlives_second_launches_its_launcher_and_its_readers(
    tmp_path: Path, base_words: list[str], data_dir: Path, run_config: Callable[..., Config]
) -> None:
    run, words = tmp_path / "run", ["strategy.packs_per_step=4", "cluster.processes=2", "epochs=100", "save_every=null"]
    steps = lambda: len(read_metrics(run / "metrics.jsonl"))
    saved = lambda: [path.name for path in complete(run / "checkpoints")][-1:]
    first = Launch(tmp_path, [*base_words, f"data_dir={data_dir}", *words])
    wait_for_step(run, 2)
    before = (run / "config.yaml").read_text()
    for again in ("resume=auto", "overwrite=true"):
        with pytest.raises(UserError, match=f"launcher on .*, process {first.process.pid}"):
            launch.prepare_run(run_config(run, *words, again), dry_run=False)
    assert first.process.poll() is None
    assert (run / "config.yaml").read_text() == before

    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    second = Launch(tmp_path, [*base_words, f"data_dir={data_dir}", *words, "resume=auto"])  # no wait, no cleaning
    wait_for_step(run, steps() + 3)
    assert saved(), "its ranks were told by the kernel, and have saved"
    assert second.end(signal.SIGINT) == 130
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert saved() == [f"step-{len(rows):06d}"], "the very last step"
