"""Steps whose loss or gradient is not finite: not applied, counted, their samples named.

How a step is skipped. DeepSpeed computes the gradient's norm, one number for all ranks, before it updates; ZeRO 1, 2
and 3 drop the gradients and leave weights and optimizer states alone if it is not finite, and engine.py does the same
for ZeRO 0. So all ranks skip or none does. A loss can be infinite with finite gradients (a target of probability 0),
hence `poisoned`: it makes the gradients NaN as well, and the norm alone decides, without another exchange of ranks.

The plan goes on with the next step and so does the learning rate: step N has the same samples and the same
rate whether or not an earlier one was skipped, and the schedule ends where it was said to end.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset

from longalign.data.plan import Pack
from longalign.progress import warn
from longalign.schema import Config
from longalign.train.metrics import Journal

NAMED = 8  # samples named in a message; all stand in bad_steps.jsonl


class TooManyBadSteps(Exception):
    """max_bad_steps in a row were not finite."""


def poisoned(loss: torch.Tensor) -> torch.Tensor:
    """The same loss (times exactly 1), with a gradient of NaN if it is not finite."""
    return loss * (1 + 0 * loss.detach())


class BadSteps:
    def __init__(self, config: Config, dataset: Dataset, journal: Journal, done: int):
        self.config, self.dataset, self.journal = config, dataset, journal
        self.in_a_row, self.last_good = 0, done

    def is_bad(
        self, step: int, loss: float, grad_norm: float, packs: list[Pack], losses: list[tuple[list[int], torch.Tensor]]
    ) -> bool:
        """Whether the step was skipped; its samples are told. Called by every rank with its own micro-steps' losses."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row, self.last_good = 0, step
            return False
        self.in_a_row += 1
        mine = [ids for ids, share in losses if not torch.isfinite(share)]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        of_loss = sorted({sample for of_rank in found for ids in of_rank for sample in ids})
        samples = of_loss or sorted({sample for pack in packs for sample in pack.sample_ids})
        if dist.get_rank() == 0:
            self._tell(step, "loss" if of_loss else "gradient", samples)
        return True

    def _tell(self, step: int, what: str, samples: list[int]) -> None:
        rows = self.dataset.select_columns(["sample_id", "source", "source_line"])[samples]
        named = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        self.journal.write("bad_steps", {"step": step, "what": what, "samples": named})
        few = ", ".join(f"{n['sample_id']} ({n['source']} line {n['source_line']})" for n in named[:NAMED])
        more = f" and {len(named) - NAMED} more in bad_steps.jsonl" if len(named) > NAMED else ""
        whose = "of a pack is not finite" if what == "loss" else "is not finite, all losses are"
        warn(f"step {step} is skipped: the {what} {whose}; its samples: {few}{more}")

    @property
    def too_many(self) -> bool:
        return self.in_a_row >= self.config.max_bad_steps

    def error(self, saved: int) -> TooManyBadSteps:
        """saved: the step of the newest checkpoint, 0 for none."""
        kept = f"the weights of step {saved} are saved" if saved else "no step went well, nothing is saved"
        return TooManyBadSteps(
            f"{self.in_a_row} steps in a row had a loss or gradient that is not finite (max_bad_steps="
            f"{self.config.max_bad_steps}); {kept}. Their samples stand in {Path(self.config.output_dir or '')}/"
            "bad_steps.jsonl. A lower lr, a smaller grad_clip or better data may help"
        )
