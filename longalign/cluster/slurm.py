"""Slurm: the batch script of a run, its submission, and what the script runs: `python -m longalign.cluster.slurm`.

The script starts one launcher, on the job's first host; it starts agents on all of them through srun (hosts.py).
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from longalign import launch
from longalign.cluster.hosts import run_hosts
from longalign.config import load_frozen, to_yaml
from longalign.errors import UserError
from longalign.files import write_text
from longalign.progress import console
from longalign.schema import Config
from longalign.streams import outlive_readers
from longalign.train import checkpoint


def script(config: Config) -> str:
    """The batch script of a run whose config.yaml is in place."""
    cluster, run = config.cluster, Path(config.output_dir or "")
    options = {
        "job-name": f"longalign-{run.name}",
        "partition": cluster.slurm.partition,
        "account": cluster.slurm.account,
        "time": cluster.slurm.time,
        "nodes": cluster.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": cluster.processes if cluster.device == "cuda" else None,
        "chdir": os.getcwd(),
        "output": f"{run}/slurm/job-%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{cluster.slurm.warn_s}",
    }
    words = [shlex.quote(f"--{name}={value}") for name, value in options.items() if value is not None]
    lines = [f"#SBATCH {word}" for word in (*words, "--requeue", *cluster.slurm.options)]
    command = shlex.join([sys.executable, "-m", "longalign.cluster.slurm", f"{run}/config.yaml"])
    told = [
        f"# {cluster.slurm.warn_s} s before the time limit Slurm sends USR1: all ranks save, the job is queued again.",
        "# A preempted job gets TERM, saves, and is queued again by Slurm. Started again, it resumes.",
    ]
    return "\n".join(["#!/bin/bash", *lines, "", *told, *cluster.slurm.setup, f"exec {command}"]) + "\n"


def submit(config: Config) -> int:
    """Write RUN/slurm/job.sbatch and hand it to sbatch. Raises UserError if sbatch refuses it."""
    file = Path(config.output_dir or "") / "slurm" / "job.sbatch"
    file.parent.mkdir(exist_ok=True)
    write_text(file, script(config))
    done = subprocess.run([find_sbatch(), "--parsable", str(file)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"sbatch refused {file}: {done.stderr.strip()}; see cluster.slurm, and resume=auto to try again"
        )
    console.print(f"submitted job {done.stdout.strip().partition(';')[0]}: {file}", soft_wrap=True)
    return 0


def find_sbatch() -> str:
    """Raises UserError if this is no machine that jobs are submitted from."""
    if (found := shutil.which("sbatch")) is None:
        raise UserError("cluster=slurm submits with sbatch, which is not on PATH here; --dry-run shows the script")
    return found


def main(frozen: str) -> int:
    """Within the job: run the ranks, and ask for another turn if the time ran out. Returns the exit code."""
    config = load_frozen(frozen)
    run, job = Path(config.output_dir or ""), os.environ["SLURM_JOB_ID"]
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and checkpoint.complete(run / "checkpoints"):
        config = config.model_copy(update={"resume": "auto"})
        write_text(run / "config.yaml", to_yaml(config))
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], capture_output=True, text=True, check=True
    )
    timed_out = []

    def on_limit(_number: int, _frame: object) -> None:
        timed_out.append(True)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGUSR1, on_limit)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        code = launch.finish(
            config, lambda: run_hosts(launch.worker_command(run), config, listed.stdout.split(), run / "logs")
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # a signal while no rank had started yet
        code = int(stop.code or 0)
    if timed_out and code == 143:
        subprocess.run(["scontrol", "requeue", job], check=True)
    return code


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main(sys.argv[1]))
