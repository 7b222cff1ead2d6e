"""Work on records by several processes, in order, with few of them in memory."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from longalign.data.messages import Raw
from longalign.schema import Config

CHUNK_BYTES = 1 << 20  # raw bytes in one task of a worker process
BYTES_PER_PROCESS = 16 << 20  # below this much text another process does not pay for its start

Done = TypeVar("Done")


def count_processes(config: Config, files: Iterable[Path]) -> int:
    size = sum(file.stat().st_size for file in files)
    return int(config.num_proc or min(os.cpu_count() or 1, 1 + size // BYTES_PER_PROCESS))


_work: Callable[[Raw], Any] | None = None


def _start_worker(make: Callable[[Config], Callable[[Raw], Any]], config: Config) -> None:
    global _work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _work = make(config)


def _start(pool: ProcessPoolExecutor, processes: int) -> None:
    """Start the workers, deaf to Ctrl-C, which reaches every process of a terminal: the command ends its workers."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # new processes inherit it
    try:
        for _ in range(processes):  # each task starts one more, since none is idle yet
            pool.submit(int)
    finally:
        signal.signal(signal.SIGINT, before)


def _do(chunk: list[Raw]) -> list[Any]:
    assert _work is not None
    done = []
    for raw in chunk:
        try:
            done.append(_work(raw))
        except Exception as error:
            raise RuntimeError(f"{raw.file}:{raw.line}: {error!r}") from error
    return done


def _chunks(records: Iterable[Raw]) -> Iterator[list[Raw]]:
    chunk, size = [], 0
    for raw in records:
        chunk.append(raw)
        size += len(raw.value) if isinstance(raw.value, bytes) else len(str(raw.value))
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def each(
    make: Callable[[Config], Callable[[Raw], Done]], config: Config, records: Iterable[Raw], processes: int
) -> Iterator[Done]:
    """`make(config)` of every record, in order, with a bounded number of chunks in flight; made once a process."""
    if processes == 1:
        _start_worker(make, config)
        for chunk in _chunks(records):
            yield from _do(chunk)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (make, config)) as pool:
        _start(pool, processes)
        waiting: deque[Future[list[Done]]] = deque()
        try:
            for chunk in _chunks(records):
                waiting.append(pool.submit(_do, chunk))
                if len(waiting) > 2 * processes:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise RuntimeError("a worker process died (out of memory?); try a smaller num_proc") from error
        finally:
            pool.shutdown(cancel_futures=True)
