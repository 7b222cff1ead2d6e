"""Which checkpoint is taken: the same by all ranks, and none that is damaged or cannot be read."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import xxhash

from longalign.cluster.workers import run_workers
from longalign.config import to_yaml
from longalign.errors import UserError
from longalign.files import write_json
from longalign.schema import Config
from longalign.train import checkpoint

RANK = """
import sys
from pathlib import Path
import torch.distributed as dist
from longalign.config import load_frozen
from longalign.train import checkpoint

dist.init_process_group("gloo")
if dist.get_rank() == 1:  # as a network filesystem may do for a while
    complete = checkpoint.complete
    checkpoint.complete = lambda folder: complete(folder)[:-1]
taken = checkpoint.find(load_frozen(sys.argv[1]), together=True)
Path(sys.argv[2], f"taken-{dist.get_rank()}").write_text(taken.name)
dist.barrier()
"""


def made(run: Path, step: int) -> Path:
    """A whole checkpoint of one rank with nothing in it."""
    folder = run / "checkpoints" / checkpoint.name(step)
    folder.mkdir(parents=True)
    (folder / "rank-00000.bin").write_bytes(b"")
    write_json(folder / "rank-00000.json", {"pieces": [], "checksum": xxhash.xxh3_128(b"[]").hexdigest()})
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    checkpoint.write_record(folder, {"step": step, "layout": checkpoint.LAYOUT, "plan": {}, "files": files})
    return folder


def test_ranks_that_see_other_folders_take_the_same(tmp_path: Path, run_config: Callable[..., Config]) -> None:
    config = run_config(tmp_path / "run", "cluster.processes=2", "resume=auto")
    for step in (5, 10):
        made(tmp_path / "run", step)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    words = [sys.executable, "-c", RANK, str(tmp_path / "config.yaml"), str(tmp_path)]
    assert run_workers(words, config, tmp_path / "logs") == 0
    assert [(tmp_path / f"taken-{rank}").read_text() for rank in (0, 1)] == ["step-000010"] * 2


def test_a_changed_record_is_damage(tmp_path: Path) -> None:
    folder = made(tmp_path, 5)
    assert checkpoint.damage(folder) is None
    record = folder / checkpoint.RECORD
    text = record.read_text()
    for a, b in (('"layout": 2', '"layout": 3'), ('"step": 5', '"step": 7'), ('"files"', '"filez"')):
        assert a in text
        record.write_text(text.replace(a, b))
        assert "does not have the checksum" in str(checkpoint.damage(folder))
    write_json(record, {"step": 5, "layout": 1})
    assert checkpoint.damage(folder) is None, "of an older longalign"
    with pytest.raises(UserError, match="older longalign"):
        checkpoint.check(folder, {})


def test_what_lies_beyond_the_step_resumed_from_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice from step 5, then from step 12: an older model would be taken for the end of the new course."""
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    names = lambda: sorted(path.name for path in (*tmp_path.iterdir(), *(tmp_path / "checkpoints").iterdir()))
    made(tmp_path, 5)
    for _ in range(2):
        made(tmp_path, 10)
        (tmp_path / "model").mkdir()
        write_json(tmp_path / "model" / "longalign.json", {"step": 12})
        checkpoint.abandon_after(tmp_path, 5)
        assert names() == ["abandoned-model", "abandoned-step-000010", "checkpoints", "step-000005"]
    (tmp_path / "abandoned-model").rename(tmp_path / "model")
    checkpoint.abandon_after(tmp_path, 12)
    assert "model" in names(), "of the very step that a longer run goes on from"


def test_what_cannot_be_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path, 5)
    assert checkpoint.bit_damage(folder, 0, 1) is None

    class Sector:
        def __enter__(self) -> Sector:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def read(self, size: int) -> bytes:
            raise OSError(5, "Input/output error")

    usual = builtins.open
    broken = lambda path, *more: Sector() if str(path).endswith(".bin") else usual(path, *more)
    monkeypatch.setattr(checkpoint, "open", broken, raising=False)
    assert "cannot be read: [Errno 5]" in str(checkpoint.bit_damage(folder, 0, 1))
