"""`longalign watch` tells from files alone what a run does, whoever writes them and however it ended."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from longalign.config import compose_config
from longalign.errors import UserError
from longalign.files import write_json
from longalign.train.heartbeat import Heartbeat
from longalign.watch.page import page, spark
from longalign.watch.run import watch
from longalign.watch.state import Rows, Run, find_runs
from tests.conftest import longalign, write_jsonl


def row(step: int, loss: float | None = 1.5) -> dict[str, Any]:
    spent = {"data": 0.1, "forward": 0.5, "backward": 1.0, "optimizer": 0.3, "sync": 0.0}
    known = {"step": step, "epoch": 0, "loss": loss, "tokens": 400, "step_s": 2.0, "time": spent}
    return {**known, "skipped": loss is None, "loss_by_source": {"long": 2.5}}


def make_run(folder: Path, rows: int = 5, processes: int = 1) -> Path:
    folder.mkdir(parents=True)
    config = {"cluster": {"nodes": 1, "processes": processes}, "max_steps": 10}
    (folder / "config.yaml").write_text(json.dumps(config))
    write_json(folder / "plan.partial", {"steps": 40})
    (folder / "plan").mkdir()
    (folder / "plan.partial").rename(folder / "plan" / "manifest.json")
    write_jsonl(folder / "metrics.jsonl", [row(step) for step in range(1, rows + 1)])
    return folder


def printed(folder: Path) -> str:
    console = Console(width=140)
    with console.capture() as said:
        console.print(page([Run(path).look() for path in find_runs(folder)]))
    return said.get()


def test_running(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_jsonl(run / "eval.jsonl", [{"step": 4, "needle": {"score": 0.25, "missing": 7}, "seconds": 3.0}])
    kept = run / "checkpoints" / "step-000004"
    kept.mkdir(parents=True)
    write_json(kept / "checkpoint.json", {})
    with Heartbeat(run / "logs", rank=0, timeout_s=None) as beat:
        beat.beat("backward", step=6, micro=3)
        state, said = Run(run).look(), printed(run)
    assert (state.how, state.step, state.n_steps, state.checkpoint) == ("running", 5, 10, "step-000004")
    assert (state.tokens_per_s, state.left_s) == (200.0, 10.0)
    for part in ("running", "step 5 of 10", "0:00:10 left", "step-000004", "loss_by_source/long", "eval/needle/score"):
        assert part in said
    assert "step 6, micro-step 3, backward" in said
    assert "backward 1.00 s (50%)" in said
    assert "other 0.10 s (5%)" in said


@pytest.mark.parametrize("how", ["finished", "stopped"])
def test_ended(how: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", processes=2)
    for rank in (0, 1):
        with Heartbeat(run / "logs", rank, timeout_s=None) as beat:
            assert Run(run).look().how == "running"
            beat.end(how)
    assert Run(run).look().how == how
    assert Run(run).look().left_s is None


def test_failed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", processes=2)
    with pytest.raises(OSError, match="lost"), Heartbeat(run / "logs", 1, timeout_s=None):
        raise OSError("the disk is lost")
    assert "failed: the disk is lost" in printed(run)


KILLED = """
import os, signal, sys
from pathlib import Path
from longalign.train.heartbeat import Heartbeat
Heartbeat(Path(sys.argv[1]), 0, None).beat("forward", step=6, micro=1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    subprocess.run([sys.executable, "-c", KILLED, str(run / "logs")], check=False)
    state = Run(run).look()
    assert (state.how, state.over) == ("killed", True)
    assert "step 6, micro-step 1, forward" in printed(run)


def test_another_host(tmp_path: Path) -> None:
    """Nothing but the heartbeat's age tells of a process elsewhere: its number means nothing here."""
    run = make_run(tmp_path / "run")
    beat = {"pid": 2**22 + 1, "host": "elsewhere", "beats": 9, "ended": None, "phase": "forward", "step": 6, "micro": 1}
    for age, how in ((10, "running"), (1000, "quiet")):
        (run / "logs").mkdir(exist_ok=True)
        (run / "logs" / "rank-0.heartbeat").write_text(json.dumps({**beat, "time": time.time() - age}))
        assert Run(run).look().how == how
    assert "no sign of life for 17 min" in printed(run)


def test_skipped_steps_show(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_jsonl(run / "metrics.jsonl", [row(1), row(2, None), row(3)])
    said = printed(run)
    assert "1 steps skipped, not finite; the last was 2" in said
    assert "▁×▁" in said


def test_rows_follow_the_file(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    assert rows.now() == []
    rows.path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3')  # a writer is in the middle of a row
    assert rows.now() == [{"step": 1}, {"step": 2}]
    with open(rows.path, "a") as file:
        file.write("}\n")
    assert rows.now() == [{"step": n} for n in (1, 2, 3)]
    write_jsonl(tmp_path / "shorter.jsonl", [{"step": 7}])
    (tmp_path / "shorter.jsonl").rename(rows.path)
    assert rows.now() == [{"step": 7}], "a resumed run has cut rows and replaced the file"


def test_several_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "sweep" / name, rows) for name, rows in (("lr=1", 3), ("lr=2", 0))]
    assert find_runs(tmp_path) == runs
    said = printed(tmp_path)
    assert "3/10" in said
    assert "0/10" in said
    (tmp_path / "record" / "sweep-runs").mkdir(parents=True)
    for number, output in enumerate((str(runs[1]), None, str(tmp_path / "refused"))):
        write_json(tmp_path / "record" / "sweep-runs" / f"{number}.json", {"output_dir": output})
    assert find_runs(tmp_path / "record") == [runs[1]]
    with pytest.raises(UserError, match="holds no run"):
        find_runs(tmp_path / "nothing")


def test_a_log_gets_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert watch(compose_config("watch", [f"output_dir={run}"])) == 0
    assert capsys.readouterr().out.count("step 5 of 10") == 1


def test_spark() -> None:
    assert spark([0, 7, None, 3.4]) == "▁█×▄"
    assert spark([5.0, 5.0]) == "▁▁"
    assert spark([]) == ""
    assert len(spark(range(1000))) <= 32
    assert spark([0, 0, 7, 7, None, None], width=3) == "▁█×"


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_live_until_interrupted_or_over(tmp_path: Path) -> None:
    """On a terminal it follows the run, ends with it, and ends with 130 on Ctrl-C; a path may hold an equals sign."""
    run = make_run(tmp_path / "lr=1")
    mine, its = pty.openpty()
    command = [str(Path(sys.executable).with_name("longalign")), "watch", str(run), "watch.every_s=0.1"]
    with Heartbeat(run / "logs", rank=0, timeout_s=None) as beat:
        seen_by = {"env": {**os.environ, "TERM": "xterm"}, "stdout": its, "stderr": its}
        live = [subprocess.Popen(command, cwd=tmp_path, **seen_by) for _ in range(2)]
        seen = ""
        while seen.count("step 5 of 10") < 2:
            seen += os.read(mine, 65536).decode(errors="replace")
        live[0].send_signal(signal.SIGINT)
        assert live[0].wait(30) == 130
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row(6)) + "\n")
        while "step 6 of 10" not in seen:
            seen += os.read(mine, 65536).decode(errors="replace")
        assert live[1].poll() is None
        beat.end("finished")
    assert live[1].wait(30) == 0
    wrong = longalign("watch", "nowhere", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "holds no run" in wrong.stderr
