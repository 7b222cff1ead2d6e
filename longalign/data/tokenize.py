"""Raw files -> one Arrow table of token ids, with a manifest that accounts for every sample.

1. encode   every record of every file -> rows (input_ids, labels), by several processes, in file order
2. mix      long rows chosen by datanum + all short rows, in one seeded order
3. write    Arrow, manifest.json, dropped.jsonl; moved into place when whole
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, List, Value

from longalign.data.encode import Encoded, Encoder
from longalign.data.messages import expand, read
from longalign.data.parallel import count_processes, each
from longalign.errors import UserError
from longalign.files import fresh_folder, require_disk, versions, write_json
from longalign.model.load import load_config, load_tokenizer, template_settings, tokenizer_hash
from longalign.progress import Bar
from longalign.schema import Config

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
ROWS_PER_BATCH = 64
OURS = ("manifest.json", "dropped.jsonl", "dataset_info.json", "state.json", "data-*.arrow", "plans", "stats")


# -- 2. mix ---------------------------------------------------------------------------------------------


class Stage:
    """Encoded rows of one kind (long or short) in a temporary Arrow file, read back by row number."""

    def __init__(self, path: Path):
        self.path, self.count = path, 0
        self.schema = pa.schema([SCHEMA.field(n) for n in SCHEMA.names if n != "sample_id"])
        self.writer = pa.ipc.new_stream(str(path), self.schema)
        self.rows: list[tuple[Any, ...]] = []

    def add(self, encoded: Encoded) -> None:
        source = stem(encoded.file)
        for ids, labels in encoded.rows:
            n_target = int((labels != -100).sum())
            self.rows.append((ids, labels, len(ids), n_target, source, encoded.line))
            self.count += 1
        if len(self.rows) >= ROWS_PER_BATCH:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            columns = zip(*self.rows, strict=True)
            arrays = [pa.array(list(c), f.type) for c, f in zip(columns, self.schema, strict=True)]
            self.writer.write_batch(pa.record_batch(arrays, self.schema))
            self.rows = []

    def open(self) -> None:
        self.flush()
        self.writer.close()
        self.batches = pa.ipc.open_stream(pa.memory_map(str(self.path))).read_all().to_batches()
        self.ends = list(accumulate(len(b) for b in self.batches))

    def row(self, number: int) -> pa.RecordBatch:
        place = bisect_right(self.ends, number)
        start = self.ends[place - 1] if place else 0
        return self.batches[place].slice(number - start, 1)


def stem(file: str) -> str:
    """'data/raw/long.jsonl.gz' -> 'long'."""
    return Path(file).name.split(".json")[0].removesuffix(".parquet")


def choose(n_long: int, n_short: int, wanted: int | None, seed: int, shuffle: bool = True) -> list[tuple[bool, int]]:
    """The mixed order: (is_long, row) of `wanted` long rows (all if None) and every short row.

    The long rows of a smaller datanum are among those of a larger one. Without shuffle: file order, long first.
    """
    rng = np.random.default_rng(seed)
    long_rows = np.sort(rng.permutation(n_long)[:wanted])
    mixed = [(True, int(i)) for i in long_rows] + [(False, i) for i in range(n_short)]
    return [mixed[i] for i in rng.permutation(len(mixed))] if shuffle else mixed


# -- 3. write -------------------------------------------------------------------------------------------


def write_arrow(folder: Path, order: Iterable[tuple[bool, int]], stages: dict[bool, Stage]) -> str:
    """Write the folder that `datasets.load_from_disk` reads; return a fingerprint of its rows."""
    name, digest = "data-00000-of-00001.arrow", hashlib.sha256()
    with pa.ipc.new_stream(str(folder / name), SCHEMA) as writer:
        waiting: list[pa.RecordBatch] = []

        def flush(first_id: int) -> None:
            table = pa.Table.from_batches(waiting).combine_chunks()
            ids = pa.array(range(first_id, first_id + len(table)), pa.int64())
            table = table.append_column(SCHEMA.field("sample_id"), ids).cast(SCHEMA)
            for column in ("input_ids", "labels"):
                values = table[column].combine_chunks()
                digest.update(values.value_lengths().to_numpy().tobytes())
                digest.update(values.flatten().to_numpy().tobytes())
            writer.write_table(table)
            waiting.clear()

        first = 0
        for number, (is_long, row) in enumerate(order, start=1):
            waiting.append(stages[is_long].row(row))
            if len(waiting) == ROWS_PER_BATCH:
                flush(first)
                first = number
        if waiting:
            flush(first)
    fingerprint = digest.hexdigest()[:16]
    DatasetInfo(features=FEATURES).write_to_directory(str(folder))
    state: dict[str, Any] = {"_data_files": [{"filename": name}], "_fingerprint": fingerprint, "_split": None}
    state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
    write_json(folder / "state.json", state)
    return fingerprint


@dataclass
class Ledger:
    """What went in, what was kept and why the rest was not, for one source."""

    samples_in: int = 0
    rows: int = 0  # a template that rewrites earlier turns gives one row per assistant turn
    rows_not_chosen: int = 0  # by datanum
    rows_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    changes: Counter[str] = field(default_factory=Counter)  # to the messages of kept samples
    tokens_in: int = 0
    tokens_cut: int = 0
    tokens_kept: int = 0
    targets_in: int = 0
    targets_kept: int = 0

    def add(self, encoded: Encoded) -> None:
        self.samples_in += 1
        self.rows += len(encoded.rows)
        self.tokens_in += encoded.tokens_in
        self.targets_in += encoded.targets_in
        self.tokens_cut += encoded.tokens_cut
        self.truncated += encoded.n_cut
        self.changes += encoded.changes
        for reason, n in encoded.rows_dropped.items():
            self.dropped[f"{reason} (one turn of several)"] += n
        if encoded.dropped:
            self.dropped[encoded.dropped] += 1

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "dropped": dict(self.dropped.most_common()), "changes": dict(self.changes)}


def sources(config: Config) -> dict[bool, list[Path]]:
    """The files of the long (True) and short (False) source. Raises UserError if one is missing or both null."""
    files = {
        True: expand(config.long_file, "long_file") if config.datanum.n_long != 0 else [],
        False: expand(config.short_file, "short_file"),
    }
    stems = [stem(str(file)) for group in files.values() for file in group]
    if twice := [name for name in stems if stems.count(name) > 1]:
        raise UserError(f"two files are named {twice[0]}: samples are told apart by file name and line; rename one")
    if not files[True] and not files[False]:
        raise UserError("nothing to tokenize: long_file and short_file are both null")
    return files


def total_bytes(files: dict[bool, list[Path]]) -> int:
    return sum(f.stat().st_size for group in files.values() for f in group)


def tokenize(config: Config) -> dict[str, Any]:
    """Run the command; returns the manifest. Raises UserError for missing files, folders in the way, no room."""
    files = sources(config)
    assert config.output_dir is not None
    output = Path(config.output_dir)
    processes = count_processes(config, chain(*files.values()))
    require_disk(output, 4.0 * total_bytes(files), "output_dir")  # 2 x int32 a token of ~4 bytes, staged and final
    tokenizer = load_tokenizer(config)
    ledgers = {stem(str(file)): Ledger() for group in files.values() for file in group}

    with fresh_folder(output, OURS, config.overwrite) as folder:
        stages = {is_long: Stage(folder / f"stage-{is_long}.arrow") for is_long in (True, False)}
        with open(folder / "dropped.jsonl", "w", encoding="utf-8") as dropped:
            for is_long, group in files.items():
                title = f"tokenize {'long' if is_long else 'short'} ({processes} proc.)"
                with Bar(title, None, "samples") as bar:
                    for encoded in each(Encoder, config, chain.from_iterable(map(read, group)), processes):
                        _account(encoded, ledgers, stages[is_long], dropped, config)
                        bar.advance(1)
        for stage in stages.values():
            stage.open()
        counts = stages[True].count, stages[False].count
        order = choose(*counts, config.datanum.n_long, config.seed, config.shuffle)
        if not order:
            reasons = sum((ledger.dropped for ledger in ledgers.values()), Counter())
            said = ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common(5)) or "the files are empty"
            raise UserError(f"no sample is left to train on: {said}")
        fingerprint = write_arrow(folder, order, stages)
        for stage in stages.values():
            del stage.batches
            stage.path.unlink()
        table = Dataset.from_file(str(folder / "data-00000-of-00001.arrow"))
        _account_kept(table, ledgers)
        manifest = {
            "fingerprint": fingerprint,
            "samples": len(order),
            "long_samples": sum(is_long for is_long, _ in order),
            "tokens": sum(ledger.tokens_kept for ledger in ledgers.values()),
            "targets": sum(ledger.targets_kept for ledger in ledgers.values()),
            "longest": int(np.max(table.with_format("numpy")["length"])),
            "tokenizer": config.model.tokenizer,
            "tokenizer_hash": tokenizer_hash(tokenizer),
            **template_settings(config),
            "max_length": config.max_length,
            "truncate": config.truncate,
            "datanum": config.datanum.model_dump(),
            "seed": config.seed,
            "files": {str(f): f.stat().st_size for group in files.values() for f in group},
            "model_shape": load_config(config, shape_only=True),
            "versions": versions("transformers", "tokenizers", "datasets"),
            "ledger": {source: ledger.as_dict() for source, ledger in ledgers.items()},
        }
        write_json(folder / "manifest.json", manifest)
    return manifest


def _account(encoded: Encoded, ledgers: dict[str, Ledger], stage: Stage, dropped: Any, config: Config) -> None:
    ledgers[stem(encoded.file)].add(encoded)
    if encoded.dropped == "too long" and config.truncate == "error":
        raise UserError(
            f"{encoded.file}:{encoded.line} has {encoded.tokens_in} tokens, max_length={config.max_length}; "
            "raise max_length or choose truncate=right, middle or drop"
        )
    reasons = [encoded.dropped] if encoded.dropped else [change for change in encoded.changes if "left out" in change]
    for reason in reasons:
        entry = {"file": encoded.file, "line": encoded.line, "reason": reason, "rest_kept": not encoded.dropped}
        dropped.write(json.dumps(entry, ensure_ascii=False) + "\n")
    stage.add(encoded)


def _account_kept(table: Dataset, ledgers: dict[str, Ledger]) -> None:
    """Count what stands in the final table, from the table itself."""
    columns = table.select_columns(["source", "length", "n_target"]).with_format("numpy")[:]
    for source, ledger in ledgers.items():
        mine = np.asarray(columns["source"]) == source
        ledger.rows_kept = int(mine.sum())
        ledger.rows_not_chosen = ledger.rows - ledger.rows_kept
        ledger.tokens_kept = int(columns["length"][mine].sum())
        ledger.targets_kept = int(columns["n_target"][mine].sum())
