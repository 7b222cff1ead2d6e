"""From a checked Config to a run: run folder, plan, frozen config; then its processes (longalign/cluster)."""

from __future__ import annotations

import glob
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.text import Text

from longalign.cluster.claim import claim, refuse_second
from longalign.cluster.hostfile import count_nodes, hosts_of
from longalign.cluster.hosts import remote_command, run_hosts
from longalign.cluster.workers import common_environment, run_workers
from longalign.config import to_yaml
from longalign.data.packing import balance, idle_share, packs_per_step
from longalign.data.plan import Plan, group, identity, is_fresh, prepare_plan, steps_to_train
from longalign.errors import UserError
from longalign.files import read_json, write_text
from longalign.forecast.fit import told
from longalign.model import attention
from longalign.model.load import RECORD, load_config, loads_weights, resolve_device, resolve_dtype, weights_of
from longalign.preflight import (
    check_data,
    check_disk,
    check_memory,
    check_run_folder,
    check_sequence_parallel,
    count_parameters,
    settle_offload,
)
from longalign.progress import console, warn
from longalign.schema import Cluster, Config
from longalign.train import checkpoint, heartbeat
from longalign.train.loggers import check_loggers
from longalign.train.metrics import read_metrics

# -- what a run will be ---------------------------------------------------------------------------------


def resolve(config: Config) -> Config:
    """Settle what depends on this machine: device, process count, absolute paths. Raises UserError."""
    cluster = resolve_cluster(config)
    device = cluster.device
    if config.cluster.zero_stage == 0 and resolve_dtype(config, device) != torch.float32:
        raise UserError(
            "cluster.zero_stage=0 trains in float32 alone (DeepSpeed keeps no float32 gradients of bfloat16 weights "
            "there); use cluster.zero_stage=1 or model.dtype=float32"
        )
    absolute = lambda path: str(Path(path).expanduser().absolute())
    local = lambda path: absolute(path) if path and Path(path).expanduser().exists() else path
    model = {"path": local(config.model.path), "tokenizer": local(config.model.tokenizer)}
    check_sequence_parallel(config.model_copy(update={"cluster": cluster}))
    settled = config.model_copy(
        update={
            "cluster": cluster,
            "model": config.model.model_copy(update=model),
            "data_dir": absolute(config.data_dir),
            "output_dir": absolute(config.output_dir),
            "init_from": local(config.init_from),
            "resume": config.resume if config.resume in ("none", "auto") else absolute(config.resume),
        }
    )
    return settle_offload(settled)


def resolve_cluster(config: Config) -> Cluster:
    """The cluster with device, nodes and processes settled. Raises UserError."""
    cluster = count_nodes(config.cluster)
    local = cluster.launcher == "local"
    if local and cluster.nodes != 1:
        raise UserError(f"cluster.nodes={cluster.nodes} needs cluster=multinode, cluster=slurm or cluster=torchrun")
    # Other launchers may be told of GPUs that this machine, a login node perhaps, has not.
    device = resolve_device(config) if local or cluster.device == "auto" else cluster.device
    here = torch.cuda.device_count() if device == "cuda" else 1
    processes = here if cluster.processes == "auto" else cluster.processes
    if local and device == "cuda" and processes > here:
        raise UserError(f"cluster.processes={processes} but this machine has {here} GPU(s)")
    if not processes:
        raise UserError("cluster.processes=auto counts this machine's GPUs, and it has none: give the number per node")
    return cluster.model_copy(update={"device": device, "processes": processes})


def worker_command(run: Path) -> list[str]:
    return [sys.executable, "-m", "longalign.train.worker", str(run / "config.yaml")]


def describe(
    config: Config, parameters: int, manifest: dict[str, Any], plan: Plan, how: str, start: Path | None
) -> list[tuple[str, str]]:
    """What `train` is about to do, as lines of a table; warns if ranks will idle. Raises UserError for a small disk."""
    run, first = Path(config.output_dir or ""), manifest["epochs"][0]
    steps = steps_to_train(manifest["steps"], config)
    check_disk(config, run, steps, parameters)
    cluster = config.cluster
    chosen = "by the nodes, this machine has no GPU"
    if cluster.device == "cpu" or torch.cuda.is_available():
        chosen = ": ".join(attention.backend_of(config, load_config(config), cluster.device))
    together = cluster.sequence_parallel
    packs, groups = plan.step(1), cluster.ranks // together
    if len(packs) < groups:
        idle = idle_share([p.cost for p in packs], groups, cluster.packs_per_micro_step)
        who = f"{groups} ranks" if together == 1 else f"{groups} groups of {together} ranks"
        warn(f"{len(packs)} packs per step on {who}: {idle:.0%} of the time is idle; raise packs_per_step")
    shared = f", {together} ranks run a pack together (sequence parallelism)" if together > 1 else ""
    offloaded = ", optimizer on the host" if cluster.offload_optimizer else ""
    nodes = f"{cluster.nodes} nodes x " if cluster.launcher != "local" else ""
    dtype = str(resolve_dtype(config, cluster.device)).removeprefix("torch.")
    weights = [f"{source} {of['loss_weight']:.1%}" for source, of in first["sources"].items()]
    return [
        ("model", f"{config.model.path}, {parameters:,} parameters, {dtype}"),
        ("data", f"{config.data_dir}"),
        ("plan", how),
        ("steps", f"{steps:,} ({first['steps']:,} an epoch, {config.epochs} epochs)"),
        *([("goes on", f"after step {checkpoint.step_of(start):,}, which {start} holds")] if start else []),
        (
            "packs",
            f"{manifest['packs']:,}, {first['fill_ratio']:.1%} full, {first['sequences_per_pack']} sequences each",
        ),
        ("tokens per step", f"{first['tokens_per_step']:,}"),
        ("loss weight", ", ".join(weights) + " (mean step of the first epoch)"),
        ("waiting", waiting(config, plan, groups)),
        ("attention", chosen),
        ("activations", told(config, parameters, plan)),
        ("cluster", f"{nodes}{cluster.processes} x {cluster.device}, ZeRO-{cluster.zero_stage}{offloaded}{shared}"),
        ("output", str(run)),
        *started_by(config),
    ]


def waiting(config: Config, plan: Plan, groups: int) -> str:
    """How much ranks (or groups of them that run packs together) will wait, by packs' costs; and what to change."""
    strategy, cost = config.strategy, plan.file.read(columns=["cost"])["cost"].to_numpy()
    epochs = np.split(cost, plan.first_row[:-1][np.flatnonzero(np.diff(plan.epochs)) + 1])
    share = 1 - float(np.mean([balance(mine, packs_per_step(strategy), groups) for mine in epochs]))
    told = f"{share:.1%} of the time of {groups} ranks, if all wait at every micro-step"
    if strategy.name == "balanced" and share > 0.05 and strategy.packs_per_step < strategy.strata * groups:
        told += f"; less with strategy.packs_per_step={strategy.strata * groups}"
    return told


def started_by(config: Config) -> list[tuple[str, str]]:
    cluster, run = config.cluster, Path(config.output_dir or "")
    if cluster.launcher == "hostfile":
        hosts = hosts_of(cluster)
        agent = shlex.join(remote_command(cluster.remote_shell, hosts[0]))
        return [("hosts", ", ".join(hosts)), ("agent", agent), ("worker", " ".join(worker_command(run)))]
    return [("worker", " ".join(worker_command(run)))] if cluster.launcher == "local" else []


def prepare_run(config: Config, dry_run: bool) -> tuple[Config, list[tuple[str, str]]]:
    """Check everything, put plan and frozen config into the run folder (not in a dry run). Returns what will run."""
    config = resolve(config)
    run = Path(config.output_dir or "")
    check_run_folder(run, config)
    if not dry_run:
        refuse_second(run)
    check_loggers(config)
    data = check_data(config)
    parameters = count_parameters(config)
    check_memory(config, parameters)
    if start := checkpoint.find(config):
        checkpoint.check(start, identity(config, data))
    if dry_run:
        shared = Path(config.data_dir) / "plans" / config.strategy.name
        with tempfile.TemporaryDirectory() as scratch:
            fresh = is_fresh(shared, identity(config, data))
            folder = shared if fresh else Path(scratch) / "plan"
            manifest = read_json(folder / "manifest.json") if fresh else group(config, folder)
            how = str(shared) if fresh else "would be grouped first"
            return config, describe(config, parameters, manifest, Plan(folder, data), how, start)
    if loads_weights(config):
        weights_of(config)  # a conversion happens here, once, and its errors are told before any worker starts
    replaces = config.overwrite and config.resume == "none" and run.is_dir()
    new = replaces or not run.is_dir()
    number = 1 + max((int(old.name.rpartition("-")[2]) for old in replaced(run)), default=0)
    waits = run.with_name(f"{run.name}.replaced-{number}")
    if replaces:
        run.rename(waits)
    try:
        manifest, how = prepare_plan(config, run)
        write_text(run / "config.yaml", to_yaml(config))
        return config, describe(config, parameters, manifest, Plan(run / "plan", data), how, start)
    except BaseException:
        if new:
            shutil.rmtree(run, ignore_errors=True)
        if replaces:
            waits.rename(run)
        raise


def replaced(run: Path) -> list[Path]:
    """The runs that overwrite=true has replaced, which wait until a new one has ended well."""
    found = run.parent.glob(f"{glob.escape(run.name)}.replaced-*")
    return sorted(old for old in found if old.name.rpartition("-")[2].isdecimal())


def is_finished(run: Path, config: Config) -> bool:
    """Whether all steps are done and the model is theirs, not of an earlier, shorter run in this folder."""
    steps = steps_to_train(read_json(run / "plan" / "manifest.json")["steps"], config)
    rows, record = read_metrics(run / "metrics.jsonl"), run / "model" / RECORD
    done = bool(rows) and rows[-1]["step"] >= steps
    return done and record.is_file() and read_json(record).get("step", 0) >= steps


# -- starting it ----------------------------------------------------------------------------------------


def train(config: Config) -> int:
    """Run the command; returns its exit code. Raises UserError before any rank has started."""
    from longalign.cluster import slurm

    if config.cluster.launcher == "slurm":
        slurm.find_sbatch()
    config, lines = prepare_run(config, dry_run=False)
    show(lines)
    run = Path(config.output_dir or "")
    command, logs, cluster = worker_command(run), run / "logs", config.cluster
    match cluster.launcher:
        case "local":
            return finish(config, lambda: run_workers(command, config, logs))
        case "hostfile":
            return finish(config, lambda: run_hosts(command, config, hosts_of(cluster), logs))
        case "slurm":
            return slurm.submit(config)
        case "torchrun":
            for old in replaced(run):
                warn(f"the run that this one replaces is kept in {old}: delete it when this one has ended well")
            print(torchrun_command(config))
            return 0


def dry_run(config: Config) -> None:
    """Say what `train` would do."""
    from longalign.cluster import slurm

    config, lines = prepare_run(config, dry_run=True)
    show(lines)
    if config.cluster.launcher == "slurm":
        print(slurm.script(config), end="")
    if config.cluster.launcher == "torchrun":
        print(torchrun_command(config))


def torchrun_command(config: Config) -> str:
    """What is to be run on every node, by hand or by whatever else starts processes there."""
    cluster = config.cluster
    environment = [f"{key}={value}" for key, value in common_environment(config).items()]
    where = f"{cluster.master_addr or 'FIRST_HOST'}:{cluster.port or 29500}"
    meet = (
        ["--rdzv-backend=c10d", f"--rdzv-endpoint={where}"]
        if cluster.ranks > int(cluster.processes)
        else ["--standalone"]
    )
    layout = [f"--nnodes={cluster.nodes}", f"--nproc-per-node={cluster.processes}", *meet]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *layout]
    return shlex.join(["env", *environment, *torchrun, *worker_command(Path(config.output_dir or ""))[1:]])


def finish(config: Config, start: Callable[[], int]) -> int:
    """Run a prepared run to its end, unless it is there already; returns the exit code."""
    run, code = Path(config.output_dir or ""), 1
    if config.resume == "auto" and is_finished(run, config):
        console.print(f"this run is finished: {run}/model")
        return 0
    with claim(run):
        try:
            code = start()
        finally:
            for old in replaced(run):
                if code == 0:
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    warn(f"the run that this one was to replace is kept in {old}")
    if code == 1 and (told := heartbeat.hung(run / "logs", config.cluster.ranks)):
        console.print(told, soft_wrap=True)
    if code not in (0, 2):
        console.print(checkpoint.latest(run))
    return code


def show(lines: list[tuple[str, str]]) -> None:
    for label, text in lines:
        console.print(Text.assemble((f"{label:>16}", "bold"), f"  {text}"), soft_wrap=True)
