"""The loss on held-out samples while a run trains (eval_tasks=[heldout]).

tokenize leaves eval_fraction of the samples out of the training table, in DATA_DIR/eval. They are packed best-fit once;
an evaluation runs every pack forward on some rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset

from longalign.data.packing import best_fit
from longalign.data.plan import Pack, read_columns, read_data
from longalign.errors import UserError
from longalign.model.cost import Cost, cost_of
from longalign.model.loss import StepTotals
from longalign.schema import Config
from longalign.train.breakdown import Breakdown
from longalign.train.micro import MicroStep, micro_steps


def heldout_packs(config: Config, limit: int | None = None, key: str = "data_dir") -> tuple[Dataset, list[Pack]]:
    """The held-out rows of data_dir and packs of them, or of the first `limit` with a target.

    Raises UserError, which calls the folder by `key`, if there are none that can be used.
    """
    folder = Path(config.data_dir) / "eval"
    if not (folder / "manifest.json").is_file():
        wanted, instead = f"eval_every={config.eval_every} but ", ", or set eval_every=null or other eval_tasks"
        raise UserError(
            f"{wanted if config.eval_every else ''}{key}={config.data_dir} has no held-out samples; run "
            f"`longalign tokenize` with eval_fraction=0.01{instead if config.eval_every else ''}"
        )
    dataset, shape = read_data(str(folder))[0], read_data(config.data_dir)[1]["model_shape"]
    columns = read_columns(dataset)
    usable = np.flatnonzero(columns.n_target > 0)[:limit]
    if not len(usable):
        raise UserError(f"{folder} has no sample with a target; tokenize with a larger eval_fraction")
    if (longest := columns.length[usable].max()) > config.max_length:
        raise UserError(
            f"{folder} has a sample of {longest} tokens, max_length={config.max_length}; "
            "raise max_length or tokenize again with it"
        )
    length, n_target, cost = columns.length.tolist(), columns.n_target.tolist(), cost_of(shape) if shape else Cost(1, 0)
    samples, offsets = best_fit(columns.length, config.max_length, usable, window=len(usable))
    packs = []
    for ids in np.split(samples, offsets[1:-1]):
        tokens, targets = sum(length[i] for i in ids), sum(n_target[i] for i in ids)
        packs.append(Pack(ids.tolist(), tokens, len(ids), targets, float(cost(columns.length[ids]).sum())))
    return dataset, packs


@torch.no_grad()
def weighted_sums(model: Any, steps: Iterable[MicroStep]) -> list[float]:
    """A sum over all steps and ranks of each column of weights. model: a WeightedLoss, or an engine around one."""
    sums = torch.stack([model(batch, weights)[1].double() for batch, weights, _ in steps]).sum(0)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


class HeldOut:
    """The held-out packs of a run."""

    def __init__(self, config: Config):
        self.config = config
        self.dataset, self.packs = heldout_packs(config)
        self.breakdown = Breakdown(self.dataset)

    def measure(self, engine: Any) -> dict[str, Any]:
        """The columns of a row of eval.jsonl; called by every rank, with the model in eval mode."""
        counts, totals = self.breakdown.counts(self.packs), StepTotals.of(self.packs)
        steps = micro_steps(self.dataset, self.packs, self.config, engine.device, self.breakdown)
        _, loss_sequence, loss_token, *by_group = weighted_sums(engine, steps)
        return {
            "loss_sequence": loss_sequence,
            "loss_token": loss_token,
            **self.breakdown.rows(by_group, counts),
            "sequences": totals.sequences,
            "targets": totals.targets,
        }
