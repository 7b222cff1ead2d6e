"""What a full disk, or a host's late view of a shared one, does to rows, heartbeats and checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longalign.errors import UserError
from longalign.schema import Config
from longalign.train import checkpoint, heartbeat
from longalign.train.metrics import Journal
from longalign.train.saver import Saver

FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is full")
def test_a_row_that_cannot_be_written_is_told(tmp_path: Path, run_config: Callable[..., Config]) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(FULL)
    journal = Journal(run_config(tmp_path), done=0, writes=True)
    with pytest.raises(UserError, match=r"the disk \(or a quota\) is full: writing .*metrics.jsonl"):
        journal.write("metrics", {"step": 1})


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is full")
def test_a_heartbeat_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    with heartbeat.Heartbeat(tmp_path, 0, None) as beat, open(FULL, "w") as full:
        before, os_file = heartbeat.read(tmp_path, 1), beat.file
        beat.file = full.fileno()
        beat.beat("forward", step=1)
        beat.file = os_file
        assert heartbeat.read(tmp_path, 1) == before


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is full")
def test_stacks_that_cannot_be_written_hide_no_error(tmp_path: Path) -> None:
    (tmp_path / "rank-0.stacks").symlink_to(FULL)
    with pytest.raises(RuntimeError, match="the cause"), heartbeat.Heartbeat(tmp_path, 0, None):
        raise RuntimeError("the cause")


def test_long_errors_in_any_script_are_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), heartbeat.Heartbeat(tmp_path, 0, None):
        raise RuntimeError("数\n🏖" * 150 + "\udcff")
    assert heartbeat.read(tmp_path, 1)[0]["ended"].startswith("failed: 数\n🏖数")
    stacks = (tmp_path / "rank-0.stacks").read_text()
    assert "in test_long_errors_in_any_script_are_told" in stacks, "where a rank failed"
    assert "🏖" in stacks.splitlines()[-1]
    assert heartbeat.hung(tmp_path, 1) is None
    (tmp_path / "rank-0.heartbeat").unlink()
    (tmp_path / "rank-0.stacks").write_text("Timeout (0:00:02)!\nThread 0x1 (most recent call first):\n  File x\n")
    assert "File x" in str(heartbeat.hung(tmp_path, 1)), "stacks of a rank whose heartbeat cannot be read"


def saver_of(rank: int, folder: Path, make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> Saver:
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    return Saver(make(folder), engine=None, plan={})


ABOUT: dict[str, Any] = {"step": 4, "updates": 4, "layout": checkpoint.LAYOUT, "plan": {}}


def test_a_rank_whose_folder_is_gone_leaves_the_word_to_rank_0(
    tmp_path: Path, run_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 met the full disk first and made room."""
    saver = saver_of(1, tmp_path, run_config, monkeypatch)
    partial = tmp_path / "checkpoints" / ".step-000004.partial"
    saver._write(partial, [], [torch.zeros(3)], ABOUT)
    saver.finish()
    assert saver.saved == 0
    (partial / "rank-00001.bin").mkdir(parents=True)
    saver._write(partial, [], [torch.zeros(3)], ABOUT)
    with pytest.raises(OSError, match=r"rank-00001\.bin"):
        saver.finish()
    assert (partial / "failed-00001").is_file(), "rank 0 does not wait for this part"


def test_the_record_has_the_sizes_that_ranks_tell(
    tmp_path: Path, run_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network filesystem may show rank 0 a shorter file than another host has written."""
    saver = saver_of(0, tmp_path, run_config, monkeypatch)
    stands = saver.folder / checkpoint.name(4)
    partial = saver.folder / ".step-000004.partial"
    partial.mkdir(parents=True)
    saver._write(partial, [], [torch.zeros(3), torch.zeros(2)], ABOUT)
    saver.finish()
    assert checkpoint.damage(stands) is None
    assert checkpoint.read_record(stands)["files"]["rank-00000.bin"] == 20
    stands.rename(partial)
    os.truncate(partial / "rank-00000.bin", 8)
    assert saver._publish(partial, ABOUT)
    assert checkpoint.read_record(stands)["files"]["rank-00000.bin"] == 20
    assert json.loads((stands / "rank-00000.json").read_text())["bytes"] == 20
