"""Ranks of one host that train nothing: what the launcher makes of signals and of how they end."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from longalign.cluster import hosts
from longalign.cluster.workers import reserved_port, run_workers
from longalign.schema import Config
from longalign.train import worker
from longalign.train.checkpoint import RECORD

RANK = """
import os, signal, sys, time
rank, folder, how = os.environ["RANK"], sys.argv[1], sys.argv[2]
told = []
signal.signal(signal.SIGTERM, signal.SIG_DFL if how == "drop" else lambda *_: told.append(1))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
open(f"{folder}/up-{rank}", "w").close()
if how == "mistake":
    print("error: of rank", rank, flush=True)
    while rank == "0" and not os.path.exists(f"{folder}/up-1"):
        time.sleep(0.01)
    time.sleep(0.1 if rank == "0" else 0)
    os._exit(1 if rank == "0" else 2)
while not told:
    time.sleep(0.02)
time.sleep(1.0 if how == "save" else 30)
open(f"{folder}/saved-{rank}", "w").close()
"""


def test_a_reserved_port_is_for_a_rank_alone() -> None:
    """Another program's socket cannot have it while a rank is about to start; the rank's store can listen on it."""
    with reserved_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        store = dist.TCPStore("127.0.0.1", port, 1, is_master=True, timeout=timedelta(seconds=10))
        store.set("rank", "0")
        assert store.get("rank") == b"0"


def run(config: Config, folder: Path, how: str, signals: int = 0, saves: bool = True) -> int:
    """The exit code of two such ranks, with so many SIGTERMs to this process."""

    def terminate() -> None:
        deadline = time.monotonic() + 30
        while len(list(folder.glob("up-?"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    thread = threading.Thread(target=terminate)
    thread.start()
    code = run_workers([sys.executable, "-c", RANK, str(folder), how], config, folder / "logs", saves)
    thread.join()
    return code


def test_a_second_sigterm_does_not_kill(tmp_path: Path, run_config: Callable[..., Config]) -> None:
    assert run(run_config(tmp_path / "run", "cluster.processes=2"), tmp_path, "save", signals=2) == 143
    assert len(list(tmp_path.glob("saved-?"))) == 2


@pytest.mark.parametrize(("begun", "warned"), [(7, False), (8, True)])
def test_the_end_of_the_grace_is_told_if_the_step_is_lost(
    begun: int, warned: bool, tmp_path: Path, run_config: Callable[..., Config], capfd: pytest.CaptureFixture[str]
) -> None:
    """Step 7 stands; ranks that still run are in their exit, or in a step that was begun."""
    (tmp_path / "run" / "checkpoints" / "step-000007").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-000007" / RECORD).write_text("{}")
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "run" / "logs" / "rank-0.heartbeat").write_text(json.dumps({"step": begun, "ended": None}))
    assert run(run_config(tmp_path / "run", "cluster.processes=2", "grace_s=1"), tmp_path, "hang", signals=1) == 143
    assert ("was not finished and saved within grace_s=1" in capfd.readouterr().err) is warned


def test_ranks_with_nothing_to_save_end_by_the_signal(
    tmp_path: Path, run_config: Callable[..., Config], capfd: pytest.CaptureFixture[str]
) -> None:
    config = run_config(tmp_path / "run", "cluster.processes=2")
    assert run(config, tmp_path, "drop", signals=1, saves=False) == 143
    assert capfd.readouterr().err == "", "no word of steps that are saved"


def test_a_mistake_comes_before_what_follows_from_it(
    tmp_path: Path,
    run_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(max(seconds, 0.7)))  # both are gone then
    assert run(run_config(tmp_path / "run", "cluster.processes=2"), tmp_path, "mistake") == 2
    assert "error: of rank 1" in capfd.readouterr().err


# -- several hosts: hosts.watch alone, on messages ------------------------------------------------------


def watched(
    messages: list[tuple[int | None, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, list[int]]:
    """The exit code of two hosts that say this (None: this process), and the signals that were sent to all."""
    monkeypatch.setattr(hosts, "stopping", lambda config: "stopping")
    made, sent = hosts.Hosts(), list[int]()
    for name in "ab":
        host: Any = SimpleNamespace(name=name, done=False, heard=time.monotonic(), send=lambda **message: None)
        made.all.append(host)
    monkeypatch.setattr(made, "send", lambda **message: sent.extend([message["signal"]] if "signal" in message else []))
    for number, message in messages:
        made.inbox.put((None if number is None else made.all[number], message))
    config: Any = None
    return hosts.watch(made, config), sent


BOTH_TOLD = [(0, {"stopped": 15}), (1, {"stopped": 15})]  # by their scheduler
ENDED = [(0, {"done": True}), (1, {"done": True})]
FULL = (1, {"failed": {"rank": 3, "code": 2, "log": "LOG", "tail": "error: the disk is full"}})


def test_what_agents_were_told_does_not_count_as_signals(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert watched([*BOTH_TOLD, *ENDED], monkeypatch) == (143, [])
    assert watched([*BOTH_TOLD, (None, {"stop": 15}), *ENDED], monkeypatch) == (143, [15]), "the first one saves"
    assert watched([*BOTH_TOLD, FULL], monkeypatch) == (2, [])
    assert "the disk is full" in capfd.readouterr().err


def test_only_a_second_ctrl_c_kills_on_all_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = lambda number: (None, {"stop": number})
    assert watched([stop(15), stop(15), *ENDED], monkeypatch) == (143, [15, 15])
    assert watched([stop(2), stop(2), *ENDED], monkeypatch) == (130, [2, 9])
    assert watched([stop(15), stop(2), *ENDED], monkeypatch) == (143, [15, 9])


def test_a_rank_that_parts_last_does_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have passed the barrier and closed their connections while it was still in it."""
    left = []

    def barrier() -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1696")

    monkeypatch.setattr(worker.dist, "barrier", barrier)
    monkeypatch.setattr(worker.dist, "destroy_process_group", lambda: left.append(True))
    worker.leave()
    assert left == [True]
