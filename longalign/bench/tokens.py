"""Tokenised folders for measuring: given lengths, tokens of no meaning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import DatasetInfo

from longalign.data.table import FEATURES, ROWS_PER_BATCH, SCHEMA
from longalign.data.template import IGNORE
from longalign.files import fresh_folder, write_json

Lists = tuple[pa.ListArray, pa.ListArray]  # input_ids and labels of some rows


def write_folder(
    folder: Path, length: np.ndarray, n_target: np.ndarray, tokens: Callable[[slice], Lists], manifest: dict[str, Any]
) -> None:
    """A tokenised folder in batches as tokenize writes them. tokens(rows): of the samples of these places.

    manifest: must tell `fingerprint` and `model_shape`. Whole or absent. Raises UserError if it holds something.
    """
    with fresh_folder(folder, (), overwrite=False) as partial:
        name = "data-00000-of-00001.arrow"
        with pa.ipc.new_stream(str(partial / name), SCHEMA) as writer:
            for start in range(0, len(length), ROWS_PER_BATCH):
                rows = slice(start, start + ROWS_PER_BATCH)
                size = length[rows]
                source = pa.array(np.where(size < 8192, "sharegpt", "LongAlign-10k"))
                ids = np.arange(start, start + len(size))
                columns = [*tokens(rows), size, n_target[rows], source, ids + 1, ids]
                arrays = [pa.array(c).cast(f.type) for c, f in zip(columns, SCHEMA, strict=True)]
                writer.write_batch(pa.record_batch(arrays, SCHEMA))
        DatasetInfo(features=FEATURES).write_to_directory(str(partial))
        state = {"_data_files": [{"filename": name}], "_fingerprint": manifest["fingerprint"], "_split": None}
        state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
        write_json(partial / "state.json", state)
        write_json(partial / "manifest.json", manifest)


def write_random(folder: Path, length: np.ndarray, n_target: np.ndarray, vocab: int, seed: int) -> None:
    """Samples of random ids below `vocab`, of which the last n_target are learned."""
    rng = np.random.default_rng(seed)

    def tokens(rows: slice) -> Lists:
        offsets = np.concatenate([[0], np.cumsum(length[rows])]).astype(np.int32)
        ids = rng.integers(0, vocab, offsets[-1], dtype=np.int32)
        before_end = np.repeat(offsets[1:], length[rows]) - np.arange(offsets[-1])
        labels = np.where(before_end <= np.repeat(n_target[rows], length[rows]), ids, IGNORE).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, ids), pa.ListArray.from_arrays(offsets, labels)

    told: dict[str, Any] = {
        "fingerprint": f"random-{seed}-{vocab}-{len(length)}-{length.sum()}-{n_target.sum()}",
        "model_shape": None,
        "tokenizer": "none, ids are random",
        "tokenizer_hash": None,
        "samples": len(length),
        "tokens": int(length.sum()),
        "targets": int(n_target.sum()),
        "max_length": int(length.max()),
        "truncate": "error",  # nothing was cut, and nothing else is told of sources
        "ledger": {},
    }
    write_folder(folder, length, n_target, tokens, told)
