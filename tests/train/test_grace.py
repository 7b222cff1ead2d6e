"""SIGTERM in a step that takes longer than its grace: the step before is saved, in time, and nothing is lost."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from longalign import launch
from longalign.schema import Config
from longalign.train.checkpoint import complete, step_of
from longalign.train.grace import Grace, TooLate
from longalign.train.metrics import read_metrics
from tests.train.test_resume import terminated

MICRO_STEPS, SLEEP, STEPS = 4, 1.5, 4  # of a step; seconds of each; of a run


@pytest.mark.slow
def test_a_long_step_is_given_up(
    run_config: Callable[..., Config], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, time\n"
        "from longalign.train import micro, worker\n"
        "made, steps = micro.micro_steps, []\n"
        "def slowly(*given):\n"
        "    steps.append(1)\n"
        "    for one in made(*given):\n"
        f"        time.sleep({SLEEP} * (len(steps) > 1))\n"
        "        yield one\n"
        "worker.micro_steps = slowly\n"
        "sys.exit(worker.main(sys.argv[1:]))\n"
    )
    words = ["cluster.processes=2", "cluster.zero_stage=2", f"max_steps={STEPS}", "epochs=100", "save_every=100"]
    words += ["strategy=naive", f"strategy.batch_size={2 * MICRO_STEPS}", "grace_s=5", "resume=auto"]
    truth, _ = launch.prepare_run(run_config(tmp_path / "truth", *words), dry_run=False)
    assert launch.train(truth) == 0
    config, _ = launch.prepare_run(run_config(tmp_path / "run", *words), dry_run=False)
    code, seconds = terminated(config, slow, 2)
    assert code == 143
    assert seconds < 5, "within its grace, where the step takes six seconds"
    said = capfd.readouterr().err
    assert "was not finished" not in said
    assert "stopped after step 2" in said
    assert [step_of(path) for path in complete(tmp_path / "run/checkpoints")] == [2]
    config, _ = launch.prepare_run(run_config(tmp_path / "run", *words), dry_run=False)
    assert launch.train(config) == 0
    weights, expected = (load_file(tmp_path / name / "model/model.safetensors") for name in ("run", "truth"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    rows, wanted = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "truth"))
    assert [(row["step"], row["loss"]) for row in rows] == [(row["step"], row["loss"]) for row in wanted]


def test_when_ranks_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(dist, "all_reduce", lambda flag: asked.append(now[0]))
    grace = Grace(30.0, torch.device("cpu"))

    def step(last_s: float, micro_steps: int, received: int = 0) -> int:
        """Of `micro_steps` that take a tenth of a second each; returns how often ranks asked one another."""
        asked.clear()
        grace.begin(last_s)
        for _ in range(micro_steps - 1):
            now[0] += 0.1
            grace.check(received)
        return len(asked)

    assert step(0.0, 400, signal.SIGTERM) == 0, "the first step: nobody knows how long it takes"
    assert step(14.0, 400, signal.SIGTERM) == 0, "it is finished in time"
    assert 35 <= step(40.0, 400) <= 45, "about once a second"
    assert step(40.0, 400, signal.SIGINT) > 0, "nothing waits behind a Ctrl-C"
    with pytest.raises(TooLate):
        step(40.0, 400, signal.SIGTERM)
    grace.begin(40.0)
    now[0] += 26.0
    for _ in range(400):
        grace.check(signal.SIGTERM)  # its end is near enough
