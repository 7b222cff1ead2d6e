"""The ranks of one host of several: `python -m longalign.cluster.agent`, started on every host by hosts.py.

It speaks with the launcher by messages (link.py) on stdin and stdout, in this order:

    launcher  job=...                 environment, configuration, files to look at
    agent     seen=...                their hashes, package versions, GPUs; a free port
    launcher  reach=[address, port]   where rank 0 will be met
    agent     reached=null | error
    launcher  start=[address, port]
    agent     output=... (of rank 0), failed=..., stopped=..., done=true
    launcher  signal=N, end=true

and both say alive=true every BEAT_S. Without the launcher (stdin at its end, or silent) the ranks are ended.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from longalign.cluster.link import BEAT_S, MARK, Message, listen, send
from longalign.cluster.workers import STOP_SIGNALS, end, reserved_port, start_worker, tail, worker_environment
from longalign.files import versions
from longalign.schema import Config
from longalign.streams import outlive_readers

ORPHAN_S = 20.0  # for the ranks to save, once the launcher is lost
REACH_S = 10.0
PACKAGES = ("torch", "transformers", "deepspeed")


def fingerprints(files: list[str]) -> dict[str, str | None]:
    """sha256 of every file, None for one that is not there."""
    sha = lambda path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return {file: sha(Path(file)) for file in files}


def look(files: list[str], device: str) -> dict[str, Any]:
    """What has to be the same on all hosts, and this one's GPUs."""
    gpus = None
    if device == "cuda":
        import torch

        gpus = torch.cuda.device_count()
    return {"files": fingerprints(files), "versions": versions(*PACKAGES), "gpus": gpus}


def reach(address: str, port: int) -> str | None:
    """What keeps this host from rank 0's address, None if nothing does."""
    try:
        socket.create_connection((address, port), timeout=REACH_S).close()
    except OSError as error:
        return str(error)
    return None


class Agent:
    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.stdout = os.fdopen(os.dup(1), "wb")  # for messages alone: whatever else is printed goes to stderr
        os.dup2(2, 1)
        listen(os.fdopen(os.dup(0), "rb"), self.inbox.put, lambda text: None)
        for number in STOP_SIGNALS:  # a scheduler may stop a host by itself: all ranks agree on the step then
            signal.signal(number, lambda number, _: self.inbox.put({"stop": number}))
        self.heard = self.told = time.monotonic()
        self.silence = float("inf")  # until the job says it

    def say(self, **message: Any) -> None:
        send(self.stdout, **message)
        self.told = time.monotonic()

    def hear(self) -> Message | None:
        """The next message, {} if there is none now, None if the launcher is lost."""
        if time.monotonic() - self.told > BEAT_S:
            self.say(alive=True)
        try:
            message = self.inbox.get(timeout=0.1)
        except queue.Empty:
            return {} if time.monotonic() - self.heard < self.silence else None
        if message and MARK in message:
            self.heard = time.monotonic()
        return message

    def wait_for(self, key: str) -> Any:
        """The value of the next message with this key. Ends the process if the launcher is lost or wants an end."""
        while (message := self.hear()) is not None and not {"end", "stop", "signal"} & message.keys():
            if key in message:
                return message[key]
        sys.exit(1)

    def run(self) -> int:
        job = self.wait_for("job")
        self.silence, host, node = job["silence"], job["host"], job["node"]
        config = Config.model_validate(job["config"])
        os.environ.update({**job["environment"], **config.cluster.env})
        seen = look(job["files"], config.cluster.device)
        with socket.socket() as door:  # on the first host the others knock at it
            if node == 0:
                try:
                    door.bind(("", config.cluster.port or 0))
                    door.listen(config.cluster.ranks)
                    seen["port"] = door.getsockname()[1]
                except OSError as error:
                    seen["no_port"] = str(error)
            self.say(seen=seen)
            self.say(reached=reach(*self.wait_for("reach")))
            address, port = self.wait_for("start")
        logs = Path(job["logs"])
        logs.mkdir(parents=True, exist_ok=True)
        workers: list[subprocess.Popen[bytes]] = []
        names = []
        with reserved_port(port) if node == 0 else nullcontext():
            try:
                for local in range(int(config.cluster.processes)):
                    environment = worker_environment(config, local, port, node, address)
                    names.append((int(environment["RANK"]), logs / f"{host}-rank-{environment['RANK']}.log"))
                    worker = start_worker(job["command"], environment, names[-1][1], if_orphaned=signal.SIGKILL)
                    workers.append(worker)
                    threading.Thread(target=self._await, args=(worker, local), daemon=True).start()
                return self.watch(workers, names)
            finally:
                end(workers, dump=True)

    def _await(self, worker: subprocess.Popen[bytes], local: int) -> None:
        self.inbox.put({"exit": worker.wait(), "local": local})

    def watch(self, workers: list[subprocess.Popen[bytes]], names: list[tuple[int, Path]]) -> int:
        """Pass on signals, rank 0's output and failures until all ranks have ended or the launcher says so."""
        output = open(names[0][1], "rb") if names[0][0] == 0 else None
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        left = len(workers)
        while left:
            message = self.hear()
            if output and (text := decode(output.read())):
                self.say(output=text)
            if message is None:
                end(workers, ORPHAN_S)
                return 1
            if "end" in message:
                return 1
            if number := message.get("signal") or message.get("stop"):
                for worker in workers:
                    worker.send_signal(number)
                if "stop" in message:
                    self.say(stopped=number)
            if "exit" in message:
                left -= 1
                rank, log = names[message["local"]]
                if message["exit"]:
                    self.say(failed={"rank": rank, "code": message["exit"], "log": str(log), "tail": tail(log)})
        if output and (text := decode(output.read(), True)):
            self.say(output=text)
        self.say(done=True)
        return 0


if __name__ == "__main__":
    outlive_readers()
    sys.exit(Agent().run())
