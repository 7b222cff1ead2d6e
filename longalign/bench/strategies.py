"""`longalign bench bench.strategies=[...]`: whole optimizer steps of an epoch, strategy by strategy, on all ranks.

    strategy names -> a plan of one epoch of data_dir each -> one launch of ranks (bench/ranks.py) -> bench.json

If ranks die in a strategy, that one has failed, and the others are run by another launch.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from rich import box
from rich.table import Table

from longalign.bench.plot import plot_strategies
from longalign.bench.summary import Work, work_of
from longalign.cluster.workers import run_workers
from longalign.compare import given, strategy_of
from longalign.config import to_yaml
from longalign.data.plan import group, read_data
from longalign.errors import UserError
from longalign.files import disk_errors, read_json, versions, write_json, write_text
from longalign.launch import resolve
from longalign.model.cost import cost_of, shape_of
from longalign.model.load import load_config
from longalign.preflight import check_memory, count_parameters
from longalign.progress import clock, console, warn
from longalign.schema import Config, Strategy


def bench(config: Config, dry_run: bool) -> int:
    """Run the command; returns its exit code: 1 if a strategy failed. Raises UserError."""
    if config.cluster.launcher != "local":
        raise UserError(f"bench runs on this machine alone: cluster=auto instead of cluster={config.cluster.name}")
    config = resolve(config)
    words, chosen = given(config.strategy), dict[str, Strategy]()
    for item in config.bench.strategies:
        try:
            chosen[item] = strategy_of(item, words)
        except UserError as error:
            raise UserError(f"bench.strategies, {item!r}: {error}") from None
    check_ids(config)
    check_memory(config, count_parameters(config))
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            console.print(planned_table(prepare(config, chosen, Path(scratch))))
        return 0
    output = Path(config.output_dir or "")
    with disk_errors(output, "output_dir"):
        console.print(planned_table(prepare(config, chosen, output)))
        write_json(output / "bench.json", about(config, list(chosen)))
    code = run(config, list(chosen), output)
    report = read_json(output / "bench.json")
    if report["rows"]:
        console.print(table(report))
    if code <= 2 and any("failed" not in row for row in report["rows"]):  # a picture tells that it ended by itself
        console.print(told_fit(report), soft_wrap=True)
        plot_strategies(report, output / "bench.png")
        console.print(f"written: {output}/bench.json, bench.png")
    return code


def check_ids(config: Config) -> None:
    """Raises UserError if the model has no embedding for a token. Which tokenizer made them does not matter here."""
    vocabulary = load_config(config).get_text_config().vocab_size
    ids = read_data(config.data_dir)[0].select_columns(["input_ids"]).with_format("arrow")
    largest = max(pc.max(pc.list_flatten(rows["input_ids"])).as_py() for rows in ids.iter(256))
    if largest >= vocabulary:
        raise UserError(
            f"data_dir={config.data_dir} holds the token id {largest}, and model.path={config.model.path} has a "
            f"vocabulary of {vocabulary}; tokenize for this model"
        )


def prepare(config: Config, chosen: dict[str, Strategy], output: Path) -> dict[str, Work]:
    """Plan an epoch of each strategy in output/strategies, beside its frozen config. Raises UserError."""
    shutil.rmtree(output / "strategies", ignore_errors=True)
    flops = cost_of(shape_of(load_config(config)))  # of this model, whichever the data were tokenised for
    works, random = {}, config.model.model_copy(update={"init": "random"})
    for number, (item, strategy) in enumerate(chosen.items()):
        folder = output / "strategies" / str(number)
        folder.mkdir(parents=True)
        mine = {
            "strategy": strategy.model_copy(update={"cost": strategy.cost or list(flops)}),
            "model": random,
            "epochs": 1,
            "max_steps": config.bench.steps,
            "output_dir": str(folder),
        }
        settled = config.model_copy(update=mine)
        try:
            steps = group(settled, folder / "plan")["steps"]
        except UserError as error:
            raise UserError(f"bench.strategies, {item!r}: {error}") from None
        if (config.bench.steps or 0) > steps:
            raise UserError(
                f"bench.steps={config.bench.steps}: {item!r} makes {steps} steps of an epoch of "
                f"data_dir={config.data_dir}; give at most so many, or null for all"
            )
        write_text(folder / "config.yaml", to_yaml(settled))
        works[item] = work_of(folder)
    return works


def run(config: Config, items: list[str], output: Path) -> int:
    """Launch ranks until every strategy has been tried; returns the exit code."""
    file, pending, worst = output / "bench.json", list(range(len(items))), 0
    while pending:
        command = [sys.executable, "-m", "longalign.bench.ranks", str(output), *map(str, pending)]
        code = run_workers(command, config, output / "logs", saves=False)
        report = read_json(file)
        begun = [row["strategy"] for row in report["rows"]]
        if code > 2 or code == 0:  # a signal; or all went well
            return code or worst
        if items[pending[0]] not in begun:
            return code  # the engine was not built: the next launch would not build it either
        last = items.index(begun[-1])
        if "failed" in report["rows"][-1]:
            told = output / "strategies" / str(last) / "failed.txt"
            why = told.read_text(encoding="utf-8") if told.is_file() else f"ranks ended with exit code {code}"
            report["rows"][-1]["failed"] = why
            warn(f"{items[last]}: {why}")
            write_json(file, report)
        pending, worst = [number for number in pending if number > last], 1
    return worst


def about(config: Config, items: list[str]) -> dict[str, Any]:
    """bench.json before anything is measured."""
    cluster = config.cluster
    return {
        "strategies": items,
        "device": cluster.device,
        "ranks": cluster.ranks,
        "zero_stage": cluster.zero_stage,
        "sequence_parallel": cluster.sequence_parallel,
        "model": {"path": config.model.path, **config.model.config},
        "data_dir": config.data_dir,
        "max_length": config.max_length,
        "rows": [],
        "fit": None,
        "versions": versions("torch", "transformers", "deepspeed"),
    }


def planned_table(works: dict[str, Work]) -> Table:
    made = Table(title="one epoch of the same data", title_justify="left", box=box.SIMPLE)
    made.add_column("strategy")
    for column in ("steps", "packs", "samples", "tokens", "TFLOP", "idle, if time is FLOPs"):
        made.add_column(column, justify="right")
    for item, work in works.items():
        counts = (f"{count:,}" for count in (len(work.steps), work.packs, work.samples, work.tokens))
        made.add_row(item, *counts, f"{work.flop / 1e12:,.2f}", f"{work.predicted_idle:.1%}")
    return made


def table(report: dict[str, Any]) -> Table:
    together = f", {report['sequence_parallel']} run a pack together" if report["sequence_parallel"] > 1 else ""
    title = f"{report['ranks']} x {report['device']}, ZeRO-{report['zero_stage']}{together}"
    made = Table(title=title, title_justify="left", box=box.SIMPLE)
    made.add_column("strategy")
    columns = ("steps", "s/step", "samples/s", "tokens/s/GPU", "TFLOP/s/GPU", "peak GiB", "epoch", "of naive's", "idle")
    for column in columns:
        made.add_column(column, justify="right")
    for row in report["rows"]:
        if "failed" in row:
            made.add_row(row["strategy"], "failed")
            continue
        rates = f"{row['samples_per_s']:,.2f}", f"{row['tokens_per_s_per_gpu']:,.0f}", f"{row['tflops_per_gpu']:,.3g}"
        share = "" if row["epoch_of_naive"] is None else f"{row['epoch_of_naive']:.3f}"
        made.add_row(
            row["strategy"],
            f"{len(row['steps']):,}",
            f"{row['step_s']:,.2f}",
            *rates,
            f"{row['peak_bytes'] / 2**30:.1f}",
            clock(row["epoch_s"]),
            share,
            f"{row['idle']:.1%}",
        )
    return made


def told_fit(report: dict[str, Any]) -> str:
    """How `idle` was obtained."""
    if not (fit := report["fit"]):
        return "idle: by FLOPs, since the micro-steps measured are too alike to tell what a document costs"
    linear, quadratic = fit["cost"]
    setting = f"strategy.cost=[{linear:.5g},{quadratic:.5g}], at least {fit['least']:.3g} s a micro-step"
    off = f"off by {fit['error']:.1%} of all time, by {fit['largest_error']:.1%} at most"
    return f"idle: by seconds fitted to all micro-steps, {setting}; {off}"
