"""What each command does with its checked Config. Returns the exit code; raises UserError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from longalign.cluster.workers import set_allocator
from longalign.errors import UserError
from longalign.progress import console, warn
from longalign.schema import Config


def prepare(config: Config, dry_run: bool) -> int:
    from longalign.data import prepare as module

    for line in module.describe(config) if dry_run else module.prepare(config):
        console.print(line, soft_wrap=True)
    return 0


def tokenize(config: Config, dry_run: bool) -> int:
    from longalign.data.parallel import start_server

    if not dry_run:
        start_server()  # loads what workers need while this process does the same
    from longalign.data import tokenize as module
    from longalign.model.load import load_tokenizer

    if dry_run:
        files = module.sources(config)
        load_tokenizer(config)
        for is_long, group in files.items():
            for file in group:
                console.print(f"{'long' if is_long else 'short'}: {file} ({file.stat().st_size:,} bytes)")
        processes = module.count_processes(config, [file for group in files.values() for file in group])
        console.print(f"{processes} processes -> {config.output_dir}")
        return 0
    manifest = module.tokenize(config)
    console.print(ledger_table(manifest))
    wanted = config.datanum.n_long
    if config.long_file and wanted is not None and manifest["long_samples"] < wanted:
        have = f"long_file has {manifest['long_samples']:,} usable ones"
        warn(f"datanum={config.datanum.name} asks for {wanted:,} long samples, {have}")
    dropped = sum(n for entry in manifest["ledger"].values() for n in entry["dropped"].values())
    if dropped:
        console.print(f"{dropped:,} samples dropped, named in {config.output_dir}/dropped.jsonl")
    return 0


def ledger_table(manifest: dict[str, Any]) -> Table:
    """What went in and what came out, a column per source."""
    ledger = manifest["ledger"]
    title = f"{manifest['samples']:,} samples, {manifest['tokens']:,} tokens, {manifest['targets']:,} targets"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("")
    for source in ledger:
        table.add_column(source, justify="right")
    lines = {
        "samples in": "samples_in",
        "rows kept": "rows_kept",
        "rows not chosen by datanum": "rows_not_chosen",
        "rows held out": "rows_held_out",
        "rows cut to max_length": "truncated",
        "tokens in": "tokens_in",
        "tokens cut": "tokens_cut",
        "tokens held out or not chosen": "tokens_elsewhere",
        "tokens kept": "tokens_kept",
        "targets in": "targets_in",
        "targets kept": "targets_kept",
    }
    for label, key in lines.items():
        if ledger and all(key in entry for entry in ledger.values()):  # an earlier version did not count all of them
            table.add_row(label, *(f"{entry[key]:,}" for entry in ledger.values()))
    for kind in ("changes", "dropped"):
        for reason in sorted({reason for entry in ledger.values() for reason in entry[kind]}):
            label = f"dropped: {reason}" if kind == "dropped" else reason
            table.add_row(label, *(f"{entry[kind].get(reason, 0):,}" for entry in ledger.values()))
    return table


def group(config: Config, dry_run: bool) -> int:
    import tempfile

    from longalign.data import plan

    with tempfile.TemporaryDirectory() as scratch:
        manifest = plan.group(config, Path(scratch) / "plan" if dry_run else Path(config.output_dir or ""))
    console.print(plan_table(manifest, config.strategy.name))
    console.print(sources_table(manifest["epochs"][0]["sources"]))
    return 0


def plan_table(manifest: dict[str, Any], strategy: str) -> Table:
    """The epochs of a plan. balance: how busy so many ranks are that wait for the slowest at every micro-step."""
    title = f"{strategy}: {manifest['steps']:,} steps, {manifest['packs']:,} packs"
    ranks = list(manifest["epochs"][0]["balance"])
    balances = [f"balance, {n} ranks" for n in ranks]
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in ("epoch", "steps", "packs", "fill", "seqs/pack", "tokens/step", "cost max/mean", *balances):
        table.add_column(column, justify="right")
    for number, e in enumerate(manifest["epochs"]):
        table.add_row(
            str(number),
            f"{e['steps']:,}",
            f"{e['packs']:,}",
            f"{e['fill_ratio']:.4f}",
            str(e["sequences_per_pack"]),
            f"{e['tokens_per_step']:,}",
            str(e["cost_max_over_mean"]),
            *(f"{e['balance'][n]:.1%}" for n in ranks),
        )
    return table


def sources_table(sources: dict[str, Any]) -> Table:
    """What the first epoch holds. weight in the loss: the mean over its steps."""
    table = Table(box=box.SIMPLE)
    table.add_column("epoch 0")
    for column in ("samples", "tokens", "targets", "weight in the loss"):
        table.add_column(column, justify="right")
    for source, held in sources.items():
        counts = [f"{held[key]:,}" for key in ("samples", "tokens", "targets")]
        table.add_row(source, *counts, f"{held['loss_weight']:.1%}")
    return table


def train(config: Config, dry_run: bool) -> int:
    from longalign import launch

    if dry_run:
        launch.dry_run(config)
        return 0
    return launch.train(config)


def watch(config: Config, dry_run: bool) -> int:
    from longalign.watch import run

    return run.watch(config)


def stats(config: Config, dry_run: bool) -> int:
    from longalign import compare
    from longalign import stats as module
    from longalign.data.plan import read_data

    data = read_data(config.data_dir)[1]
    if dry_run:
        names = ", ".join(compare.names())
        console.print(f"{config.data_dir}, {data['samples']:,} samples; strategies {names} -> {config.output_dir}")
        return 0
    report = module.stats(config)
    console.print(ledger_table(data))
    console.print(strategies_table(report))
    for name, error in report["strategies_refused"].items():
        warn(f"strategy={name} left out: {error}")
    for message in report["warnings"]:
        warn(message)
    console.print(f"written to {config.output_dir}: stats.json, lengths.png")
    return 0


def strategies_table(report: dict[str, Any]) -> Table:
    """What each strategy makes of the data: packs of max_length tokens, dealt to ranks."""
    title = f"packs of {report['pack_length']:,} tokens, balance on {report['ranks']} ranks"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("strategy")
    for column in (
        "steps",
        "packs",
        "fill",
        "seqs/pack",
        "tokens/step",
        "balance",
        "worst step",
        "epochs",
        "weight in the loss",
    ):
        table.add_column(column, justify="right")
    for name, s in report["strategies"].items():
        counts = [f"{s['steps']:,}", f"{s['packs']:,}", f"{s['fill_ratio']:.4f}", str(s["sequences_per_pack"])]
        balance = [f"{s['balance']:.1%}", f"{s['balance_worst']:.1%}"]
        weights = ", ".join(f"{source} {weight:.0%}" for source, weight in s["loss_weight"].items())
        table.add_row(name, *counts, f"{s['tokens_per_step']:,}", *balance, str(s["epochs"]), weights)
    return table


def eval(config: Config, dry_run: bool) -> int:
    if config.compare:
        from longalign.evaluate import compare

        return compare.run(config, dry_run)
    _runs_alone(config, "eval")
    from longalign.evaluate import run

    return run.run(config, dry_run)


def _runs_alone(config: Config, command: str) -> None:
    if config.cluster.sequence_parallel > 1:
        raise UserError(
            f"cluster.sequence_parallel={config.cluster.sequence_parallel}: {command} runs in one process, which has "
            "none to share with; set cluster.sequence_parallel=1"
        )


def chat(config: Config, dry_run: bool) -> int:
    _runs_alone(config, "chat")
    from longalign.chat import run

    return run.chat(config, dry_run)


def verify(config: Config, dry_run: bool) -> int:
    from longalign.verify import run

    return run.verify(config, dry_run)


def plan(config: Config, dry_run: bool) -> int:
    set_allocator(config)
    from longalign.forecast import run

    return run.plan(config, dry_run)


def bench(config: Config, dry_run: bool) -> int:
    if config.bench.strategies:
        from longalign.bench import strategies

        return strategies.bench(config, dry_run)
    _runs_alone(config, "bench")
    set_allocator(config)
    from longalign.bench import run

    return run.bench(config, dry_run)


def convert(config: Config, dry_run: bool) -> int:
    from longalign.model import chatglm, gguf, original
    from longalign.model.load import load_config, resolve_dtype

    path, output = config.model.path, Path(config.output_dir or "")
    console.print(f"{path} -> {output}")
    if path.endswith(gguf.SUFFIX):
        gguf.read_fields(Path(path))
        if not dry_run:
            gguf.to_folder(Path(path), output, resolve_dtype(config, "cpu"), config.overwrite)
        return 0
    if config.reverse:
        if not dry_run:
            chatglm.to_original(Path(path), output, config.overwrite)
        return 0
    source = original.find(path, weights=not dry_run)
    if source is None:
        raise UserError(
            f"model.path={path} is neither a .gguf file nor a ChatGLM model in its original layout; "
            "other models need no conversion"
        )
    if not dry_run:
        chatglm.to_glm(source, output, config.overwrite, load_config(config))
    return 0
