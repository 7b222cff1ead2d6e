"""Checkpoints on their own: the same content on every layout, and what is done about files that cannot be trusted."""

from __future__ import annotations

import json
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from longalign.errors import UserError
from longalign.schema import Config
from longalign.train import checkpoint, saver
from longalign.train.saver import Saver
from tests.conftest import launch_all

WORKER = str(Path(__file__).with_name("saved.py"))


def merged(path: Path) -> dict[str, torch.Tensor]:
    """ "KIND/PARAMETER" -> all its numbers, put together from the files of all ranks by their names alone."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for file in sorted(path.glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            parameter, _, start = key.rpartition("@")
            pieces.setdefault(parameter, []).append((int(start), tensor))
    whole = {}
    for key, found in pieces.items():
        found.sort(key=lambda piece: piece[0])
        ends = [start + len(tensor) for start, tensor in found]
        assert [start for start, _ in found] == [0, *ends[:-1]], f"gaps or overlaps in {key}"
        whole[key] = torch.cat([tensor for _, tensor in found])
    return whole


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def layouts(processes: int) -> dict[str, list[str]]:
    """Name -> words, of every ZeRO stage in both dtypes; DeepSpeed has no bfloat16 with float32 masters without ZeRO."""
    return {
        f"{processes}x-zero{stage}-{dtype}": [
            f"cluster.processes={processes}",
            f"cluster.zero_stage={stage}",
            f"model.dtype={dtype}",
        ]
        for dtype in ("float32", "bfloat16")
        for stage in range(dtype == "bfloat16", 4)
    }


@pytest.mark.slow
def test_every_layout_saves_and_loads_the_same(tmp_path: Path, run_config: Callable[..., Config]) -> None:
    """See saved.py. Checkpoints of two processes are loaded by one and by two, on every stage, and saved again."""
    common = ["strategy=packing", "strategy.packs_per_step=3", "epochs=2", "grad_clip=0.5", "save_every=2"]
    references = tmp_path / "references"
    references.mkdir()
    for processes, folder in ((2, "two"), (1, "one")):
        runs = {name: run_config(tmp_path / folder / name, *common, *words) for name, words in layouts(processes).items()}
        assert launch_all(list(runs.values()), tmp_path, worker=[WORKER, str(references)]) == 0
        for name in runs:
            run = tmp_path / folder / name
            saved = merged(run / "checkpoints" / "step-000002")
            assert_equal(saved, torch.load(run / "told.pt"))
            assert_equal(merged(run / "again" / "checkpoints" / "step-000002"), saved)
            for reference in references.iterdir():
                again = run / f"from-{reference.name}" / "checkpoints" / "step-000002"
                assert_equal(merged(again), merged(reference / "checkpoints" / "step-000002"))
                record = checkpoint.read_record(again)
                assert record["updates"] == 2
                assert len(record["files"]) == processes
        if folder == "two":  # what one process then loads
            for name in ("2x-zero0-float32", "2x-zero2-float32", "2x-zero3-bfloat16"):
                shutil.copytree(tmp_path / "two" / name, references / name)
