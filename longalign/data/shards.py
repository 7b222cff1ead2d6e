"""Encoded rows on disk, chunk by chunk: what makes tokenize interruptible, and cheap to repeat.

Input is cut into chunks at borders that depend on the records alone. A worker encodes a chunk and writes its rows as

    LONGALIGN_CACHE/tokens/SETTINGS/CHUNK.arrow

SETTINGS is a hash of all that decides what rows come of a record: tokenizer, template, max_length, truncate, versions
and our own code. CHUNK is a hash of the records. A shard gets its name when it is whole, so whatever is there is used,
by any later run with these settings and records. Nothing depends on the file's name or time: records that changed have
another name, and a file that was moved, or grew, is encoded as far as it is new.

A shard holds `line` (of the record, from the first of its chunk), `content` (content_hash), `length`, `n_target`,
`input_ids`, `labels`, and, as metadata, the chunk's ledger and what was left out of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from longalign.data.encode import Encoded, Encoder
from longalign.data.ledger import Ledger
from longalign.data.messages import Raw, read
from longalign.data.parallel import chunks, context, in_order
from longalign.data.template import Row, Template
from longalign.data.truncate import Truncate
from longalign.files import versions
from longalign.progress import Bar

SCHEMA = pa.schema(
    [
        ("line", pa.int64()),
        ("content", pa.uint64()),
        ("length", pa.int32()),
        ("n_target", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
    ]
)
ABOUT = b"longalign"
CODE = ("messages", "template", "chat_template", "truncate", "words", "encode", "ledger", "shards")
LONG = 2 << 20  # bytes; encoding takes up to 200 times the room of the text, so longer ones are encoded one at a time
KEEP_DAYS = 30  # a shard that no run has used for so long is deleted


def settings_hash(template: Template, tokenizer_hash: str, arguments: dict[str, Any], max_length: int, how: str) -> str:
    """Of all that decides what rows come of a record."""
    tokenizer, code = template.tokenizer, Path(__file__).parent
    settings = {
        "tokenizer": tokenizer_hash,
        "special": [sorted(tokenizer.all_special_tokens), tokenizer.bos_token, tokenizer.eos_token, template.start],
        "split_special_tokens": bool(tokenizer.split_special_tokens),
        "template": [template.name, tokenizer.chat_template if template.jinja else None, arguments],
        "cut": [max_length, how],
        "versions": versions("transformers", "tokenizers"),
        "code": [hashlib.sha256((code / f"{name}.py").read_bytes()).hexdigest() for name in CODE],
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Shard:
    """The rows of one chunk; `first_line` is that of its first record in its file."""

    path: Path
    first_line: int

    def open(self) -> pa.RecordBatchFileReader:
        """Mapped into memory: only what is looked at is read."""
        return pa.ipc.open_file(pa.memory_map(str(self.path)))

    def about(self) -> dict[str, Any]:
        """`ledger` (as_dict) and `left_out`: (line from the chunk's first, reason, whether the rest was kept)."""
        return json.loads(self.open().schema.metadata[ABOUT])

    def columns(self) -> dict[str, np.ndarray]:
        """line (in the file), content, length, n_target of every row."""
        batch = self.open().get_batch(0)
        columns = {name: batch[name].to_numpy().copy() for name in ("content", "length", "n_target")}
        return {"line": batch["line"].to_numpy() + self.first_line, **columns}

    def row(self, number: int) -> tuple[pa.ListArray, pa.ListArray]:
        """(input_ids, labels) of one row, each a list array of length 1."""
        batch = self.open().get_batch(0).slice(number, 1)
        return batch["input_ids"], batch["labels"]

    def is_whole(self) -> bool:
        try:
            return bool(self.about())
        except (OSError, pa.ArrowInvalid, KeyError, ValueError):  # absent, or damaged by a crash of the machine
            return False


@dataclass(frozen=True)
class Task:
    """A chunk of records on its way to a worker."""

    file: str
    first_line: int
    last_line: int
    payload: bytes  # pickled [(line from the first, value)]
    name: str

    @classmethod
    def of(cls, chunk: list[Raw]) -> Task:
        first = chunk[0].line
        payload = pickle.dumps([(raw.line - first, raw.value) for raw in chunk], protocol=5)
        name = hashlib.blake2b(payload, digest_size=16).hexdigest()
        return cls(chunk[0].file, first, chunk[-1].line, payload, name)

    def place(self) -> str:
        return f"{self.file}:{self.first_line}-{self.last_line}"

    def records(self) -> list[Raw]:
        return [Raw(self.file, self.first_line + line, value) for line, value in pickle.loads(self.payload)]


class Writer:
    """Encodes a task and writes its shard; returns the number of records."""

    def __init__(self, folder: Path, template: Template, max_length: int, how: Truncate, alone: Any):
        self.folder, self.encoder, self.alone = folder, Encoder(template, max_length, how), alone

    def __call__(self, task: Task) -> int:
        if len(task.payload) <= LONG:
            return self._write(task)
        with self.alone:
            count = self._write(task)
            with contextlib.suppress(OSError, AttributeError):  # not glibc, which keeps millions of small pieces
                ctypes.CDLL(None).malloc_trim(0)
        return count

    def _write(self, task: Task) -> int:
        done = self.encoder(task.records())
        partial = self.folder / f"{task.name}.partial-{os.getpid()}"
        write(partial, done, task.first_line)
        partial.replace(self.folder / f"{task.name}.arrow")
        return len(done)


def write(path: Path, done: list[Encoded], first_line: int) -> None:
    ledger, left_out = Ledger(), []
    for one in done:
        ledger.add(one)
        reasons = [one.dropped] if one.dropped else [change for change in one.changes if "left out" in change]
        left_out += [(one.line - first_line, reason, not one.dropped) for reason in reasons]
    rows: list[Row] = [row for one in done for row in one.rows]
    lengths = np.array([len(row.ids) for row in rows], np.int32)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    joined = lambda arrays: np.concatenate([np.empty(0, np.int32), *arrays])
    columns = [
        np.array([one.line - first_line for one in done for _ in one.rows], np.int64),
        np.array([one.content for one in done for _ in one.rows], np.uint64),
        lengths,
        np.array([row.n_target for row in rows], np.int32),
        pa.ListArray.from_arrays(offsets, pa.array(joined(row.ids for row in rows))),
        pa.ListArray.from_arrays(offsets, pa.array(joined(row.targets for row in rows))),
    ]
    about = json.dumps({"ledger": ledger.as_dict(), "left_out": left_out}).encode()
    with pa.ipc.new_file(str(path), SCHEMA.with_metadata({ABOUT: about})) as writer:
        writer.write_batch(pa.record_batch(columns, SCHEMA))


def encode_files(
    files: list[Path], folder: Path, template: Template, max_length: int, how: Truncate, processes: int
) -> dict[Path, list[Shard]]:
    """The shards of every file, in order; those that `folder` lacked are made.

    Raises UserError if a file cannot be read or a record is too long for truncate=error.
    """
    shards: dict[Path, list[Shard]] = {file: [] for file in files}
    arguments = (folder, template, max_length, how, context.Lock())
    with Bar(f"tokenize ({processes} proc.)", None, "samples") as bar:

        def missing() -> Iterator[Task]:
            for file in files:
                for chunk in chunks(read(file)):
                    task = Task.of(chunk)
                    shard = Shard(folder / f"{task.name}.arrow", task.first_line)
                    shards[file].append(shard)
                    if shard.is_whole():
                        os.utime(shard.path)  # used today
                        bar.advance(len(chunk))
                    else:
                        yield task

        for count in in_order(Writer, arguments, missing(), processes, Task.place):
            bar.advance(count)
    return shards


def sweep(root: Path) -> None:
    """Delete what no run has used for KEEP_DAYS, and what killed ones left unfinished."""
    for path in root.glob("*/*"):
        with contextlib.suppress(OSError):  # another run may be sweeping, too
            partial = path.name.partition(".partial-")[2]
            unused = time.time() - path.stat().st_mtime > KEEP_DAYS * 86400
            if unused or (partial and not psutil.pid_exists(int(partial))):
                path.unlink()
    for folder in root.glob("*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > KEEP_DAYS * 86400:
                folder.rmdir()  # fails, as it should, where it is not empty
