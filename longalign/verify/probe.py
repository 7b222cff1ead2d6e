"""The real packs that the model's checks run on, small enough to take minutes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, disable_progress_bars, load_from_disk
from datasets.table import InMemoryTable

from longalign.data.plan import Pack, Plan
from longalign.data.template import IGNORE
from longalign.files import read_json, write_json


@dataclass
class Probe:
    """Packs of the plan's first step; `rows` holds each document's (input_ids, labels), which packs number from 0."""

    rows: list[tuple[np.ndarray, np.ndarray]]
    packs: list[Pack]

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.rows)

    def dataset(self) -> Dataset:
        columns = {"input_ids": [ids for ids, _ in self.rows], "labels": [labels for _, labels in self.rows]}
        # a fingerprint given, lest datasets pickles the table for one, which pandas and pyarrow can make impossible
        return Dataset(InMemoryTable(pa.table(columns)), fingerprint="probe")

    def save(self, folder: Path) -> None:
        disable_progress_bars()
        self.dataset().save_to_disk(str(folder / "rows"))
        write_json(folder / "packs.json", self.packs)


def load(folder: Path) -> tuple[Dataset, list[Pack]]:
    return load_from_disk(str(folder / "rows")), [Pack(*pack) for pack in read_json(folder / "packs.json")]  # type: ignore[return-value]


def choose(plan: Plan, dataset: Dataset, n_packs: int, budget: int) -> Probe:
    """The first step's first packs. Their documents keep their ends, which hold the answers, if `budget` tokens are
    fewer than they have: all are cut to one length, shorter ones stay whole."""
    packs = plan.step(1)[:n_packs]
    ids = [sample for pack in packs for sample in pack.sample_ids]
    found = dataset.select_columns(["input_ids", "labels"]).with_format("numpy")[ids]
    longest = _longest(np.array([len(row) for row in found["input_ids"]]), budget)
    rows = []
    for tokens, labels in zip(found["input_ids"], found["labels"], strict=True):
        labels = labels[-longest:].copy()
        labels[0] = IGNORE
        rows.append((tokens[-longest:], labels))
    made, start = [], 0
    for pack in packs:
        mine = list(range(start, start := start + len(pack.sample_ids)))
        n_target = [int(np.sum(rows[place][1] != IGNORE)) for place in mine]
        tokens = sum(len(rows[place][0]) for place in mine)
        made.append(Pack(mine, tokens, sum(n > 0 for n in n_target), sum(n_target), float(tokens)))
    return Probe(rows, made)


def _longest(lengths: np.ndarray, budget: int) -> int:
    """The greatest L for which documents cut to L tokens have at most `budget` in all, but 2 at least."""
    low, high = 2, int(lengths.max())
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(lengths, middle).sum() <= budget else (low, middle - 1)
    return low
