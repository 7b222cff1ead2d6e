"""Ranks that run a pack together compute what one does alone.

As in test_gradients.py the truth is plain transformers in float64, every sample alone, and what is held against it comes
from the worker's own train_step. The odd data has packs of every length up to 64 tokens (padding), documents across
the ranks' borders, and ranks without a target; four ranks outnumber the model's two key-value heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from longalign.config import compose_config
from longalign.data.batch import Batch, share
from longalign.errors import UserError
from longalign.launch import prepare_run, resolve
from longalign.schema import Config
from tests.conftest import launch_all
from tests.model.test_attention import pack
from tests.train.test_gradients import STRATEGIES, check, covering
from tests.train.test_gradients import config_of as config_of  # a fixture

WORKER = [str(Path(__file__).with_name("shared_packs.py"))]


class Layout(NamedTuple):
    ranks: tuple[int, int]  # processes, of which so many run a pack together
    packs_per_micro_step: int
    zero_stage: int
    strategy: str
    activations: str
    slice_tokens: int | None
    dtype: str = "float32"

    def __str__(self) -> str:
        (processes, together), packs, stage, strategy, activations, limit, dtype = self
        return f"{processes}by{together}x{packs}-zero{stage}-{strategy}-{activations}-{limit}-{dtype}"

    def words(self) -> list[str]:
        return [
            *STRATEGIES[self.strategy],
            f"cluster.processes={self.ranks[0]}",
            f"cluster.sequence_parallel={self.ranks[1]}",
            f"cluster.packs_per_micro_step={self.packs_per_micro_step}",
            f"cluster.zero_stage={self.zero_stage}",
            f"activations={self.activations}",
            f"slice_tokens={self.slice_tokens or 'null'}",
            f"model.dtype={self.dtype}",
        ]


RANKS = ((2, 2), (4, 2), (4, 4))
AVERAGES = ("packing", "packing+weighting", "token")  # strategies, one for each loss average
POLICIES = ("full", "selective", "offload")
GRID = [Layout(*v) for v in itertools.product(RANKS, (1, 2), (0, 1, 2, 3), AVERAGES, POLICIES, (None, 12))]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_some_layouts(processes: int, config_of: Callable[..., Config], tmp_path: Path) -> None:
    check([layout for layout in covering(GRID) if layout.ranks[0] == processes], config_of, tmp_path, WORKER)
