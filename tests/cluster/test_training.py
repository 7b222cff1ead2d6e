"""Training on two hosts: network namespaces, a Slurm job, torchrun; the losses are those of one process."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from longalign import launch
from longalign.errors import UserError
from longalign.schema import Config
from longalign.train.metrics import read_metrics
from tests.train.test_resume import wait_for_step

STEPS = 40
COMMAND = str(Path(sys.executable).with_name("longalign"))


@pytest.fixture(scope="module")
def words(base_words: list[str], data_dir: Path) -> list[str]:
    made = [word for word in base_words if not word.startswith("cluster=")]
    made += [f"data_dir={data_dir}", "strategy=packing", "strategy.packs_per_step=4", "cluster.zero_stage=2"]
    constant = ["lr=1e-3", "lr_final=1e-3", "warmup_ratio=0"]  # so that a longer run begins like a shorter one
    return [*made, *constant, "epochs=100", f"max_steps={STEPS}", "save_every=null"]


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory, run_config: Callable[..., Config], words: list[str]) -> Path:
    """A run of two processes on one host, prepared by us and started by torchrun."""
    folder = tmp_path_factory.mktemp("torchrun")
    config = run_config(folder / "run", *words, "cluster=torchrun", "cluster.device=cpu", "cluster.processes=2")
    config, _ = launch.prepare_run(config, dry_run=False)
    command = shlex.split(launch.torchrun_command(config))
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def losses(torchrun: Path) -> list[float]:
    """Those on one host; tests/train/test_layouts.py holds one host's processes against plain transformers."""
    return [row["loss"] for row in read_metrics(torchrun / "metrics.jsonl")]


def assert_losses(run: Path, wanted: list[float], at_least: int = STEPS) -> None:
    """Those of the run's steps, and no step twice. rel: rounding grows over the steps."""
    rows = read_metrics(run / "metrics.jsonl")[:STEPS]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= at_least
    assert [row["loss"] for row in rows] == pytest.approx(wanted[: len(rows)], rel=2e-5)


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces, 10.77.0.1 and 10.77.0.2, joined by a cable: hosts that share a disk alone."""
    names = [f"longalign-{os.getpid()}-{n}" for n in (1, 2)]
    ip = lambda words: subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)
    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"link add cable netns {names[0]} type veth peer name cable netns {names[1]}")
        for number, name in enumerate(names, 1):
            ip(f"-n {name} addr add 10.77.0.{number}/24 dev cable")
            ip(f"-n {name} link set cable up")
            ip(f"-n {name} link set lo up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', None) or error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_hosts_train_as_one_and_end_together(
    tmp_path: Path, words: list[str], losses: list[float], namespaces: list[str]
) -> None:
    (tmp_path / "hostfile").write_text("".join(f"{name} slots=2\n" for name in namespaces))
    multinode = ["cluster=multinode", "cluster.device=cpu", "cluster.master_addr=10.77.0.1", "max_steps=300"]
    shell = ["cluster.remote_shell=ip netns exec {host} sh -c {command}", "cluster.env={GLOO_SOCKET_IFNAME: cable}"]
    process = subprocess.Popen(
        [COMMAND, "train", *words, *multinode, *shell, "output_dir=run"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(tmp_path / "run", 4)
    workers = [
        p for p in psutil.Process(process.pid).children(recursive=True) if "longalign.train.worker" in p.cmdline()
    ]
    assert len(workers) == 4
    victim = next(p for p in workers if p.environ()["RANK"] == "3")
    began = time.monotonic()
    victim.kill()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert process.returncode == 1
    assert f"{namespaces[1]} rank 3 failed with signal 9" in said
    assert "Traceback" not in said.partition("rank 3 failed")[0]
    assert not psutil.wait_procs(workers, timeout=1)[1]
    assert (tmp_path / "run" / "logs" / f"{namespaces[0]}-rank-0.log").is_file()
    assert_losses(tmp_path / "run", losses, at_least=4)


SBATCH = """#!/bin/sh
# runs the job's script at once; as Slurm does, with the user's environment
for file; do :; done
SLURM_JOB_ID=77 SLURM_JOB_NODELIST='127.0.0.[1-2]' setsid sh -c 'echo $$ > {folder}/job.pid; exec bash "$0"' "$file" > {folder}/job.log 2>&1 &
echo "77;cluster"
"""
SCONTROL = """#!/bin/sh
[ "$1 $2" = "show hostnames" ] && [ "$3" = "127.0.0.[1-2]" ] && printf '127.0.0.1\\n127.0.0.2\\n'
[ "$1" = requeue ] && echo "$2" > {folder}/requeued
exit 0
"""
SRUN = """#!/bin/sh
while case "$1" in --*) ;; *) false ;; esac; do echo "$1" >> {folder}/srun.words; shift; done
exec "$@"
"""
SCRIPT = """#!/bin/bash
#SBATCH --job-name=longalign-run
#SBATCH --partition=gpu
#SBATCH --time=1-00:00:00
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --chdir={cwd}
#SBATCH --output={cwd}/run/slurm/job-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --exclusive
#SBATCH --qos=high

# 120 s before the time limit Slurm sends USR1: all ranks save, the job is queued again.
# A preempted job gets TERM, saves, and is queued again by Slurm. Started again, it resumes.
module() {{ :; }}
module load cuda
exec {python} -m longalign.cluster.slurm {cwd}/run/config.yaml
"""


SLURM = ["cluster=slurm", "cluster.device=cpu", "cluster.nodes=2", "cluster.processes=1", "cluster.slurm.partition=gpu"]
SLURM += [
    "cluster.slurm.time=1-00:00:00",
    "cluster.slurm.warn_s=120",
    "cluster.slurm.options=[--exclusive, --qos=high]",
]
SLURM += ["cluster.slurm.setup=['module() { :; }', 'module load cuda']", "cluster.env={GLOO_SOCKET_IFNAME: lo}"]


def test_slurm_script_is_shown_and_needs_sbatch(
    tmp_path: Path,
    run_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    config = run_config(tmp_path / "run", *SLURM)
    launch.dry_run(config)
    assert capsys.readouterr().out == SCRIPT.format(cwd=tmp_path, python=shlex.quote(sys.executable))
    with pytest.raises(UserError, match="sbatch, which is not on PATH here; --dry-run shows the script"):
        launch.train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_slurm_job_trains_and_resumes_after_its_time_limit(
    tmp_path: Path,
    words: list[str],
    losses: list[float],
    run_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("srun", SRUN)):
        (programs / name).write_text(text.format(folder=tmp_path))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    assert launch.train(run_config(tmp_path / "run", *words, *SLURM)) == 0
    assert "submitted job 77: " in capfd.readouterr().err
    wait_for_step(tmp_path / "run", 2)
    job = psutil.Process(int((tmp_path / "job.pid").read_text()))
    job.send_signal(signal.SIGUSR1)
    psutil.wait_procs([job], timeout=60)
    assert (tmp_path / "requeued").read_text() == "77\n", (tmp_path / "job.log").read_text()
    steps = len(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert 2 <= steps < STEPS
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:06d}").is_dir()

    script = tmp_path / "run" / "slurm" / "job.sbatch"
    job_words = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "127.0.0.[1-2]", "SLURM_RESTART_COUNT": "1"}
    again = {**os.environ, **job_words}
    done = subprocess.run(["bash", str(script)], cwd=tmp_path, env=again, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert_losses(tmp_path / "run", losses)
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert {"--nodelist=127.0.0.1", "--nodelist=127.0.0.2"} <= set((tmp_path / "srun.words").read_text().split())


@pytest.mark.slow
def test_torchrun_command_trains(torchrun: Path) -> None:
    rows = read_metrics(torchrun / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (torchrun / "model" / "config.json").is_file()


def test_torchrun_command_of_several_nodes(
    tmp_path: Path, run_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["cluster=torchrun", "cluster.device=cpu", "cluster.processes=2", "cluster.nodes=2", "cluster.port=1234"]
    launch.dry_run(run_config(tmp_path / "run", *words))
    meeting = "--nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=FIRST_HOST:1234"
    assert meeting in capsys.readouterr().out
