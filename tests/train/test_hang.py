"""A rank that hangs ends the run, which says where every rank stood; the run continues, and its curves with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from longalign import launch
from longalign.cluster.workers import run_workers
from longalign.progress import console
from longalign.schema import Config
from longalign.train import heartbeat
from longalign.train.heartbeat import Heartbeat, main_thread, position
from longalign.train.metrics import read_metrics
from longalign.watch.state import Run
from tests.train import faulty
from tests.train.test_eval_tasks import GRID

STEPS = 6
WORDS = ["strategy=packing", "strategy.packs_per_step=4", "cluster.processes=2", "cluster.zero_stage=2", "lr=1e-2"]
WORDS += [f"max_steps={STEPS}", "save_every=2", "hang_timeout_s=3", "logger=tensorboard"]
WORDS += ["eval_every=3", "eval_tasks=[needle]", "template=longalign-chatglm", *GRID]


class Runs:
    """RUN-hang: rank 1 sleeps in step 4, behind the checkpoint of step 2; then the same run, resumed."""

    def __init__(self, folder: Path, make: Callable[..., Config]):
        self.run = folder / "run-hang"
        self.code, self.said = self._launch(make(self.run, *WORDS))
        self.rows, self.evals = (read_metrics(self.run / f"{name}.jsonl") for name in ("metrics", "eval"))
        self.beats, self.state = heartbeat.read(self.run / "logs", 2), Run(self.run).look()
        self.stacks = [(self.run / "logs" / f"rank-{rank}.stacks").read_text() for rank in (0, 1)]
        print(self.said)
        self.resumed = self._launch(make(self.run, *WORDS, "resume=auto"))

    def _launch(self, config: Config) -> tuple[int, str]:
        config, _ = launch.prepare_run(config, dry_run=False)
        command = [sys.executable, faulty.__file__, f"{config.output_dir}/config.yaml"]
        with console.capture() as said:
            code = launch.finish(config, lambda: run_workers(command, config, self.run / "logs"))
        return code, said.get()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, run_config: Callable[..., Config]) -> Runs:
    return Runs(tmp_path_factory.mktemp("hang"), run_config)


@pytest.mark.slow
def test_who_hangs_is_shown(runs: Runs) -> None:
    assert runs.code == 1
    assert "no progress for hang_timeout_s" in runs.said
    assert [line for line in runs.said.splitlines() if "behind" in line and "rank 1" in line], runs.said
    assert "step 4, micro-step 1, forward" in runs.said
    assert "in sleep_for_ever" in runs.said, "the line where it sleeps"
    assert "faulty.py" in runs.said
    assert "resume=auto continues" in runs.said
    assert runs.stacks[1].startswith("Timeout (")
    # The rank that waits writes where it is told to, or fails of the lost connection first.
    assert "most recent call" in runs.stacks[0]
    assert "in train_step" in runs.stacks[0]
    assert [row["step"] for row in runs.rows] == [1, 2, 3]
    assert (runs.state.how, runs.state.step, runs.state.checkpoint) == ("hung", 3, "step-000002")
    assert "in sleep_for_ever" in runs.state.why
    assert {beat["host"] for beat in runs.beats.values()} == {os.uname().nodename}


@pytest.mark.slow
def test_the_run_continues(runs: Runs) -> None:
    code, said = runs.resumed
    assert code == 0, said
    rows = read_metrics(runs.run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows[:3]] == [row["loss"] for row in runs.rows], "step 3 once more, as it was"
    assert [row["step"] for row in read_metrics(runs.run / "eval.jsonl")] == [3, 6]
    assert [row["step"] for row in runs.evals] == [3]
    assert {beat["ended"] for beat in heartbeat.read(runs.run / "logs", 2).values()} == {"finished"}


@pytest.mark.slow
def test_seconds_by_phase(runs: Runs) -> None:
    for row in read_metrics(runs.run / "metrics.jsonl"):
        assert list(row["time"]) == ["data", "forward", "backward", "optimizer", "sync"]
        assert all(seconds >= 0 for seconds in row["time"].values())
        assert min(row["time"]["forward"], row["time"]["backward"], row["time"]["optimizer"]) > 0
        assert sum(row["time"].values()) <= row["step_s"] + 0.001  # phases lie within the step; both are rounded


@pytest.mark.slow
def test_tensorboard_holds_every_row_once(runs: Runs) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="extra tensorboard"
    )
    assert len(list((runs.run / "tensorboard").iterdir())) == 2, "one file a start"
    curves = accumulator.EventAccumulator(str(runs.run / "tensorboard"))
    curves.Reload()
    read = lambda name: [(event.step, event.value) for event in curves.Scalars(name)]
    rows, evals = (read_metrics(runs.run / f"{name}.jsonl") for name in ("metrics", "eval"))
    for column in ("loss", "loss_sequence", "grad_norm", "lr", "tokens_per_s", "skipped"):
        assert read(f"train/{column}") == [(row["step"], pytest.approx(float(row[column]), rel=1e-6)) for row in rows]
    for column in ("loss_by_source", "loss_by_length", "time"):
        for name in rows[0][column]:
            wanted = [(row["step"], pytest.approx(row[column][name], rel=1e-6)) for row in rows if name in row[column]]
            assert read(f"train/{column}/{name}") == wanted
    assert read("eval/needle/score") == [(row["step"], pytest.approx(row["needle"]["score"])) for row in evals]


# -- the heartbeat alone --------------------------------------------------------------------------------


SCRIPT = """
import sys, time
from pathlib import Path
from longalign.train.heartbeat import Heartbeat

def wait(seconds):
    time.sleep(seconds)

with Heartbeat(Path(sys.argv[1]), rank=3, timeout_s=0.4) as heartbeat:
    wait(0.8)                                  # the first step is not watched
    heartbeat.watch()
    for step in range(1, 5):
        heartbeat.beat("forward", step=step, micro=1)
        wait(0.2)
    with heartbeat.unwatched("checkpoint"):
        wait(0.8)
    heartbeat.beat("backward", step=5, micro=2)
    print("alive", flush=True)
    wait(60)
"""


def test_time_limit(tmp_path: Path) -> None:
    logs, command = tmp_path, [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.returncode) == ("alive\n", 1), done.stderr
    beat = heartbeat.read(logs, 4)[3]
    assert position(beat) == "step 5, micro-step 2, backward"
    assert beat["ended"] is None
    assert "in wait" in main_thread((logs / "rank-3.stacks").read_text()).splitlines()[0]
    assert "rank 3" in str(heartbeat.hung(logs, 4))


def test_no_limit_and_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), Heartbeat(tmp_path, rank=0, timeout_s=None) as beat:  # noqa: PT012
        beat.watch()
        beat.beat("data", step=1, micro=0)
        raise ValueError("broken")
    assert json.loads((tmp_path / "rank-0.heartbeat").read_text())["ended"] == "failed: broken"
    assert heartbeat.hung(tmp_path, 1) is None
