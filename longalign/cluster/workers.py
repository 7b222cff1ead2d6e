"""Worker processes of one host: environment, start, signals, end; and a run on this host alone."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from longalign.progress import console, warn
from longalign.schema import Config
from longalign.train.heartbeat import DUMP, read

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
TAIL = 4000  # bytes of a failed rank's log that are shown


@contextmanager
def reserved_port(port: int = 0) -> Iterator[int]:
    """A free port, or this one, for rank 0 to listen on; nobody else gets it until the context ends.

    A rank takes its time to start: of several launches on a host, one lost its port to a connection of another. A
    socket that is bound but does not listen keeps others away, and not a rank's, whose address is as reusable.
    """
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("", port))
        yield keeper.getsockname()[1]


def worker_environment(
    config: Config, local_rank: int, port: int, node: int = 0, address: str = "127.0.0.1"
) -> dict[str, str]:
    """The variables of torch's env:// rendezvous, and what DeepSpeed and OpenMP need.

    node: number of this host, from 0; address and port: where rank 0 is met.
    """
    here = int(config.cluster.processes)
    made = {
        "RANK": node * here + local_rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": config.cluster.ranks,
        "LOCAL_WORLD_SIZE": here,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    return {**os.environ, **{k: str(v) for k, v in made.items()}, **common_environment(config)}


def common_environment(config: Config) -> dict[str, str]:
    """What every rank needs, however it is started."""
    cpu = config.cluster.device == "cpu"
    threads = max(1, (os.cpu_count() or 1) // int(config.cluster.processes))
    made = {
        "DS_ACCELERATOR": "cpu" if cpu else "cuda",
        ALLOCATOR: allocator(config),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if cpu:
        made["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    return {**made, **config.cluster.env}


def allocator(config: Config) -> str:
    """torch's setting for GPU memory: segments that grow, since the shapes of packs vary."""
    return config.cluster.env.get(ALLOCATOR) or os.environ.get(ALLOCATOR) or "expandable_segments:True"


def set_allocator(config: Config) -> None:
    """Have this process, and those that it starts, take GPU memory as a run's workers do. Before torch is imported."""
    os.environ[ALLOCATOR] = allocator(config)


def start_worker(
    command: list[str], environment: dict[str, str], log: Path | None, if_orphaned: signal.Signals
) -> subprocess.Popen[bytes]:
    """Start one rank. log: None is the terminal. if_orphaned: the signal it gets if this process dies."""

    def before() -> None:
        ctypes.CDLL(None).prctl(1, if_orphaned)  # PR_SET_PDEATHSIG; Linux only, as is CUDA training
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # they wait until worker.join can handle them

    file = None if log is None else open(log, "wb")
    # A session of its own: a terminal's Ctrl-C reaches the workers once, through the launcher.
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=file,
        start_new_session=True,
        preexec_fn=before,
    )


def end(processes: list[subprocess.Popen[bytes]], grace: float = 5.0, dump: bool = False) -> None:
    """End processes that still run: they may sit in a collective that a dead rank will never join.

    dump: ranks first write where they stand to their stacks file (train/heartbeat.py).
    """
    deadline = time.monotonic() + grace
    for process in processes:
        if process.poll() is None:
            if dump:
                process.send_signal(DUMP)
            process.terminate()
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def insists(received: list[int]) -> bool:
    """Whether these signals ask to kill: a second Ctrl-C. Schedulers may well repeat a SIGTERM."""
    return signal.SIGINT in received[1:]


@contextmanager
def on_stop(handler: Callable[[int], None]) -> Iterator[None]:
    """Within the block SIGINT and SIGTERM call the handler (in a thread of a sweep they stay as they are)."""
    catch = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, lambda number, _: handler(number)) for number in catch}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def tail(log: Path) -> str:
    """The end of a log."""
    return log.read_bytes()[-TAIL:].decode(errors="replace").strip("\n")


def cause(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def stopping(config: Config) -> str:
    """What happens after the first signal, and what stands if there is no time for it."""
    from longalign.train.checkpoint import complete, step_of  # torch, which an agent does not need

    newest = complete(Path(config.output_dir or "", "checkpoints"))
    stands = f"the checkpoint of step {step_of(newest[-1])} stands" if newest else "the run starts anew"
    return f"stopping: the step in progress is finished and saved; killed before that, {stands} (resume=auto)"


def is_saved(run: Path) -> bool:
    """Whether rank 0 is done, or the step that it began last stands in a checkpoint: the rest can wait for a resume."""
    from longalign.train.checkpoint import complete, step_of

    newest, beats = complete(run / "checkpoints"), read(run / "logs", 1)
    return bool(newest and beats) and (bool(beats[0]["ended"]) or step_of(newest[-1]) >= beats[0]["step"])


def run_workers(command: list[str], config: Config, logs: Path, saves: bool = True) -> int:
    """Run one process per rank on this host and wait for all; returns the exit code of the run.

    Rank 0 writes to the terminal, the others to logs/rank-N.log. The first Ctrl-C or SIGTERM is passed on, for the
    workers to save and stop; a second Ctrl-C kills them, and so does 0.9 of grace_s after a SIGTERM, whose sender is
    about to kill everything. When a rank fails the others are ended and its log is shown. saves=False: they have
    nothing to save, and a signal ends them.
    """
    logs.mkdir(parents=True, exist_ok=True)
    received: list[int] = []
    workers: list[subprocess.Popen[bytes]] = []
    deadline, overdue, told = math.inf, False, False

    def forward(number: int) -> None:
        nonlocal deadline
        received.append(number)
        for worker in workers:
            worker.send_signal(signal.SIGKILL if insists(received) else number)
        if number == signal.SIGTERM:
            deadline = min(deadline, time.monotonic() + 0.9 * config.grace_s)

    with on_stop(forward), reserved_port() as port:
        try:
            for rank in range(int(config.cluster.processes)):
                log = None if rank == 0 else logs / f"rank-{rank}.log"
                environment = worker_environment(config, rank, port)
                workers.append(start_worker(command, environment, log, if_orphaned=signal.SIGTERM))
            while True:
                codes = [worker.poll() for worker in workers]
                # A mistake that the user can mend (2) comes before what follows from it on other ranks.
                failed = codes.index(2) if 2 in codes else next((rank for rank, code in enumerate(codes) if code), None)
                if failed is not None or None not in codes:
                    break
                time.sleep(0.1)
                if saves and received and not told:
                    console.print(stopping(config))
                    told = True
                if time.monotonic() > deadline:
                    overdue = True
                    if saves and not is_saved(Path(config.output_dir or "")):
                        warn(f"the step in progress was not finished and saved within grace_s={config.grace_s:g}")
                    break
        finally:
            killed = overdue or insists(received)
            end(workers, grace=0.0 if killed else 5.0, dump=not received)
    if received and (failed is None or killed or not saves):
        return 128 + received[0]
    if failed is None:
        return 0
    code = workers[failed].returncode
    if failed:  # rank 0 has written to the terminal already
        console.print(tail(logs / f"rank-{failed}.log"))
    if code == 2:
        return 2
    console.print(f"rank {failed} failed with {cause(code)}", style="red")
    return 1
