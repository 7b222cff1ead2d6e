"""Two hosts of two ranks each, as agents on this machine whose remote shell has, like ssh, a bare environment.

The ranks train nothing (rank.py), so that every way to fail takes a second. What trains on two hosts is in
test_training.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from longalign.cluster import hosts, link
from longalign.cluster.agent import look
from longalign.cluster.hosts import check_same, run_hosts
from longalign.config import load_frozen, to_yaml
from longalign.errors import UserError
from longalign.launch import prepare_run
from longalign.schema import Config

HOSTS = ["127.0.0.1", "127.0.0.2"]
LAUNCH = """
import sys
from pathlib import Path
from longalign.cluster.hosts import run_hosts
from longalign.config import load_frozen
folder = Path(sys.argv[1])
sys.exit(run_hosts(sys.argv[2:], load_frozen(folder / "run" / "config.yaml"), ["127.0.0.1", "127.0.0.2"], folder / "logs"))
"""


@pytest.fixture
def config(tmp_path: Path, run_config: Callable[..., Config]) -> Config:
    """A prepared run of two hosts."""
    (tmp_path / "hostfile").write_text("127.0.0.1 slots=2\n127.0.0.2 slots=2\n")
    words = ["cluster=multinode", "cluster.device=cpu", "cluster.zero_stage=1", f"cluster.hostfile={tmp_path}/hostfile"]
    shell = "cluster.remote_shell=env -i sh -c {command}"
    return prepare_run(run_config(tmp_path / "run", *words, shell), dry_run=False)[0]


def command(folder: Path) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("rank.py")), str(folder)]


def launch(folder: Path, **kwargs: str) -> subprocess.Popen[str]:
    """A launcher in a process of its own."""
    words = [sys.executable, "-c", LAUNCH, str(folder), *command(folder)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={**os.environ, **kwargs})


def ranks(folder: Path) -> list[psutil.Process]:
    """The four ranks, once all are up."""
    deadline = time.monotonic() + 60
    while len(list(folder.glob("pid-?"))) < 4:
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    return [psutil.Process(json.loads((folder / f"pid-{n}").read_text())["pid"]) for n in range(4)]


def assert_gone(processes: list[psutil.Process]) -> None:
    _, left = psutil.wait_procs(processes, timeout=10)
    assert not left


def agents(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(launcher.pid).children()


def test_environment_reaches_the_ranks_and_no_command_line(tmp_path: Path, config: Config) -> None:
    launcher = launch(tmp_path, WANDB_API_KEY="hush-1", OTHER_KEY="hush-2", NCCL_DEBUG="WARN")
    started = ranks(tmp_path)
    assert len(agents(launcher)) == 2
    words = [word for process in (*agents(launcher), *started) for word in process.cmdline()]
    assert not any("hush" in word for word in words)
    for n in range(4):
        seen = json.loads((tmp_path / f"pid-{n}").read_text())
        assert (seen["RANK"], seen["LOCAL_RANK"], seen["WORLD_SIZE"]) == (str(n), str(n % 2), "4")
        assert (seen["MASTER_ADDR"], seen["WANDB_API_KEY"], seen["NCCL_DEBUG"]) == ("127.0.0.1", "hush-1", "WARN")
        assert "OTHER_KEY" not in seen
        assert seen["PATH"] == os.environ["PATH"]
    (tmp_path / "end").touch()
    _, said = launcher.communicate(timeout=30)
    assert launcher.returncode == 0
    assert "rank 0 is up" in said
    assert "rank 1 is up" not in said
    logs = {f"{host}-rank-{n}.log" for host, n in zip(("127.0.0.1",) * 2 + ("127.0.0.2",) * 2, range(4), strict=True)}
    assert {p.name for p in (tmp_path / "logs").iterdir()} == logs
    assert "hush" not in (tmp_path / "run" / "config.yaml").read_text()


def test_failed_rank_is_told_before_its_consequences(tmp_path: Path, config: Config) -> None:
    launcher = launch(tmp_path)
    started, began = ranks(tmp_path), time.monotonic()
    (tmp_path / "fail-3").touch()
    _, said = launcher.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert launcher.returncode == 1
    assert "127.0.0.2 rank 3 failed with exit code 1" in said
    assert "the moon is down on 3" in said
    assert "connection closed" not in said.partition("the moon is down on 3")[0]
    assert_gone(started)


def test_killed_rank(tmp_path: Path, config: Config) -> None:
    launcher = launch(tmp_path)
    started = ranks(tmp_path)
    started[2].kill()
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    assert "127.0.0.2 rank 2 failed with signal 9" in said
    assert_gone(started)


def test_killed_agent(tmp_path: Path, config: Config) -> None:
    launcher = launch(tmp_path)
    started = ranks(tmp_path)
    agents(launcher)[1].kill()
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    assert "lost 127.0.0.2" in said
    assert "signal 9" in said
    assert_gone(started)


def test_silent_host(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(link, "SILENCE_S", 7.0)  # an agent speaks every 5 s
    monkeypatch.setattr(hosts, "END_S", 2.0)

    def stop() -> None:
        ranks(tmp_path)
        [*_, second] = (p for p in psutil.Process().children() if "longalign.cluster.agent" in p.cmdline())
        second.suspend()

    thread = threading.Thread(target=stop)
    thread.start()
    assert run_hosts(command(tmp_path), config, HOSTS, tmp_path / "logs") == 1
    thread.join()
    assert "lost 127.0.0.2:\nno sign of life for 7 s" in capfd.readouterr().err
    assert_gone(
        [
            psutil.Process(pid)
            for n in range(4)
            if psutil.pid_exists(pid := json.loads((tmp_path / f"pid-{n}").read_text())["pid"])
        ]
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_stopped_launcher_lets_all_ranks_save(number: int, code: int, tmp_path: Path, config: Config) -> None:
    """Killed, it can say nothing any more: the agents' stdin ends."""
    launcher = launch(tmp_path)
    started = ranks(tmp_path)
    launcher.send_signal(number)
    launcher.communicate(timeout=60)
    assert launcher.returncode == code
    assert_gone(started)
    assert len(list(tmp_path.glob("saved-?"))) == 4


def test_host_stopped_by_its_scheduler_is_no_failure(tmp_path: Path, config: Config) -> None:
    launcher = launch(tmp_path)
    started = ranks(tmp_path)
    for agent in agents(launcher):
        agent.terminate()
    launcher.communicate(timeout=60)
    assert launcher.returncode == 143
    assert len(list(tmp_path.glob("saved-?"))) == 4
    assert_gone(started)


def test_host_that_cannot_be_reached_is_told(tmp_path: Path, config: Config) -> None:
    shell = "sh -c 'echo no route to $1 >&2; exit 7' sh {host} {command}"
    cut = config.model_copy(update={"cluster": config.cluster.model_copy(update={"remote_shell": shell})})
    with pytest.raises(UserError, match=r"127.0.0.[12]: its agent ended with exit code 7\nno route to 127.0.0.[12]"):
        run_hosts(command(tmp_path), cut, HOSTS, tmp_path / "logs")
    wrong = config.model_copy(update={"cluster": config.cluster.model_copy(update={"master_addr": "nowhere.invalid"})})
    with pytest.raises(UserError, match=r"does not reach 127.0.0.1 at nowhere.invalid:\d+ .* cluster.master_addr"):
        run_hosts(command(tmp_path), wrong, HOSTS, tmp_path / "logs")
    assert not list(tmp_path.glob("pid-?")), "no rank was started"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting over a folder needs root")
def test_host_without_the_shared_folder_is_told(tmp_path: Path, config: Config) -> None:
    """The second host has a filesystem of its own where the run folder should be."""
    script = tmp_path / "shell.sh"
    hide = f"mount -t tmpfs none {tmp_path}/run"
    script.write_text(
        f'if [ "$1" = 127.0.0.2 ]; then exec unshare -m sh -c "{hide} && exec sh -c \\"\\$0\\"" "$2"; fi\nexec sh -c "$2"\n'
    )
    shell = f"sh {script} {{host}} {{command}}"
    apart = config.model_copy(update={"cluster": config.cluster.model_copy(update={"remote_shell": shell})})
    with pytest.raises(UserError, match=rf"127.0.0.2 does not see {tmp_path}/run/config.yaml: all hosts must share"):
        run_hosts(command(tmp_path), apart, HOSTS, tmp_path / "logs")


def test_what_differs_between_hosts_is_named(tmp_path: Path, config: Config) -> None:
    file = tmp_path / "run" / "config.yaml"
    here = look([str(file)], "cpu")
    check = lambda seen: check_same(config, "node7", seen, here["files"], here["versions"])
    check(look([str(file)], "cpu"))
    file.write_text(to_yaml(load_frozen(file).model_copy(update={"seed": 8})))
    with pytest.raises(UserError, match=f"node7 sees another {file}"):
        check(look([str(file)], "cpu"))
    with pytest.raises(UserError, match=r"node7 has torch 1.0 and the launcher \d"):
        check({**here, "versions": {**here["versions"], "torch": "1.0"}})
    with pytest.raises(UserError, match=r"node7 has 1 GPU\(s\), fewer than cluster.processes=2"):
        check({**here, "gpus": 1})
