"""Raw files -> one Arrow table of token ids, with a manifest that accounts for every sample.

1. encode   every record of every file -> shards of rows in a cache, by several processes     shards.py
2. mix      rows held out by content; long rows chosen by datanum + all short rows, in one seeded order
3. write    Arrow, manifest.json, dropped.jsonl, and the same in eval/ for what is held out; moved into place when whole

Only 1 costs time, and nothing of it is repeated: neither after a run that was killed nor when another mix is wanted.
What is written depends on files and settings alone, not on processes, interruptions or the cache.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from longalign.data.ledger import Ledger
from longalign.data.messages import expand
from longalign.data.parallel import count_processes
from longalign.data.shards import Shard, encode_files, settings_hash, sweep
from longalign.data.table import Rows, write_arrow
from longalign.data.template import Template
from longalign.errors import UserError
from longalign.files import disk_errors, fresh_folder, require_disk, versions, write_json
from longalign.model.load import load_config, load_template, template_settings, tokenizer_hash
from longalign.model.original import cache
from longalign.schema import Config

TABLE = ("manifest.json", "dataset_info.json", "state.json", "data-*.arrow")
OURS = (*TABLE, "dropped.jsonl", "eval", "plans", "stats")
TOKENS_PER_BYTE = 0.25  # of raw text; a token is 8 bytes, its id and its label


# -- 1. encode ------------------------------------------------------------------------------------------


def stem(file: str) -> str:
    """'data/raw/long.jsonl.gz' -> 'long'."""
    return Path(file).name.split(".json")[0].removesuffix(".parquet")


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


def encode(config: Config, files: dict[bool, list[Path]], template: Template, hashed: str) -> dict[Path, list[Shard]]:
    """The shards of every file, long ones first; those that the cache has are not made again. Raises UserError."""
    processes = count_processes(config, chain(*files.values()))
    settings = template_settings(config)["chat_template_kwargs"]
    folder = cache() / "tokens" / settings_hash(template, hashed, settings, config.max_length, config.truncate)
    with disk_errors(folder, "LONGALIGN_CACHE"):
        folder.mkdir(parents=True, exist_ok=True)
        room = TOKENS_PER_BYTE * 8 * total_bytes(files) - sum(path.stat().st_size for path in folder.iterdir())
        require_disk(folder, room, "LONGALIGN_CACHE")
        group = list(chain(*files.values()))
        shards = encode_files(group, folder, template, config.max_length, config.truncate, processes)
        sweep(folder.parent)
    return shards


# -- 2. mix ---------------------------------------------------------------------------------------------


def choose(n_long: int, n_short: int, wanted: int | None, seed: int, shuffle: bool = True) -> np.ndarray:
    """The mixed order of `wanted` long rows (all if None) and every short row: numbers < n_long are long rows.

    The long rows of a smaller datanum are among those of a larger one. Without shuffle: file order, long first.
    """
    rng = np.random.default_rng(seed)
    mixed = np.concatenate([np.sort(rng.permutation(n_long)[:wanted]), n_long + np.arange(n_short)])
    return mixed[rng.permutation(len(mixed))] if shuffle else mixed


def held_out(content: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which rows are held out: a fair draw from what each says (uint64 hashes), and from nothing else but the seed."""
    mixed = content ^ np.random.default_rng(seed).integers(2**64, dtype=np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):  # splitmix64's finalizer
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed >> np.uint64(11)) * 2.0**-53 < fraction


def split(config: Config, rows: Rows, n_long: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the training table and of the held-out one; the first n_long rows are of long files."""
    outside = held_out(rows.content, config.eval_fraction, config.seed)
    rest = np.flatnonzero(~outside)
    of_long = int(np.searchsorted(rest, n_long))
    order = choose(of_long, len(rest) - of_long, config.datanum.n_long, config.seed, config.shuffle)
    return rest[order], np.flatnonzero(outside)


# -- 3. write -------------------------------------------------------------------------------------------


def add_kept(ledgers: dict[str, Ledger], rows: Rows, order: np.ndarray, n_held_out: np.ndarray) -> dict[str, Ledger]:
    """The ledgers with what stands in a table. n_held_out: rows of each source that are held out from it."""
    of_row = rows.source[order]
    tokens, targets = (np.bincount(rows.source, of, len(ledgers)) for of in (rows.length, rows.n_target))
    done = {}
    for number, (source, ledger) in enumerate(ledgers.items()):
        mine = order[of_row == number]
        tokens_kept, kept = (int(of[mine].sum(dtype=np.int64)) for of in (rows.length, rows.n_target))
        done[source] = replace(
            ledger,
            rows_kept=len(mine),
            rows_held_out=int(n_held_out[number]),
            rows_not_chosen=ledger.rows - len(mine) - int(n_held_out[number]),
            tokens_elsewhere=int(tokens[number]) - tokens_kept,
            tokens_kept=tokens_kept,
            targets_elsewhere=int(targets[number]) - kept,
            targets_kept=kept,
        )
    return done


def tokenize(config: Config) -> dict[str, Any]:
    """Run the command; returns the manifest. Raises UserError for missing files, folders in the way, no room."""
    files = sources(config)
    assert config.output_dir is not None
    output = Path(config.output_dir)
    require_disk(output, TOKENS_PER_BYTE * 8 * total_bytes(files), "output_dir")
    with fresh_folder(output, OURS, config.overwrite) as folder:
        template = load_template(config)
        hashed = tokenizer_hash(template.tokenizer)
        shards = encode(config, files, template, hashed)
        ledgers = {stem(str(file)): Ledger() for file in shards}
        with open(folder / "dropped.jsonl", "w", encoding="utf-8") as dropped:
            for file, of_file in shards.items():
                for shard in of_file:
                    about = shard.about()
                    ledgers[stem(str(file))].add_counts(about["ledger"])
                    for line, reason, rest_kept in about["left_out"]:
                        entry = {"file": str(file), "line": shard.first_line + line, "reason": reason}
                        dropped.write(json.dumps({**entry, "rest_kept": rest_kept}, ensure_ascii=False) + "\n")
        rows = Rows.of({stem(str(file)): of_file for file, of_file in shards.items()})
        n_long = sum(ledgers[stem(str(file))].rows for file in files[True])
        order, outside = split(config, rows, n_long)
        if not len(order) and not (config.eval_fraction == 1 and len(outside)):
            reasons = sum((ledger.dropped for ledger in ledgers.values()), Counter())
            if len(outside):
                reasons[f"held out by eval_fraction={config.eval_fraction}"] = len(outside)
            said = ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common(5)) or "the files are empty"
            raise UserError(f"no sample is left to train on: {said}")

        def table(where: Path, order: np.ndarray, n_held_out: np.ndarray) -> dict[str, Any]:
            kept = add_kept(ledgers, rows, order, n_held_out)
            manifest = {
                "fingerprint": write_arrow(where, rows, order),
                "samples": len(order),
                "long_samples": int((order < n_long).sum()),
                "tokens": sum(ledger.tokens_kept for ledger in kept.values()),
                "targets": sum(ledger.targets_kept for ledger in kept.values()),
                "longest": int(rows.length[order].max(initial=0)),
                "tokenizer": config.model.tokenizer,
                "tokenizer_hash": hashed,
                **template_settings(config),
                "max_length": config.max_length,
                "truncate": config.truncate,
                "datanum": config.datanum.model_dump(),
                "eval_fraction": config.eval_fraction,
                "seed": config.seed,
                "files": {str(f): f.stat().st_size for f in shards},
                "model_shape": load_config(config, shape_only=True),
                "versions": versions("transformers", "tokenizers", "datasets"),
                "ledger": {source: ledger.as_dict() for source, ledger in kept.items()},
            }
            write_json(where / "manifest.json", manifest)
            return manifest

        if config.eval_fraction:
            (folder / "eval").mkdir()
            table(folder / "eval", outside, np.zeros(len(ledgers), int))
        return table(folder, order, np.bincount(rows.source[outside], minlength=len(ledgers)))
