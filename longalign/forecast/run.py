"""`longalign plan`: hours, tokens/s, memory and money of every strategy, from real lengths, before anything runs.

    tokenised lengths -> each strategy's plan -> packs dealt to ranks as in training -> seconds of each micro-step

Every micro-step lasts as long as its slowest rank, or as its exchange of weights and gradients if that is longer. With
a GPU at hand the worst pack is run first, and what it takes corrects the rest.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table

from longalign.bench.run import Case, run_case
from longalign.compare import names, of_each
from longalign.data.packing import deal
from longalign.data.plan import Plan, group, identity, is_fresh, lengths_of, read_data, steps_to_train
from longalign.errors import UserError
from longalign.files import disk_errors, write_json
from longalign.forecast import gpus
from longalign.forecast.fit import GIB, Site, does_not_fit, policies, policy_table
from longalign.forecast.predict import Pass, predict
from longalign.model import attention
from longalign.model.cost import cost_of
from longalign.model.load import load_config
from longalign.preflight import check_sequence_parallel, count_parameters
from longalign.progress import console, warn
from longalign.schema import Config
from longalign.stats import ranks_of

STEPS = 100  # of a plan that are timed, evenly spread
CPU_ADAM = 1e9  # parameters a second of a host's AdamW; not measured
# Seconds a layer of DeepSpeed's hooks under ZeRO-3, in short micro-steps; they hide behind longer ones. Naive's median
# micro-step through 32 layers, over 32, on two and four H200s: 0.018 and 0.017 (docs/performance-log.md).
HOOKS = 0.017
# A pass under ZeRO-3 over the same alone: its exchange runs beside it. Median of 40 steps on two and four H200s.
BESIDE = 1.065


def plan(config: Config, dry_run: bool) -> int:
    """Run the command; returns its exit code. Raises UserError."""
    gpu, ranks = find_gpu(config), ranks_of(config)
    cluster = config.cluster.model_copy(update={"device": "cuda", "processes": ranks, "nodes": 1})
    config, together = config.model_copy(update={"cluster": cluster}), cluster.sequence_parallel
    check_sequence_parallel(config)
    dataset, data = read_data(config.data_dir)
    parameters, lengths = count_parameters(config), lengths_of(dataset)
    site = Site.of(config, parameters, gpu)
    config = site.config
    if not (data["model_shape"] or config.strategy.cost):  # invented lengths, of no model: as bench does
        cost = {"cost": list(cost_of(site.shape))}
        config = config.model_copy(update={"strategy": config.strategy.model_copy(update=cost)})
    if dry_run:
        console.print(f"{config.data_dir}, {len(lengths):,} samples; {', '.join(names())} on {ranks} x {gpu.name}")
        return 0
    steps, refused = of_each(config, "plan", lambda mine: steps_of(mine, data, lengths))
    worst = max(
        (p for s in steps.values() for step in s["packs"] for p in step), key=lambda p: (np.square(p).sum(), p.sum())
    )
    largest = max((p for s in steps.values() for step in s["packs"] for p in step), key=lambda p: p.sum())
    for pack in (worst, largest):
        if site.predict(pack) is None:
            console.print(policy_table(site, pack, policies(site, pack)))
            raise UserError(does_not_fit(site, pack))
    factor = probe(site, worst) if config.plan.probe else None
    step_extra = optimizer_seconds(config, parameters, gpu)
    rows = {name: forecast(found, site, exchange(site), step_extra, factor or 1.0) for name, found in steps.items()}
    costs = policies(site, worst, factor or 1.0)
    report = {
        "gpu": gpu.name,
        "gpu_measured": gpu.measured,
        "ranks": ranks,
        "sequence_parallel": together,
        "activations": site.policy,
        "fixed_gib": site.fixed / GIB,
        "worst_pack": {"tokens": int(worst.sum()), "documents": len(worst), "longest": int(worst.max())},
        "probe": factor,
        "policies": costs,
        "strategies": rows,
        "refused": refused,
    }
    output = Path(config.output_dir or "")
    with disk_errors(output, "output_dir"):
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "plan.json", report)
    console.print(table(report))
    console.print(policy_table(site, worst, costs))
    for name, why in refused.items():
        warn(f"strategy={name} left out: {why}")
    return 0


def find_gpu(config: Config) -> gpus.Gpu:
    """plan.gpu, or the one that is here. Raises UserError."""
    if found := gpus.planned(config.plan.gpu):
        return found
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    what = f"this machine's {here} is not known" if here else "this machine has none"
    raise UserError(f"plan.gpu=auto: {what}; give plan.gpu={'|'.join(gpus.GPUS)}")


def steps_of(config: Config, data: dict[str, Any], lengths: np.ndarray) -> dict[str, Any]:
    """The plan's steps: how many, tokens, and the documents and costs of the packs of some of them."""
    folder = Path(config.data_dir) / "plans" / config.strategy.name
    with tempfile.TemporaryDirectory() as scratch:
        if not is_fresh(folder, identity(config, data)):
            group(config, folder := Path(scratch) / "plan")
        made = Plan(folder, data)
        count = steps_to_train(made.n_steps, config)
        some = np.unique(np.linspace(1, count, min(count, STEPS)).round().astype(int)).tolist()
        packs = [made.step(number) for number in some]
    return {
        "steps": count,
        "packs": [[lengths[pack.sample_ids] for pack in step] for step in packs],
        "costs": [[pack.cost for pack in step] for step in packs],
    }


def forecast(found: dict[str, Any], site: Site, exchanged: float, step_extra: float, factor: float) -> dict[str, Any]:
    """Figures of one strategy. Raises UserError if the packs of a micro-step do not fit together."""
    seconds, busy, tokens, most = 0.0, 0.0, 0, Pass(0.0, 0.0, "")
    cluster = site.config.cluster
    ranks, groups = cluster.ranks, cluster.ranks // cluster.sequence_parallel  # that packs are dealt to
    beside = BESIDE if ranks > 1 and cluster.zero_stage == 3 else 1.0
    for packs, costs in zip(found["packs"], found["costs"], strict=True):
        for micro in deal(costs, groups, cluster.packs_per_micro_step):
            passes: list[Pass] = []
            for documents in (np.concatenate([packs[p] for p in mine]) for mine in micro if mine):
                passes.append(site.estimate(documents))
                if not site.fits(passes[-1]):
                    raise UserError(does_not_fit(site, documents))
            times = [one.seconds * factor * beside for one in passes]
            seconds += max(*times, exchanged)
            busy += sum(times) / groups
            most = max(most, *passes, key=lambda one: one.peak)
        seconds += step_extra
        tokens += int(sum(pack.sum() for pack in packs))
    hours = seconds / len(found["packs"]) * found["steps"] / 3600
    price = site.config.plan.price_per_gpu_hour
    return {
        "steps": found["steps"],
        "seconds_per_step": seconds / len(found["packs"]),
        "tokens_per_s": tokens / seconds,
        "tokens_per_s_per_gpu": tokens / seconds / ranks,
        "hours": hours,
        "gpu_hours": hours * ranks,
        "cost": hours * ranks * price if price is not None else None,
        "idle": 1 - busy / seconds,
        "peak_gib": most.peak / GIB,
        "kept": most.kept,
    }


def exchange(site: Site) -> float:
    """Seconds that a micro-step exchanges: ZeRO-3 gathers bf16 weights twice, from 2 on fp32 gradients are reduced."""
    cluster = site.config.cluster
    if cluster.ranks == 1 or cluster.zero_stage < 2:
        return 0.0
    if cluster.zero_stage == 2:
        return site.parameters * 4 / site.gpu.link
    return max(site.parameters * 8 / site.gpu.link, site.shape["layers"] * HOOKS)


def optimizer_seconds(config: Config, parameters: int, gpu: gpus.Gpu) -> float:
    """Seconds of a step beyond its passes: AdamW reads and writes 38 bytes a parameter, on the GPU or the host."""
    ranks = config.cluster.ranks
    if config.cluster.offload_optimizer:
        hosts = -(-ranks // 8)
        return parameters / hosts / CPU_ADAM + parameters / ranks * 6 / gpu.host
    return parameters / ranks * 38 / gpu.bandwidth + (parameters * 6 / gpu.link if ranks > 1 else 0)


def probe(site: Site, worst: np.ndarray) -> float | None:
    """Measured over predicted seconds of the worst pack, forward and backward; None, and why, if it cannot run here."""
    config, here = site.config, gpus.here()
    if here is None or gpus.find(torch.cuda.get_device_name()) is None or here.name != site.gpu.name:
        what = f"this machine's GPU is {torch.cuda.get_device_name()}" if here else "this machine has no GPU"
        console.print(f"not probed: the plan is for {site.gpu.name}, {what}")
        return None
    # Weights and gradients in bf16 on one GPU, which cuts slices.
    expected = predict(worst, site.shape, here, site.policy, 4 * site.parameters, site.room)
    if expected is None:
        console.print("not probed: the worst pack does not fit one GPU")
        return None
    hf = load_config(config)
    backend = attention.backend_of(config, hf, "cuda")[0]
    row = run_case(config, hf, Case("worst", backend, site.policy), worst.tolist(), "cuda")
    if "failed" in row:
        return None
    peaks = row["peak_bytes"] / GIB, expected.peak / GIB
    told = f"{row['seconds']:.2f} s and {peaks[0]:.1f} GiB, predicted {expected.seconds:.2f} s and {peaks[1]:.1f}"
    console.print(f"worst pack, {worst.sum():,} tokens in {len(worst)} documents: {told}")
    return float(row["seconds"] / expected.seconds)


def table(report: dict[str, Any]) -> Table:
    about = "" if report["gpu_measured"] else ", rates scaled from the H200's"
    about += f", corrected by {report['probe']:.2f} measured here" if report["probe"] else ""
    if (together := report["sequence_parallel"]) > 1:
        about = f", {together} run a pack together{about}"
    made = Table(title=f"{report['ranks']} x {report['gpu']}{about}", title_justify="left", box=box.SIMPLE)
    made.add_column("strategy")
    for column in ("steps", "s/step", "tokens/s/GPU", "idle", "peak GiB", "hours", "cost"):
        made.add_column(column, justify="right")
    made.add_column("kept")
    for name, row in report["strategies"].items():
        cost = "" if row["cost"] is None else f"{row['cost']:,.0f}"
        numbers = f"{row['seconds_per_step']:,.1f}", f"{row['tokens_per_s_per_gpu']:,.0f}", f"{row['idle']:.1%}"
        made.add_row(
            name, f"{row['steps']:,}", *numbers, f"{row['peak_gib']:.0f}", f"{row['hours']:,.1f}", cost, row["kept"]
        )
    return made
