"""Checkpoints have the same content on every layout, and give back every bit of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from longalign.files import read_json
from longalign.schema import Config
from longalign.train import checkpoint
from tests.conftest import launch_all

WORKER = str(Path(__file__).with_name("saved.py"))
KINDS = ("master", "exp_avg", "exp_avg_sq")


def merged(path: Path) -> dict[str, torch.Tensor]:
    """ "KIND/PARAMETER" -> all its numbers, put together from the files of all ranks by their indexes alone."""
    found: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for index in sorted(path.glob("rank-*.json")):
        floats = torch.from_numpy(np.fromfile(index.with_suffix(".bin"), dtype=np.float32))
        for parameter, start, stop, at in read_json(index)["pieces"]:
            for kind, values in zip(KINDS, floats[at : at + 3 * (stop - start)].split(stop - start), strict=True):
                found.setdefault(f"{kind}/{parameter}", []).append((start, values))
    whole = {}
    for key, pieces in found.items():
        pieces.sort(key=lambda piece: piece[0])
        ends = [start + len(values) for start, values in pieces]
        assert [start for start, _ in pieces] == [0, *ends[:-1]], f"gaps or overlaps in {key}"
        whole[key] = torch.cat([values for _, values in pieces])
    return whole


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


FLOAT, BRAIN = "float32", "bfloat16"
GRID = [(stage, dtype) for dtype in (FLOAT, BRAIN) for stage in range(4) if (stage, dtype) != (0, BRAIN)]
# each way in which DeepSpeed keeps states: none, two optimizers of its own below stage 3, stage 3 with and without copies
SOME = {2: [(0, FLOAT), (1, BRAIN), (2, FLOAT), (3, BRAIN)], 1: [(0, FLOAT), (2, BRAIN), (3, FLOAT)]}


def words(processes: int, stage: int, dtype: str) -> list[str]:
    return [f"cluster.processes={processes}", f"cluster.zero_stage={stage}", f"model.dtype={dtype}"]


def check_layouts(
    chosen: dict[int, list[tuple[int, str]]], tmp_path: Path, run_config: Callable[..., Config], *more: str
) -> None:
    """See saved.py. Every layout saves and resumes; checkpoints of two processes are loaded by one, and saved again."""
    common = ["strategy=packing", "strategy.packs_per_step=3", "epochs=2", "grad_clip=0.5", "save_every=2", *more]
    references = tmp_path / "references"
    references.mkdir()
    for processes in (2, 1):
        runs = {
            name: run_config(tmp_path / name, *common, *words(processes, stage, dtype))
            for stage, dtype in chosen[processes]
            for name in [f"{processes}-zero{stage}-{dtype}"]
        }
        assert launch_all(list(runs.values()), tmp_path, worker=[WORKER, str(references)]) == 0
        for name in runs:
            saved = merged(tmp_path / name / "checkpoints" / "step-000002")
            assert_equal(saved, torch.load(tmp_path / name / "told.pt"))
            assert_equal(merged(tmp_path / name / "again" / "checkpoints" / "step-000002"), saved)
            for reference in references.iterdir():
                again = tmp_path / name / f"from-{reference.name}" / "checkpoints" / "step-000002"
                assert_equal(merged(again), merged(reference / "checkpoints" / "step-000002"))
                record = checkpoint.read_record(again)
                assert record["updates"] == 2
                assert len(list(again.glob("*.bin"))) == processes
        if processes == 2:  # what one process then loads
            for name in runs:
                shutil.copytree(tmp_path / name / "checkpoints", references / name / "checkpoints")


@pytest.mark.slow
def test_layouts_save_and_load_the_same(tmp_path: Path, run_config: Callable[..., Config]) -> None:
    check_layouts(SOME, tmp_path, run_config)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("offload", [False, True])
def test_all_layouts_save_and_load_the_same(offload: bool, tmp_path: Path, run_config: Callable[..., Config]) -> None:
    """With offload, DeepSpeed compiles its Adam for the CPU, which takes minutes the first time."""
    grid = [(stage, dtype) for stage, dtype in GRID if stage or not offload]
    more = ["cluster.offload_optimizer=true"] if offload else []
    check_layouts({2: grid, 1: grid}, tmp_path, run_config, *more)
