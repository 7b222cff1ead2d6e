"""What tokenised data holds and lost, how long its samples are, and what each strategy makes of it.

manifest.json (the ledger)   -> what went in, was cut, dropped, kept; a warning where a source loses targets
column `length`              -> lengths.png (paper Figure 3, left)
every strategy of conf/      -> its plan: the grouped one if it is fresh, else one made for this -> fill, balance
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from longalign.cluster.hostfile import count_nodes
from longalign.compare import of_each
from longalign.data.packing import idle_share, pack_tokens
from longalign.data.plan import Columns, group, identity, is_fresh, read_columns, read_data
from longalign.files import fresh_folder, read_json, write_json
from longalign.schema import Config

OURS = ("stats.json", "lengths.png")
TOLERATED_LOSS = 0.01  # share of a source's targets
BINS = 64


def stats(config: Config) -> dict[str, Any]:
    """Write stats.json and lengths.png into output_dir; returns what stats.json holds. Raises UserError."""
    dataset, data = read_data(config.data_dir)
    columns, ranks = read_columns(dataset), ranks_of(config)
    groups = max(1, ranks // config.cluster.sequence_parallel)  # that packs are dealt to
    with fresh_folder(Path(config.output_dir or ""), OURS, overwrite=True) as folder:
        planned, refused = of_each(config, "stats", lambda mine: strategy_stats(mine, data, groups))
        report = {
            "data_dir": config.data_dir,
            "fingerprint": data["fingerprint"],
            **{key: data[key] for key in ("samples", "tokens", "targets", "max_length", "truncate", "ledger")},
            "targets_lost": {source: targets_lost(entry) for source, entry in data["ledger"].items()},
            "warnings": loss_warnings(data),
            "lengths": length_stats(columns),
            "pack_length": pack_tokens(config.strategy, config.max_length),
            "ranks": ranks,
            "strategies": planned,
            "strategies_refused": refused,
        }
        write_json(folder / "stats.json", report)
        draw_lengths(columns, folder / "lengths.png", f"{len(columns.length):,} samples")
    return report


# -- what was lost --------------------------------------------------------------------------------------------


def targets_lost(entry: dict[str, Any]) -> dict[str, float]:
    """Targets that a source lost to cutting and dropping, and their share of all that it had.

    Rows that are held out, or that datanum did not choose, are no loss; what they lost to cutting is.
    """
    lost = entry["targets_in"] - entry["targets_kept"] - entry["targets_elsewhere"]
    return {"targets": lost, "share": round(lost / entry["targets_in"], 4) if lost else 0.0}


def loss_warnings(data: dict[str, Any]) -> list[str]:
    """One message for each source that lost more than 1% of its targets, with the setting to change."""
    messages = []
    for source, entry in data["ledger"].items():
        lost = targets_lost(entry)
        if lost["share"] <= TOLERATED_LOSS:
            continue
        causes = [f"{entry['truncated']:,} rows cut to max_length={data['max_length']}"] if entry["truncated"] else []
        causes += [f"{n:,} dropped ({reason})" for reason, n in entry["dropped"].items()]
        too_long = entry["truncated"] or any("too long" in reason for reason in entry["dropped"])
        other = "" if data["truncate"] == "middle" else " or truncate=middle, which keeps answers,"
        advice = f"a larger max_length{other} keeps more" if too_long else "dropped.jsonl names them, file and line"
        messages.append(
            f"{source} lost {lost['share']:.1%} of its targets ({lost['targets']:,}): {', '.join(causes)}; {advice}"
        )
    return messages


# -- lengths --------------------------------------------------------------------------------------------------


def length_stats(columns: Columns) -> dict[str, dict[str, Any]]:
    """Per source and for all: samples, tokens, targets, and quantiles of the length in tokens."""

    def of(mine: Columns) -> dict[str, Any]:
        quantiles = np.quantile(mine.length, (0.05, 0.5, 0.95)).round().astype(int).tolist()
        return {
            "samples": len(mine.length),
            "tokens": int(mine.length.sum(dtype=np.int64)),
            "targets": int(mine.n_target.sum(dtype=np.int64)),
            "shortest": int(mine.length.min()),
            **dict(zip(("p5", "p50", "p95"), quantiles, strict=True)),
            "longest": int(mine.length.max()),
        }

    by_source = {name: of(columns.where(columns.source == n)) for n, name in enumerate(columns.sources)}
    return {"all": of(columns), "by_source": by_source}


def draw_lengths(columns: Columns, path: Path, title: str) -> None:
    """Samples over their length, one line a source, on a log scale: the tail is a hundredth of the peak."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    edges = np.linspace(0, columns.length.max(), BINS + 1).tolist()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.hist(columns.length, edges, color="lightgray", label="all")
    for number, name in enumerate(columns.sources):
        axes.hist(columns.length[columns.source == number], edges, histtype="step", label=name)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"samples per {edges[1]:,.0f} tokens")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# -- strategies -----------------------------------------------------------------------------------------------


def ranks_of(config: Config) -> int:
    """Processes of all nodes; for processes=auto the GPUs of this machine, or the paper's 8 where there is none."""
    import torch

    cluster = count_nodes(config.cluster)
    here = (torch.cuda.device_count() or 8) if cluster.processes == "auto" else cluster.processes
    return here * int(cluster.nodes)


def strategy_stats(config: Config, data: dict[str, Any], groups: int) -> dict[str, Any]:
    """Figures of one strategy's plan, over all its epochs.

    balance: the mean over groups of a step's cost, over the time it takes when all groups wait for the slowest at every
    micro-step (see packing.deal): 1 = nobody waits. The mean over steps, and the worst step. loss_weight: that of
    each source (mix.loss_weights), in the first epoch.
    """
    folder = Path(config.data_dir) / "plans" / config.strategy.name
    with tempfile.TemporaryDirectory() as scratch:
        fresh = is_fresh(folder, identity(config, data))
        if not fresh:
            group(config, folder := Path(scratch) / "plan")
        columns = pq.read_table(folder / "plan.parquet", columns=["step", "tokens", "n_sequences", "cost"])
        first = read_json(folder / "manifest.json")["epochs"][0]["sources"]
    step, tokens, sequences, cost = (column.to_numpy() for column in columns)
    n_packs, n_steps, per = len(step), int(step[-1]), config.cluster.packs_per_micro_step
    of_steps = np.split(cost, np.flatnonzero(np.diff(step)) + 1)
    balance = [1 - idle_share(costs.tolist(), groups, per) for costs in of_steps]
    return {
        "plan": str(folder) if fresh else "made for these figures",
        "epochs": config.epochs,
        "steps": n_steps,
        "packs": n_packs,
        "fill_ratio": round(float(tokens.sum() / n_packs / pack_tokens(config.strategy, config.max_length)), 4),
        "sequences_per_pack": round(float(sequences.mean()), 2),
        "tokens_per_step": round(float(tokens.sum() / n_steps)),
        "balance": round(float(np.mean(balance)), 4),
        "balance_worst": round(float(np.min(balance)), 4),
        "loss_weight": {source: held["loss_weight"] for source, held in first.items()},
    }
