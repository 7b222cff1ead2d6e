"""How long ranks wait for one another, by strategy and number of ranks. SIMULATED from every pack's seconds on one GPU.

    python bench/balance.py lengths.npz [--measured bench.json] [--packs 4] [--ranks 8 64 512] [--activations budget]

lengths.npz has `length` and `n_target` of every sample. A pack's seconds are those that `longalign plan` predicts for
Llama-2-7B's shape on an H200 (calibrated there, docs/plan.md), or a*s + b*s^2 summed over its documents, fitted to
what `longalign bench` measured, but never less than the fastest pack measured: launches take that long.

Every rank waits for the slowest at every micro-step (ZeRO-3), and for the exchange of weights and gradients over NVLink
if that takes longer. Left out: the optimizer's step, links between hosts, and an epoch's last step, which is shorter.

A second table is the paper's Figure 5 (hours of naive, packing and sorted batching on 8 A800), with naive batches dealt
to ranks as they come, as the paper's were: with the measured seconds on 1 and 8 ranks, or else with an A100's rates and
everything recomputed.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, where Python would find tokenize.py in place of its own module

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from longalign.config import compose_config
from longalign.data.packing import deal, epoch_packs, pack_tokens, packs_per_step
from longalign.forecast.gpus import GPUS, Gpu
from longalign.forecast.predict import predict
from longalign.model.cost import Cost, PackSeconds, cost_of

LLAMA2_7B = {"layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "kv_heads": 32, "head_dim": 128}
PARAMETERS = 6.74e9
MAX_LENGTH = 65536
STRATEGIES = {
    "packing, next-fit": ["strategy=packing", "strategy.packer=next_fit"],
    "packing, best-fit": ["strategy=packing", "strategy.packer=best_fit"],
    "naive": ["strategy=naive"],
    "sorted": ["strategy=sorted"],
    "balanced": ["strategy=balanced"],
    "the same packs, random steps": ["strategy=packing", "strategy.packer=spread"],
    "the same packs, sorted steps": ["strategy=balanced", "strategy.strata=1"],
    "balanced, 1.5x": [
        "strategy=balanced",
        "strategy.packer=equal_cost",
        f"strategy.pack_tokens={MAX_LENGTH * 3 // 2}",
    ],
}


def measured_seconds(file: Path) -> PackSeconds:
    """Fitted to the passes of a bench.json."""
    rows = [row for row in json.loads(file.read_text())["rows"] if "seconds" in row and row.get("of") == "pass"]
    return PackSeconds.fit([row["documents"] for row in rows], [row["seconds"] for row in rows])


class Epoch(NamedTuple):
    """The packs of the whole steps of one epoch."""

    documents: list[np.ndarray]
    step: np.ndarray
    cost: np.ndarray
    targets: np.ndarray
    fill: float

    def tokens(self) -> int:
        return int(sum(pack.sum() for pack in self.documents))

    def seconds(self, times: np.ndarray, ranks: int, exchange: float, by_cost: bool = True) -> float:
        """Of all steps. Packs are dealt by their cost, or else as they come."""
        first = np.searchsorted(self.step, np.arange(self.step[-1] + 2))
        total = 0.0
        for start, stop in pairwise(first):
            costs = self.cost[start:stop].tolist() if by_cost else [0.0] * (stop - start)
            for micro in deal(costs, ranks):
                total += max(exchange, *(times[start + p] for mine in micro for p in mine))
        return total

    def spread(self, values: np.ndarray) -> float:
        """Standard deviation over mean of the steps' sums."""
        sums = np.bincount(self.step, values)
        return float(sums.std() / sums.mean())


def epoch_of(words: list[str], length: np.ndarray, n_target: np.ndarray, cost: Cost) -> Epoch:
    strategy = compose_config("group", [f"max_length={MAX_LENGTH}", *words]).strategy
    samples, offsets = epoch_packs(length, strategy, MAX_LENGTH, 42, 0, cost=cost)
    starts, size = offsets[:-1], packs_per_step(strategy)
    whole = len(starts) // size * size
    return Epoch(
        np.split(length[samples], offsets[1:-1])[:whole],
        np.arange(whole) // size,
        np.add.reduceat(cost(length[samples]), starts)[:whole],
        np.add.reduceat(n_target[samples].astype(np.int64), starts)[:whole],
        length.sum() / (len(starts) * pack_tokens(strategy, MAX_LENGTH)),
    )


def predicted(documents: list[np.ndarray], gpu: Gpu, activations: str, fixed: float) -> np.ndarray:
    """Seconds of every pack. Exits if one does not fit."""
    passes = [predict(pack, LLAMA2_7B, gpu, activations, fixed) for pack in documents]  # type: ignore[arg-type]
    if None in passes:
        sys.exit(f"a pack of {documents[passes.index(None)].sum():,} tokens does not fit; try --activations selective")
    return np.array([one.seconds for one in passes if one])


def simulate(length: np.ndarray, n_target: np.ndarray, args: argparse.Namespace, measured: PackSeconds | None) -> Table:
    gpu, cost = GPUS["H200"], measured.cost if measured else cost_of(LLAMA2_7B)
    source = f"fitted to {args.measured}" if measured else f"predicted for an H200, activations={args.activations}"
    title = f"SIMULATED: {len(length):,} samples, {args.packs} packs a rank and step, a pack's seconds {source}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("strategy")
    for column in ("ranks", "steps", "fill", "idle", "throughput", "sequences +-", "targets +-"):
        table.add_column(column, justify="right")
    for ranks in args.ranks:
        reference = 0.0
        for name, words in STRATEGIES.items():
            sizes = [f"strategy.batch_size={12 * ranks}", f"strategy.group_size={ranks}"]
            sizes += [f"strategy.packs_per_step={args.packs * ranks}", f"strategy.strata={args.packs}"]
            epoch = epoch_of([*sizes, *words], length, n_target, cost)
            fixed = 18 * PARAMETERS / ranks
            if measured:
                times = np.array([measured.of(pack) for pack in epoch.documents])
            else:
                times = predicted(epoch.documents, gpu, args.activations, fixed)
            seconds = epoch.seconds(times, ranks, PARAMETERS * 8 / gpu.link)
            speed = epoch.tokens() / seconds
            reference = reference or speed
            waiting = f"{1 - times.sum() / ranks / seconds:.1%}", f"{speed / reference:.2f}x"
            spread = [epoch.spread(np.array([len(p) for p in epoch.documents])), epoch.spread(epoch.targets)]
            steps = f"{epoch.step[-1] + 1:,}"
            table.add_row(name, str(ranks), steps, f"{epoch.fill:.4f}", *waiting, *(f"{s:.1%}" for s in spread))
        table.add_section()
    return table


def figure_5(length: np.ndarray, n_target: np.ndarray, ranks: int, measured: PackSeconds | None) -> Table:
    gpu, cost = GPUS["H200" if measured else "A100-80GB"], measured.cost if measured else cost_of(LLAMA2_7B)
    exchange = PARAMETERS * 8 / gpu.link if ranks > 1 else 0.0
    source = "seconds of packs measured on one H200" if measured else "an A100's rates, activations=full"
    title = f"Figure 5, SIMULATED: {ranks} ranks, {source}; the paper's: Llama-2-7B on 8 A800"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in ("strategy", "hours of an epoch", "naive takes", "in the paper"):
        table.add_column(column, justify="right")
    rates: dict[str, float] = {}
    for name, by_cost, paper in (
        ("naive", False, 67.2),
        ("naive", True, None),
        ("sorted", True, 23.3),
        ("packing, next-fit", True, 23.4),
        ("balanced", True, None),
    ):
        words = ["strategy.batch_size=96", f"strategy.packs_per_step={4 * ranks if name == 'balanced' else 8}"]
        epoch = epoch_of([*STRATEGIES[name], *words], length, n_target, cost)
        if measured:
            times = np.array([measured.of(pack) for pack in epoch.documents])
        else:  # optimizer states on the host
            times = predicted(epoch.documents, gpu, "full", 6 * PARAMETERS / ranks)
        shown = "naive, dealt by cost as longalign does" if name == "naive" and by_cost else name
        rates[shown] = epoch.tokens() / epoch.seconds(times, ranks, exchange, by_cost)
        hours = f"{length.sum() / rates[shown] / 3600:.1f}"
        row = f"{rates[shown] / rates['naive']:.2f}x", f"{67.2 / paper:.2f}x" if paper else ""
        table.add_row(shown, hours, *row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", type=Path)
    parser.add_argument("--measured", type=Path, help="bench.json, or {rows: [{documents: [...], seconds: ...}]}")
    parser.add_argument("--packs", type=int, default=4, help="packs a rank and step")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--activations", default="budget")
    args = parser.parse_args()
    if not args.lengths.is_file():
        parser.error(f"{args.lengths}: no such file; it holds `length` and `n_target` of every sample")
    mix = np.load(args.lengths)
    length, n_target = mix["length"].astype(np.int64), mix["n_target"]
    measured, console = measured_seconds(args.measured) if args.measured else None, Console(width=120)
    if measured:
        linear, quadratic = measured.cost
        console.print(f"strategy.cost=[{linear:.6g},{quadratic:.6g}], at least {measured.least:.3f} s a pack")
    console.print(simulate(length, n_target, args, measured))
    console.print("throughput: against packing, next-fit; +-: standard deviation over steps, over their mean")
    for ranks in (1, 8) if measured else (8,):
        console.print(figure_5(length, n_target, ranks, measured))


if __name__ == "__main__":
    main()
