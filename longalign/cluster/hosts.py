"""Several hosts: an agent (agent.py) on each, what they must have in common, and what happens when one fails."""

from __future__ import annotations

import os
import queue
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from longalign.cluster import link
from longalign.cluster.agent import PACKAGES, fingerprints
from longalign.cluster.workers import cause, insists, on_stop, stopping
from longalign.errors import UserError
from longalign.files import versions
from longalign.progress import console
from longalign.schema import Config

START_S = 120.0  # for a host's agent to answer: Python's imports from a slow shared filesystem
HOLD_S = 1.0  # rank 0's output is shown so much later, that a failure elsewhere comes before its consequences
END_S = 15.0  # for an agent to end its ranks
PATHS = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")  # needed before Python runs, hence part of the remote command


# -- one host, seen from the launcher -------------------------------------------------------------------


def remote_command(remote_shell: str, host: str) -> list[str]:
    """The words that start an agent: cluster.remote_shell with {host} and {command} filled in. No secrets in them."""
    paths = [f"{name}={os.environ[name]}" for name in PATHS if name in os.environ]
    agent = shlex.join(["env", *paths, sys.executable, "-m", "longalign.cluster.agent"])
    script = f"cd {shlex.quote(os.getcwd())} && exec {agent}"
    return [word.replace("{host}", host).replace("{command}", script) for word in shlex.split(remote_shell)]


Inbox = queue.SimpleQueue[tuple["Host | None", link.Message | None]]


class Host:
    """A host's agent. Its messages go to the inbox as (host, message), None when it is gone."""

    def __init__(self, name: str, words: list[str], inbox: Inbox):
        self.name, self.words = name, words
        self.done, self.heard = False, time.monotonic()
        self.said: deque[str] = deque(maxlen=20)  # what is no message: errors of the shell or of the agent
        # A session of its own: Ctrl-C would end ssh, and with it the ranks.
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        except OSError as error:
            raise UserError(f"cluster.remote_shell cannot be run: {error}") from None
        assert self.process.stdout
        assert self.process.stderr
        link.listen(self.process.stdout, lambda message: inbox.put((self, message)), self.said.append)
        link.listen(self.process.stderr, lambda message: None, self.said.append)

    def send(self, **message: Any) -> None:
        assert self.process.stdin
        link.send(self.process.stdin, **message)

    def why_gone(self) -> str:
        """How the remote shell ended, and what was said last."""
        try:
            ended = f"its agent ended with {cause(self.process.wait(2))}"
        except subprocess.TimeoutExpired:
            ended = "its agent closed the connection"
        return "\n".join([ended, *self.said])

    def end(self, deadline: float) -> None:
        """Wait for the agent, which was told to end, and cut the connection if it does not."""
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # an agent that still runs finds its stdin closed
            self.process.wait()


# -- a run on all of them -------------------------------------------------------------------------------


class Hosts:
    """All hosts of a run, told now and then that the launcher lives."""

    def __init__(self) -> None:
        self.inbox: Inbox = queue.SimpleQueue()
        self.all: list[Host] = []
        self.told = time.monotonic()

    def start(self, names: list[str], remote_shell: str) -> None:
        for name in names:
            self.all.append(Host(name, remote_command(remote_shell, name), self.inbox))

    def send(self, **message: Any) -> None:
        for host in self.all:
            host.send(**message)

    def hear(self) -> tuple[Host | None, link.Message | None]:
        """The next message and who sent it (no host: this process); (None, None) if there is none now."""
        if time.monotonic() - self.told > link.BEAT_S:
            self.told = time.monotonic()
            self.send(alive=True)
        try:
            host, message = self.inbox.get(timeout=0.2)
        except queue.Empty:
            return None, None
        if host:
            host.heard = time.monotonic()
        return host, message

    def ask(self, key: str) -> dict[Host, Any]:
        """Every host's answer of this key. Raises UserError if one gives none."""
        answers: dict[Host, Any] = {}
        deadline = time.monotonic() + START_S
        while missing := [host for host in self.all if host not in answers]:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{missing[0].name} did not answer in {START_S:.0f} s to: {shlex.join(missing[0].words)}"
                )
            host, message = self.hear()
            if host and message is None:
                raise UserError(f"{host.name}: {host.why_gone()}\nstarted by: {shlex.join(host.words)}")
            if host and message and key in message:
                answers[host] = message[key]
        return answers

    def end(self) -> None:
        self.send(end=True)
        deadline = time.monotonic() + END_S
        for host in self.all:
            host.end(deadline)


def run_hosts(command: list[str], config: Config, names: list[str], logs: Path) -> int:
    """Run the ranks of every host and wait for all; returns the exit code of the run.

    The output of rank 0 is shown, and each rank has a log, logs/HOST-rank-N.log. The first Ctrl-C or SIGTERM reaches
    every rank, for them to save and stop; a second Ctrl-C kills them. When a rank fails, or a host is lost, that is
    shown and all others are ended. Raises UserError, before any rank has started, if the hosts do not fit together.
    """
    hosts = Hosts()
    try:
        hosts.start(names, config.cluster.remote_shell)
        meet(hosts, command, config, logs)
        return watch(hosts, config)
    finally:
        hosts.end()


def environment_to_send(prefixes: list[str]) -> dict[str, str]:
    """The variables of this process that agents get; by message, since command lines are there for all to read."""
    return {key: value for key, value in os.environ.items() if key.startswith(tuple(prefixes))}


def meet(hosts: Hosts, command: list[str], config: Config, logs: Path) -> None:
    """Start the ranks. Raises UserError if the hosts see other files, have other packages or do not reach the first."""
    files = [f"{config.output_dir}/config.yaml", f"{config.output_dir}/plan/manifest.json"]
    files += [f"{config.data_dir}/manifest.json", *map(str, Path(config.model.path).glob("config.json"))]
    job = {
        "command": command,
        "config": config.model_dump(mode="json"),
        "logs": str(logs),
        "files": files,
        "environment": environment_to_send(config.cluster.pass_env),
        "silence": link.SILENCE_S,
    }
    for node, host in enumerate(hosts.all):
        host.send(job={**job, "host": host.name, "node": node})
    seen = hosts.ask("seen")
    for host in hosts.all:
        check_same(config, host.name, seen[host], fingerprints(files), versions(*PACKAGES))
    first = hosts.all[0]
    if error := seen[first].get("no_port"):
        raise UserError(f"cluster.port={config.cluster.port} cannot be used on {first.name}: {error}")
    address, port = config.cluster.master_addr or first.name.rpartition("@")[2], seen[first]["port"]
    hosts.send(reach=[address, port])
    for host, error in hosts.ask("reached").items():
        if error:
            raise UserError(
                f"{host.name} does not reach {first.name} at {address}:{port} ({error}); set cluster.master_addr to an "
                "address of it that all hosts reach, and cluster.port to a port that is open"
            )
    hosts.send(start=[address, port])


def check_same(
    config: Config, name: str, seen: dict[str, Any], files: dict[str, str | None], installed: dict[str, str]
) -> None:
    """Raises UserError if this host sees other files than the launcher, has other packages, or too few GPUs."""
    for file, here in files.items():
        if (there := seen["files"][file]) != here:
            what = "does not see" if there is None else "sees another"
            raise UserError(f"{name} {what} {file}: all hosts must share the folders of run, data and model")
    for package, here in installed.items():
        if (there := seen["versions"][package]) != here:
            raise UserError(f"{name} has {package} {there} and the launcher {here}: install the same one")
    if seen["gpus"] is not None and seen["gpus"] < int(config.cluster.processes):
        raise UserError(f"{name} has {seen['gpus']} GPU(s), fewer than cluster.processes={config.cluster.processes}")


def watch(hosts: Hosts, config: Config) -> int:
    """Show rank 0's output until all have ended, or one has failed; returns the exit code."""
    asked: list[int] = []  # signals to this process
    stopped = 0  # the first signal that makes all save and stop, to this process or to a host's agent
    held: deque[tuple[float, str]] = deque()
    failed = 0
    with on_stop(lambda number: hosts.inbox.put((None, {"stop": number}))):
        while not failed and not all(host.done for host in hosts.all):
            host, message = hosts.hear()
            match message:
                case {"stop": number}:
                    asked.append(number)
                    stopped = stopped or number
                    hosts.send(signal=int(signal.SIGKILL) if insists(asked) else number)
                    if len(asked) == 1:
                        console.print(stopping(config))
                case {"stopped": number}:  # a scheduler stopped that host: its ranks make all others save and stop
                    stopped = stopped or number
                case {"output": text}:
                    held.append((time.monotonic(), text))
                case {"failed": rank}:
                    assert host
                    failed = 2 if rank["code"] == 2 else 1
                    if not insists(asked):  # else killed as asked
                        told = f"{host.name} rank {rank['rank']} failed with {cause(rank['code'])}"
                        report(f"{told}; the end of {rank['log']}:", rank["tail"])
                case {"done": True}:
                    assert host
                    host.done = True
                case None if host and not host.done:
                    failed = report(f"lost {host.name}:", host.why_gone())
            for other in hosts.all:
                if not failed and not other.done and time.monotonic() - other.heard > link.SILENCE_S:
                    failed = report(f"lost {other.name}:", f"no sign of life for {link.SILENCE_S:.0f} s")
            while held and (time.monotonic() - held[0][0] > HOLD_S):
                show(held.popleft()[1])
    if not failed:
        show("".join(text for _, text in held))
    return 128 + stopped if stopped and (not failed or insists(asked)) else failed


def show(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def report(what: str, details: str) -> int:
    console.print(what, style="red", soft_wrap=True)
    console.print(details, soft_wrap=True)
    return 1
