"""Records of files -> rows of token ids, by several processes, in file order."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from longalign.data.messages import SYSTEM_MERGED, BadSample, Raw, conversation, read, understand
from longalign.data.truncate import truncate
from longalign.model.load import load_template
from longalign.schema import Config

CHUNK_BYTES = 1 << 20  # raw bytes in one task of a worker process


@dataclass
class Encoded:
    """What became of one record."""

    file: str
    line: int
    rows: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # (input_ids, labels), int32
    dropped: str | None = None  # the reason
    tokens_in: int = 0
    targets_in: int = 0
    tokens_cut: int = 0
    n_cut: int = 0
    changes: Counter[str] = field(default_factory=Counter)  # to the messages, see messages.conversation
    rows_dropped: Counter[str] = field(default_factory=Counter)  # reasons, where other rows of the record are kept


class Encoder:
    """Encodes records; one in each worker process."""

    def __init__(self, config: Config):
        self.max_length, self.how = config.max_length, config.truncate
        self.template = load_template(config)

    def __call__(self, raw: Raw) -> Encoded:
        out = Encoded(raw.file, raw.line)
        try:
            sample = understand(raw)
            if self.template.name == "text":
                if not isinstance(sample.get("text"), str):
                    raise BadSample('no "text"')
                rows = [self.template.text_row(sample["text"])]
            else:
                messages, out.changes = conversation(sample)
                if messages[0]["role"] == "system" and not self.template.has_system:
                    out.changes[SYSTEM_MERGED] += 1
                rows = self.template.rows(messages)
            out.tokens_in = sum(len(row.input_ids) for row in rows)
            out.targets_in = sum(row.n_target for row in rows)
            for row in rows:
                try:
                    kept = truncate(row, self.max_length, self.how)
                except BadSample as reason:
                    out.rows_dropped[str(reason)] += 1
                    continue
                out.tokens_cut += len(row.input_ids) - len(kept.input_ids)
                out.n_cut += len(kept.input_ids) < len(row.input_ids)
                out.rows.append((np.array(kept.input_ids, np.int32), np.array(kept.labels, np.int32)))
            if not out.rows:
                raise BadSample(next(iter(out.rows_dropped)))
        except BadSample as reason:
            out.dropped = str(reason)
            out.rows_dropped.clear()
            out.changes.clear()
        return out


_encoder: Encoder | None = None


def _start_worker(config: Config) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(config)


def _encode_chunk(chunk: list[Raw]) -> list[Encoded]:
    assert _encoder is not None
    done = []
    for raw in chunk:
        try:
            done.append(_encoder(raw))
        except Exception as error:
            raise RuntimeError(f"{raw.file}:{raw.line}: encoding failed: {error!r}") from error
    return done


def _chunks(files: list[Path]) -> Iterator[list[Raw]]:
    chunk, size = [], 0
    for file in files:
        for raw in read(file):
            chunk.append(raw)
            size += len(raw.value) if isinstance(raw.value, bytes) else len(str(raw.value))
            if size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def encode(files: list[Path], config: Config, processes: int) -> Iterator[Encoded]:
    """Encode every record of the files, in order, with a bounded number of chunks in flight."""
    if processes == 1:
        _start_worker(config)
        for chunk in _chunks(files):
            yield from _encode_chunk(chunk)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (config,)) as pool:
        waiting: deque[Future[list[Encoded]]] = deque()
        try:
            for chunk in _chunks(files):
                waiting.append(pool.submit(_encode_chunk, chunk))
                if len(waiting) > 2 * processes:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise RuntimeError("a tokenize process died (out of memory?); try a smaller num_proc") from error
        finally:
            pool.shutdown(cancel_futures=True)
