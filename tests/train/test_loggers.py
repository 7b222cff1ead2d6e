"""Loggers alone; whole runs with TensorBoard are in test_hang.py.

wandb is no part of the dev extra (62 MB): its test needs `pip install "longalign[wandb]"`, and is skipped without.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longalign import launch
from longalign.errors import UserError
from longalign.schema import Config
from longalign.train import loggers
from longalign.train.loggers import check_loggers, is_installed, numbers
from longalign.train.metrics import Journal, read_metrics

Make = Callable[..., Config]


def test_numbers() -> None:
    row = {"step": 3, "loss": 2.0, "skipped": True, "grad_norm": None, "time": {"data": 0.5}, "name": "x"}
    found = {"train/loss": 2.0, "train/skipped": 1.0, "train/time/data": 0.5}
    assert dict(numbers(row, "train")) == found


def test_default_is_none(run_config: Make, tmp_path: Path) -> None:
    config = run_config(tmp_path / "run")
    assert (config.logger.tensorboard, config.logger.wandb) == (False, None)


def test_missing_package_is_told_before_anything_starts(
    run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "is_installed", lambda name: False)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(UserError, match=rf'pip install "longalign\[{name}\]"'):
            launch.prepare_run(run_config(tmp_path / "run", f"logger={name}"), dry_run=False)
    assert not (tmp_path / "run").exists()


def test_missing_key_is_told(run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "is_installed", lambda name: True)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    config = run_config(tmp_path / "run", "logger=wandb")
    with pytest.raises(UserError, match="WANDB_API_KEY, or WANDB_MODE=offline"):
        check_loggers(config)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    check_loggers(config)
    (tmp_path / "netrc").unlink()
    check_loggers(run_config(tmp_path / "run", "logger=wandb", "cluster.env={WANDB_MODE: offline}"))
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    check_loggers(config)


def test_journal_cuts_what_was_written_past_the_checkpoint(run_config: Make, tmp_path: Path) -> None:
    config = run_config(tmp_path)
    journal = Journal(config, done=0, writes=True)
    for step in range(1, 6):
        journal.write("metrics", {"step": step, "loss": float("nan") if step == 2 else 1.0, "by": {"x": float("inf")}})
    journal.write("eval", {"step": 2})
    journal.write("bad_steps", {"step": 4})
    journal.close()
    Journal(config, done=3, writes=True).close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"], row["by"]["x"]) for row in rows] == [
        (1, 1.0, None),
        (2, None, None),
        (3, 1.0, None),
    ]
    assert [row["step"] for row in read_metrics(tmp_path / "eval.jsonl")] == [2]
    assert read_metrics(tmp_path / "bad_steps.jsonl") == []


def wandb_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(id of the run, a history row) from the file of an offline run: records in the form of LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, held, run_id = file.read_bytes(), 7, b"", ""  # behind ":W&B" and a version
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        held += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record.FromString(held)
            held, run_id = b"", record.run.run_id or run_id
            if record.history.item:
                items = record.history.item
                yield run_id, {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}


@pytest.mark.skipif(not is_installed("wandb"), reason='wandb is not installed: pip install "longalign[wandb]"')
def test_wandb_offline(run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed at step 5 and resumed behind step 3: one id, every step once, no secret."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = run_config(tmp_path, "logger=wandb", "logger.wandb.tags=[a,b]", "cluster.env={TOKEN: hidden}")
    for done, last in ((0, 5), (3, 8)):
        journal = Journal(config, done, writes=True)
        for step in range(done + 1, last + 1):
            loss = None if step == 7 else 1 / step
            journal.write("metrics", {"step": step, "loss": loss, "loss_by_source": {"long": 2.0}})
            if step % 4 == 0:
                journal.write("eval", {"step": step, "needle": {"score": step / 10}})
        journal.close()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    deadline = time.monotonic() + 20  # another process of wandb's writes them, and may do so a little later
    while len(found := [pair for file in files for pair in wandb_rows(file)]) < 8 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len({run for run, _ in found}) == 1
    rows = {row["_step"]: row for _, row in found}
    assert len(rows) == len(found) == 8
    assert list(rows) == list(range(1, 9))
    for step, row in rows.items():
        assert row.get("train/loss") == (None if step == 7 else 1 / step)
        assert row["train/loss_by_source/long"] == 2.0
        assert row.get("eval/needle/score") == (step / 10 if step % 4 == 0 else None)
    assert b"hidden" not in b"".join(file.read_bytes() for file in files)
