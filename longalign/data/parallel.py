"""Work by several processes, in order, with few results in memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, TypeVar

from longalign.data.messages import Raw
from longalign.schema import Config

CHUNK_BYTES = 1 << 20  # raw bytes in one task of a worker process
BYTES_PER_PROCESS = 16 << 20  # below this much text another process does not pay for its start

Task = TypeVar("Task")
Done = TypeVar("Done")

# Workers are forked from a server that has the modules but no threads: they start at once, and safely.
context = multiprocessing.get_context("forkserver")


def count_processes(config: Config, files: Iterable[Path]) -> int:
    size = sum(file.stat().st_size for file in files)
    return int(config.num_proc or min(os.cpu_count() or 1, 1 + size // BYTES_PER_PROCESS))


def start_server() -> None:
    """Start the server that workers are forked from, if it does not run yet: with their modules loaded.

    It is deaf to Ctrl-C, and so is every worker from its first moment: the command itself ends its workers.
    """
    context.set_forkserver_preload(["longalign.data.shards"])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the server inherits, and hands on
    quiet = "ignore:resource_tracker"  # it frees a pool's semaphores after Ctrl-C, and would warn of them
    sys.warnoptions.append(quiet)
    try:
        forkserver.ensure_running()
    finally:
        sys.warnoptions.remove(quiet)
        signal.signal(signal.SIGINT, before)


_work: Callable[[Any], Any] | None = None


def _start_worker(make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    global _work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process is one of several already
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = make(*arguments)


def _end_with_parent() -> None:
    """A worker whose command was killed would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(task: Any) -> Any:
    assert _work is not None
    return _work(task)


def in_order(
    make: Callable[..., Callable[[Task], Done]],
    arguments: tuple[Any, ...],
    tasks: Iterable[Task],
    processes: int,
    name: Callable[[Task], str],
) -> Iterator[Done]:
    """`make(*arguments)` of every task, in order, with a bounded number of tasks in flight; made once a process.

    An exception of a task is raised in its place. name: what to call the tasks of a process that died.
    """
    if processes == 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        yield from map(make(*arguments), tasks)
        return
    start_server()
    pool = ProcessPoolExecutor(processes, context, _start_worker, (make, arguments))
    waiting: deque[tuple[str, Future[Done]]] = deque()
    wait = True
    try:
        for task in tasks:
            waiting.append((name(task), pool.submit(_do, task)))
            if len(waiting) > 2 * processes:
                yield waiting[0][1].result()
                waiting.popleft()
        while waiting:
            yield waiting[0][1].result()
            waiting.popleft()
    except BrokenProcessPool as error:
        lost = [called for called, future in waiting if not future.done() or future.exception()][:processes]
        raise RuntimeError(
            f"a worker process died (out of memory?) at work on {' or '.join(lost)}; try a smaller num_proc"
        ) from error
    except (KeyboardInterrupt, GeneratorExit):  # here, or in whoever wants the results
        wait = False  # Ctrl-C ends this process (cli.main), and the workers with it
        raise
    finally:
        pool.shutdown(wait, cancel_futures=True)


# -- record by record ---------------------------------------------------------------------------------------


class _Each:
    """`make(config)` of every record of a chunk; an exception names file and line."""

    def __init__(self, make: Callable[[Config], Callable[[Raw], Any]], config: Config):
        self.work = make(config)

    def __call__(self, chunk: list[Raw]) -> list[Any]:
        done = []
        for raw in chunk:
            try:
                done.append(self.work(raw))
            except Exception as error:
                raise RuntimeError(f"{raw.file}:{raw.line}: {error!r}") from error
        return done


def chunks(records: Iterable[Raw]) -> Iterator[list[Raw]]:
    """Records in runs of about CHUNK_BYTES, in the same runs whatever else is going on."""
    chunk, size = [], 0
    for raw in records:
        chunk.append(raw)
        size += len(raw.value) if isinstance(raw.value, bytes) else len(str(raw.value))
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def place(chunk: list[Raw]) -> str:
    """'data/raw/long.jsonl:1-27'."""
    return f"{chunk[0].file}:{chunk[0].line}-{chunk[-1].line}"


def each(
    make: Callable[[Config], Callable[[Raw], Done]], config: Config, records: Iterable[Raw], processes: int
) -> Iterator[Done]:
    """`make(config)` of every record, in order, with a bounded number of chunks in flight; made once a process."""
    for done in in_order(_Each, (make, config), chunks(records), processes, place):
        yield from done
