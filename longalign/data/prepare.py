"""Raw conversations: of others (data/sources), made from documents (data/self_instruct), or seeded ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from longalign.data.synthetic import base_texts, conversations
from longalign.errors import UserError
from longalign.files import disk_errors, write_json, write_text
from longalign.schema import Config, LongTasks, OwnAnswers, Packages, SelfInstruct, Synthetic, Text


def _parts(source: Synthetic, seed: int) -> dict[str, Iterator[dict[str, Any]]]:
    """File name -> its samples. Train and test share no fact."""
    lengths = (source.min_tokens, source.max_tokens)
    parts = {
        "long": (source.long, conversations("long", "train", source.long, seed, *lengths)),
        "short": (source.short, conversations("short", "train", source.short, seed)),
        "test": (source.test, conversations("long", "test", source.test, seed, *lengths)),
        "text": (source.text_tokens, base_texts(source.text_tokens, seed, source.max_tokens)),
    }
    return {f"{name}.jsonl": samples for name, (amount, samples) in parts.items() if amount}


def _module(source: Any) -> Any:
    """Of a source that is not synthetic. Imported when needed: most bring torch along, which takes seconds."""
    names: dict[type, str] = {
        SelfInstruct: "self_instruct.generate",
        Packages: "sources.packages",
        LongTasks: "long_tasks",
        Text: "texts",
        OwnAnswers: "own_answers",
    }
    return import_module(f"longalign.data.{names.get(type(source), 'sources.convert')}")


def describe(config: Config) -> list[str]:
    """What would be read and written. Raises UserError for what cannot be read."""
    if isinstance(config.source, Synthetic):
        return [f"{config.output_dir}/{name}, seed {config.seed}" for name in _parts(config.source, config.seed)]
    return list(_module(config.source).describe(config, config.source))


def prepare(config: Config) -> list[str]:
    """Write the files of config.source; returns what to tell about them. Raises UserError."""
    if isinstance(config.source, Synthetic):
        return [f"{file}: {count:,} samples" for file, count in synthetic(config, config.source).items()]
    return list(_module(config.source).prepare(config, config.source))


def synthetic(config: Config, source: Synthetic) -> dict[str, int]:
    """Write one JSONL file a part and a manifest; returns how many samples each file got. Raises UserError."""
    counts: dict[str, int] = {}
    output = Path(config.output_dir or "")
    parts = _parts(source, config.seed)
    for name in parts:
        if (output / name).exists() and not config.overwrite:
            raise UserError(f"{output / name} exists already; overwrite=true replaces it")
    with disk_errors(output, "output_dir"):
        output.mkdir(parents=True, exist_ok=True)  # it may hold other raw data, which stays
        for name, samples in parts.items():
            lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
            write_text(output / name, "".join(lines))
            counts[str(output / name)] = len(lines)
        manifest = {"source": source.model_dump(), "seed": config.seed, "samples": counts}
        write_json(output / "synthetic.json", manifest)
    return counts
