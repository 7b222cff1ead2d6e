"""The final table: rows gathered from shards, in the order chosen, as the folder that `datasets` loads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import DatasetInfo, Features, List, Value

from longalign.data.shards import Shard
from longalign.files import write_json

FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "length": Value("int32"),
        "n_target": Value("int32"),
        "source": Value("string"),
        "source_line": Value("int64"),
        "sample_id": Value("int64"),
    }
)
SCHEMA = FEATURES.arrow_schema
ROWS_PER_BATCH, TOKENS_PER_BATCH = 64, 1 << 20  # whichever comes first
TOKENS_PER_FILE = 1 << 27  # 1 GiB of ids and labels


@dataclass(frozen=True)
class Rows:
    """Every encoded row, in file order, but for its tokens: arrays of one value a row."""

    shards: list[Shard]
    sources: list[str]  # names
    shard: np.ndarray  # int32, index in `shards`
    number: np.ndarray  # int32, row of that shard
    source: np.ndarray  # int32, index in `sources`
    line: np.ndarray
    content: np.ndarray
    length: np.ndarray
    n_target: np.ndarray

    @classmethod
    def of(cls, shards: dict[str, list[Shard]]) -> Rows:
        """shards: of every source, by its name."""
        flat = [shard for of_source in shards.values() for shard in of_source]
        columns = [shard.columns() for shard in flat]
        counts = [len(column["line"]) for column in columns]
        of_shard = np.repeat(np.arange(len(shards)), [len(of_source) for of_source in shards.values()])
        together = lambda arrays: np.concatenate([np.empty(0, np.int32), *arrays])
        return cls(
            flat,
            list(shards),
            np.repeat(np.arange(len(flat), dtype=np.int32), counts),
            together([np.arange(count, dtype=np.int32) for count in counts]),
            np.repeat(of_shard.astype(np.int32), counts),
            together([column["line"] for column in columns]),
            np.concatenate([np.empty(0, np.uint64), *(column["content"] for column in columns)]),
            together([column["length"] for column in columns]),
            together([column["n_target"] for column in columns]),
        )


def write_arrow(folder: Path, rows: Rows, order: np.ndarray) -> str:
    """Write the rows of these numbers into `folder`; return a fingerprint of their ids and labels."""
    file_of = np.cumsum(rows.length[order], dtype=np.int64) // TOKENS_PER_FILE
    cuts = np.flatnonzero(np.diff(file_of)) + 1
    names = [f"data-{i:05d}-of-{len(cuts) + 1:05d}.arrow" for i in range(len(cuts) + 1)]
    digest, first_id = hashlib.sha256(), 0
    for name, of_file in zip(names, np.split(order, cuts), strict=True):
        with pa.ipc.new_stream(str(folder / name), SCHEMA) as writer:
            for numbers in _batches(rows, of_file):
                batch = _batch(rows, numbers, first_id)
                for column in ("input_ids", "labels"):
                    digest.update(batch[column].value_lengths().to_numpy())
                    digest.update(batch[column].flatten().to_numpy())
                writer.write_batch(batch)
                first_id += len(numbers)
    fingerprint = digest.hexdigest()[:16]
    DatasetInfo(features=FEATURES).write_to_directory(str(folder))
    state: dict[str, Any] = {"_data_files": [{"filename": name} for name in names]}
    state |= {"_fingerprint": fingerprint, "_split": None, "_format_columns": None, "_format_kwargs": {}}
    write_json(folder / "state.json", {**state, "_format_type": None, "_output_all_columns": False})
    return fingerprint


def _batches(rows: Rows, order: np.ndarray) -> Iterator[np.ndarray]:
    start, tokens = 0, 0
    for place, length in enumerate(rows.length[order].tolist(), start=1):
        tokens += length
        if place - start == ROWS_PER_BATCH or tokens >= TOKENS_PER_BATCH or place == len(order):
            yield order[start:place]
            start, tokens = place, 0


def _batch(rows: Rows, numbers: np.ndarray, first_id: int) -> pa.RecordBatch:
    where = zip(rows.shard[numbers].tolist(), rows.number[numbers].tolist(), strict=True)
    input_ids, labels = zip(*(rows.shards[shard].row(number) for shard, number in where), strict=True)
    columns = [
        pa.concat_arrays(input_ids),
        pa.concat_arrays(labels),
        pa.array(rows.length[numbers], pa.int32()),
        pa.array(rows.n_target[numbers], pa.int32()),
        pa.array([rows.sources[source] for source in rows.source[numbers]], pa.string()),
        pa.array(rows.line[numbers], pa.int64()),
        pa.array(np.arange(first_id, first_id + len(numbers)), pa.int64()),
    ]
    return pa.record_batch([column.cast(f.type) for column, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
