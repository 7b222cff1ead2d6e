"""From a checked Config to worker processes: run folder, plan, frozen config, signals, exit codes."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from longalign.config import to_yaml
from longalign.data.packing import idle_share
from longalign.data.plan import Plan, group, identity, is_fresh, prepare_plan, steps_to_train
from longalign.errors import UserError
from longalign.files import read_json, write_text
from longalign.model import attention
from longalign.model.load import load_config, loads_weights, resolve_device, resolve_dtype, weights_of
from longalign.preflight import check_data, check_disk, check_memory, check_run_folder, copy_needs, count_parameters
from longalign.progress import console, warn
from longalign.schema import Config
from longalign.train import checkpoint
from longalign.train.metrics import read_metrics

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# -- what a run will be ---------------------------------------------------------------------------------


def resolve(config: Config) -> Config:
    """Settle what depends on this machine: device, process count, absolute paths. Raises UserError."""
    device = resolve_device(config)
    here = torch.cuda.device_count() if device == "cuda" else 1
    wanted = config.cluster.processes
    processes = here if wanted == "auto" else wanted
    if device == "cuda" and processes > here:
        raise UserError(f"cluster.processes={processes} but this machine has {here} GPU(s)")
    if config.cluster.zero_stage == 0 and resolve_dtype(config, device) != torch.float32:
        raise UserError(
            "cluster.zero_stage=0 trains in float32 alone (DeepSpeed keeps no float32 gradients of bfloat16 weights "
            "there); use cluster.zero_stage=1 or model.dtype=float32"
        )
    absolute = lambda path: str(Path(path).expanduser().absolute())
    local = lambda path: absolute(path) if path and Path(path).expanduser().exists() else path
    model = {"path": local(config.model.path), "tokenizer": local(config.model.tokenizer)}
    return config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update={"device": device, "processes": processes}),
            "model": config.model.model_copy(update=model),
            "data_dir": absolute(config.data_dir),
            "output_dir": absolute(config.output_dir),
            "init_from": local(config.init_from),
            "resume": config.resume if config.resume in ("none", "auto") else absolute(config.resume),
        }
    )


def worker_command(run: Path) -> list[str]:
    return [sys.executable, "-m", "longalign.train.worker", str(run / "config.yaml")]


def describe(config: Config, parameters: int, manifest: dict[str, Any], plan: Plan, how: str) -> list[tuple[str, str]]:
    """What `train` is about to do, as lines of a table; warns if ranks will idle."""
    run, first = Path(config.output_dir or ""), manifest["epochs"][0]
    steps = steps_to_train(manifest["steps"], config)
    backend, why = attention.backend_of(config, load_config(config), config.cluster.device)
    ranks = int(config.cluster.processes)
    packs = plan.step(1)
    if len(packs) < ranks:
        idle = idle_share([p.cost for p in packs], ranks, config.cluster.packs_per_micro_step)
        warn(f"{len(packs)} packs per step on {ranks} ranks: {idle:.0%} of the time is idle; raise packs_per_step")
    dtype = str(resolve_dtype(config, config.cluster.device)).removeprefix("torch.")
    return [
        ("model", f"{config.model.path}, {parameters:,} parameters, {dtype}"),
        ("data", f"{config.data_dir}"),
        ("plan", how),
        ("steps", f"{steps:,} ({first['steps']:,} an epoch, {config.epochs} epochs)"),
        (
            "packs",
            f"{manifest['packs']:,}, {first['fill_ratio']:.1%} full, {first['sequences_per_pack']} sequences each",
        ),
        ("tokens per step", f"{first['tokens_per_step']:,}"),
        ("attention", f"{backend}: {why}"),
        ("cluster", f"{ranks} x {config.cluster.device}, ZeRO-{config.cluster.zero_stage}"),
        ("output", str(run)),
        ("worker", " ".join(worker_command(run))),
    ]


def prepare_run(config: Config, dry_run: bool) -> tuple[Config, list[tuple[str, str]]]:
    """Check everything, put plan and frozen config into the run folder (not in a dry run). Returns what will run."""
    config = resolve(config)
    run = Path(config.output_dir or "")
    check_run_folder(run, config)
    data = check_data(config)
    parameters = count_parameters(config)
    check_disk(config, run, parameters)
    check_memory(config, parameters, copy_needs(config, parameters))
    if start := checkpoint.find(config):
        checkpoint.check(start, identity(config, data))
    if dry_run:
        shared = Path(config.data_dir) / "plans" / config.strategy.name
        with tempfile.TemporaryDirectory() as scratch:
            fresh = is_fresh(shared, identity(config, data))
            folder = shared if fresh else Path(scratch) / "plan"
            manifest = read_json(folder / "manifest.json") if fresh else group(config, folder)
            how = str(shared) if fresh else "would be grouped first"
            return config, describe(config, parameters, manifest, Plan(folder, data), how)
    if loads_weights(config):
        weights_of(config)  # a conversion happens here, once, and its errors are told before any worker starts
    replaces = config.overwrite and config.resume == "none" and run.is_dir()
    if replaces:
        shutil.rmtree(replaced(run), ignore_errors=True)
        run.rename(replaced(run))
    try:
        manifest, how = prepare_plan(config, run)
        write_text(run / "config.yaml", to_yaml(config))
        return config, describe(config, parameters, manifest, Plan(run / "plan", data), how)
    except BaseException:
        if replaces:
            shutil.rmtree(run, ignore_errors=True)
            replaced(run).rename(run)
        raise


def replaced(run: Path) -> Path:
    """Where a run that overwrite=true replaces waits until the new one has ended well."""
    return run.with_name(run.name + ".replaced")


def is_finished(run: Path, config: Config) -> bool:
    planned = read_json(run / "plan" / "manifest.json")["steps"]
    rows = read_metrics(run / "metrics.jsonl")
    done = bool(rows) and rows[-1]["step"] >= steps_to_train(planned, config)
    return done and (run / "model" / "config.json").is_file()


# -- running --------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def worker_environment(config: Config, rank: int, port: int) -> dict[str, str]:
    """The variables of torch's env:// rendezvous, and what DeepSpeed and OpenMP need."""
    processes, cpu = int(config.cluster.processes), config.cluster.device == "cpu"
    threads = max(1, (os.cpu_count() or 1) // processes)
    made = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "DS_ACCELERATOR": "cpu" if cpu else "cuda",
        "PYTORCH_CUDA_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if cpu:
        made["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", threads)
    return {**os.environ, **{k: str(v) for k, v in made.items()}, **config.cluster.env}


def _before_worker() -> None:
    """In a worker before it starts: SIGTERM, to save and stop, if the launcher is killed; and signals wait until the
    worker can handle them (worker.main), which takes some seconds of imports."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; Linux only, as is CUDA training
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def run_workers(command: list[str], config: Config, logs: Path) -> int:
    """Run one process per rank and wait for all; returns the exit code of the run.

    Rank 0 writes to the terminal, the others to logs/rank-N.log. The first Ctrl-C or SIGTERM is passed on, for the
    workers to save and stop; a second one kills them, and so does the end of grace_s after a SIGTERM: whoever sent it
    kills next. When a rank fails the others are ended and its log is shown.
    """
    logs.mkdir(parents=True, exist_ok=True)
    received: list[int] = []
    workers: list[subprocess.Popen[bytes]] = []
    deadline = math.inf

    def forward(number: int, _frame: Any) -> None:
        nonlocal deadline
        received.append(number)
        for worker in workers:
            worker.send_signal(number if len(received) == 1 else signal.SIGKILL)
        if number == signal.SIGTERM:
            deadline = min(deadline, time.monotonic() + 0.9 * config.grace_s)

    catch = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, forward) for number in catch}
    port = free_port()
    try:
        for rank in range(int(config.cluster.processes)):
            log = None if rank == 0 else open(logs / f"rank-{rank}.log", "wb")
            # A session of its own: a terminal's Ctrl-C reaches the workers once, through `forward`.
            workers.append(
                subprocess.Popen(
                    command,
                    env=worker_environment(config, rank, port),
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=_before_worker,
                )
            )
        failed = None
        while failed is None and any(worker.poll() is None for worker in workers):
            time.sleep(0.1)
            failed = next((rank for rank, worker in enumerate(workers) if worker.poll()), None)
            if time.monotonic() > deadline:
                warn(f"the step in progress was not finished and saved within grace_s={config.grace_s:g}")
                received.append(signal.SIGKILL)
                break
    finally:
        _end(workers, grace=5.0 if len(received) < 2 else 0.0)
        for number, handler in before.items():
            signal.signal(number, handler)
    if received and (failed is None or len(received) > 1):
        return 128 + received[0]
    if failed is None:
        return 0
    code = workers[failed].returncode
    if failed:  # rank 0 has written to the terminal already
        tail = (logs / f"rank-{failed}.log").read_text(errors="replace")[-4000:]
        console.print(tail)
    if code == 2:
        return 2
    cause = f"signal {-code}" if code < 0 else f"exit code {code}"
    console.print(f"rank {failed} failed with {cause}", style="red")
    return 1


def _end(workers: list[subprocess.Popen[bytes]], grace: float = 5.0) -> None:
    """End workers that still run: they may sit in a collective that a dead rank will never join."""
    deadline = time.monotonic() + grace
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def train(config: Config) -> int:
    """Run the command; returns its exit code. Raises UserError before anything has started."""
    config, lines = prepare_run(config, dry_run=False)
    show(lines)
    run = Path(config.output_dir or "")
    if config.resume == "auto" and is_finished(run, config):
        console.print(f"this run is finished: {run}/model")
        return 0
    code = run_workers(worker_command(run), config, run / "logs")
    if code:
        checkpoint.sweep(run / "checkpoints")
    if code not in (0, 2):
        console.print(checkpoint.latest(run))
    if code == 0:
        shutil.rmtree(replaced(run), ignore_errors=True)
    elif replaced(run).is_dir():
        warn(f"the run that this one was to replace is kept in {replaced(run)}")
    return code


def show(lines: list[tuple[str, str]]) -> None:
    for label, text in lines:
        console.print(Text.assemble((f"{label:>16}", "bold"), f"  {text}"), soft_wrap=True)
