"""What an epoch of a strategy is, and what its measured steps come to.

How long ranks wait cannot be read off their clocks: under ZeRO-3 all of them take equally long for a micro-step,
because they wait inside its collectives. So a micro-step's seconds are put down to the documents of rank 0, which has
the costliest packs of every micro-step (packing.deal) and waits for nobody; a*s + b*s^2 is fitted to them over all
strategies measured; and the other ranks' documents are given the seconds which that tells.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longalign.config import load_frozen
from longalign.data.packing import deal
from longalign.data.plan import Pack, Plan, lengths_of, read_data, steps_to_train
from longalign.model.cost import Cost, PackSeconds, cost_of, shape_of
from longalign.model.load import load_config


class Work(NamedTuple):
    """The steps of a strategy's epoch that are run."""

    steps: list[list[Pack]]
    micro_steps: list[list[np.ndarray]]  # of all steps: lengths of the documents that each group of ranks runs
    samples: int
    tokens: int
    flop: float  # of the model: causal attention within documents, nothing computed twice
    epoch_tokens: int  # of all steps of the epoch
    cost: Cost  # FLOPs

    @property
    def packs(self) -> int:
        return sum(map(len, self.steps))

    @property
    def predicted_idle(self) -> float:
        """The share of time that ranks wait, if time is FLOPs."""
        flop = seconds_of(self.micro_steps, self.flop_of)
        return idle_share(flop, flop.max(axis=1))

    def flop_of(self, documents: np.ndarray) -> float:
        return float(self.cost(documents).sum())


def work_of(folder: Path) -> Work:
    """folder: with a frozen config.yaml and its plan. Raises UserError."""
    config = load_frozen(folder / "config.yaml")
    dataset, data = read_data(config.data_dir)
    plan, lengths, cost = Plan(folder / "plan", data), lengths_of(dataset), cost_of(shape_of(load_config(config)))
    groups, per = config.cluster.ranks // config.cluster.sequence_parallel, config.cluster.packs_per_micro_step
    steps = [plan.step(step) for step in range(1, steps_to_train(plan.n_steps, config) + 1)]
    samples = lambda packs: [sample for pack in packs for sample in pack.sample_ids]
    micro_steps = [
        [lengths[samples([packs[p] for p in mine])] for mine in of_groups]
        for packs in steps
        for of_groups in deal([pack.cost for pack in packs], groups, per)
    ]
    run = lengths[[sample for packs in steps for sample in samples(packs)]]
    total = plan.manifest["epochs"][0]["tokens"]
    return Work(steps, micro_steps, len(run), int(run.sum()), float(cost(run).sum()), total, cost)


def seconds_of(micro_steps: list[list[np.ndarray]], seconds: Callable[[np.ndarray], float]) -> np.ndarray:
    """seconds(documents) of every group at every micro-step, float [M, G]; 0 for a group that has no pack left."""
    return np.array([[seconds(mine) if len(mine) else 0.0 for mine in of_groups] for of_groups in micro_steps])


def idle_share(seconds: np.ndarray, lasted: np.ndarray) -> float:
    """The share of time that groups of ranks wait for the slowest at every micro-step.

    seconds: what each group has to do, [M, G]; lasted: the seconds of the micro-steps, [M], by which they are weighted.
    """
    return float(1 - (lasted * seconds.mean(axis=1) / seconds.max(axis=1)).sum() / lasted.sum())


def summarise(report: dict[str, Any], works: dict[str, Work]) -> None:
    """Put into the report's measured rows what their steps come to. Fields that depend on other rows change with them.

    report: `ranks` and `rows`; a row's steps have seconds and micro_seconds. works: of each row's strategy.
    """
    rows = [row for row in report["rows"] if "failed" not in row]
    lasted = [np.array([s for step in row["steps"] for s in step["micro_seconds"]]) for row in rows]
    documents = [of_groups[0] for row in rows for of_groups in works[row["strategy"]].micro_steps]
    try:
        fitted = PackSeconds.fit(documents, np.concatenate([*lasted, []]).tolist())
    except ValueError:
        fitted = None
    errors = []
    for row, took in zip(rows, lasted, strict=True):
        work, steps = works[row["strategy"]], row["steps"]
        told = seconds_of(work.micro_steps, fitted.of if fitted else work.flop_of)
        errors.append(np.abs(told[:, 0] - took))
        seconds, samples, tokens = (sum(step[name] for step in steps) for name in ("seconds", "samples", "tokens"))
        row |= {
            "seconds": seconds,
            "samples": samples,
            "tokens": tokens,
            "step_s": seconds / len(steps),
            "samples_per_s": samples / seconds,
            "tokens_per_s_per_gpu": tokens / seconds / report["ranks"],
            "tflops_per_gpu": work.flop / seconds / report["ranks"] / 1e12,
            "peak_bytes": max(step["peak_bytes"] for step in steps),
            "epoch_s": seconds * work.epoch_tokens / tokens,
            "idle": idle_share(told, took),
        }
    naive = next((row["epoch_s"] for row in rows if row["settings"]["name"] == "naive"), None)
    for row in rows:
        row["epoch_of_naive"] = row["epoch_s"] / naive if naive else None
    report["fit"] = None
    if fitted:
        off, took = np.concatenate(errors), np.concatenate(lasted)
        report["fit"] = {
            "cost": list(fitted.cost),
            "least": fitted.least,
            "error": float(off.sum() / took.sum()),
            "largest_error": float((off / took).max()),
        }
