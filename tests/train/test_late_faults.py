"""A run whose steps are all done loses none of them, whatever happens in the last evaluation or in the export."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longalign import launch
from longalign.files import write_json
from longalign.schema import Config
from longalign.train import checkpoint, heartbeat
from longalign.train.metrics import read_metrics
from tests.conftest import write_jsonl
from tests.train.test_eval_tasks import GRID

WORKER = str(Path(__file__).with_name("late.py"))
WORDS = ["strategy=packing", "strategy.packs_per_step=2", "cluster.processes=2", "cluster.zero_stage=2", "lr=1e-2"]
WORDS += ["max_steps=3", "save_every=null", "grace_s=2"]
WORDS += ["eval_every=3", "eval_tasks=[needle]", "template=longalign-chatglm", *GRID]


def terminate_in_export(logs: Path) -> None:
    """What Slurm does in the end, or a user."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if [beat["phase"] for beat in heartbeat.read(logs, 2).values()] == ["export"] * 2:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(0.1)


@pytest.mark.slow
def test_killed_in_the_last_evaluation_and_in_the_export(
    tmp_path: Path, run_config: Callable[..., Config], capfd: pytest.CaptureFixture[str]
) -> None:
    run, whole = tmp_path / "run", run_config(tmp_path / "whole", *WORDS)
    made = lambda *more: run_config(run, *WORDS, *more)

    def start(fault: str, config: Config, *before: Config) -> int:
        prepared = [launch.prepare_run(one, dry_run=False)[0] for one in (*before, config)]
        files = [f"{one.output_dir}/config.yaml" for one in prepared]
        command = [sys.executable, WORKER, fault, *files]
        return launch.finish(prepared[-1], lambda: launch.run_workers(command, prepared[-1], tmp_path / "logs"))

    assert start("evaluation", made(), whole) == 1
    assert (tmp_path / "whole" / "model").is_dir()
    assert [path.name for path in checkpoint.complete(run / "checkpoints")] == ["step-000003"]
    assert "the checkpoint of step 3 stands" in capfd.readouterr().err
    rows = (run / "metrics.jsonl").read_text()
    assert len(rows.splitlines()) == 3

    thread = threading.Thread(target=terminate_in_export, args=(run / "logs",))
    thread.start()
    assert start("export", made("resume=auto")) == 143
    thread.join()
    said = capfd.readouterr().err
    assert "the checkpoint of step 3 stands; resume=auto continues from it" in said
    assert not (run / "model").exists()

    assert start("step", made("resume=auto")) == 0
    assert (run / "metrics.jsonl").read_text() == rows, "no step was trained again"
    assert [row["step"] for row in read_metrics(run / "eval.jsonl")] == [3]
    found, wanted = (load_file(folder / "model" / "model.safetensors") for folder in (run, tmp_path / "whole"))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert start("none", made("resume=auto")) == 0
    assert "this run is finished" in capfd.readouterr().err


def test_a_model_of_fewer_steps_is_no_end(tmp_path: Path, run_config: Callable[..., Config]) -> None:
    """max_steps was raised from 24, and the longer run killed before its export."""
    (tmp_path / "plan").mkdir()
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "plan" / "manifest.json", {"steps": 100})
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": step} for step in range(1, 27)])
    write_json(tmp_path / "model" / "config.json", {})
    finished = lambda steps: launch.is_finished(tmp_path, run_config(tmp_path, f"max_steps={steps}"))
    write_json(tmp_path / "model" / "longalign.json", {"step": 24})
    assert [finished(steps) for steps in (24, 26, 27)] == [True, False, False]
    write_json(tmp_path / "model" / "longalign.json", {"step": 26})
    assert [finished(steps) for steps in (26, 27)] == [True, False]
    write_json(tmp_path / "model" / "longalign.json", {})
    assert not finished(26), "a model that does not say"
