"""Raw conversations: source=synthetic writes seeded ones, for the demo, the tests and the bundled model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longalign.data.synthetic import base_texts, conversations
from longalign.errors import UserError
from longalign.files import disk_errors, write_json, write_text
from longalign.schema import Config, Synthetic


def _parts(config: Config) -> dict[str, Iterator[dict[str, Any]]]:
    """File name -> its samples. Train and test share no fact."""
    source, seed = config.source, config.seed
    assert isinstance(source, Synthetic)
    lengths = (source.min_tokens, source.max_tokens)
    parts = {
        "long": (source.long, conversations("long", "train", source.long, seed, *lengths)),
        "short": (source.short, conversations("short", "train", source.short, seed)),
        "test": (source.test, conversations("long", "test", source.test, seed, *lengths)),
        "text": (source.text_tokens, base_texts(source.text_tokens, seed, source.max_tokens)),
    }
    return {f"{name}.jsonl": samples for name, (amount, samples) in parts.items() if amount}


def describe(config: Config) -> list[str]:
    return [f"{config.output_dir}/{name}, seed {config.seed}" for name in _parts(config)]


def prepare_synthetic(config: Config) -> dict[str, int]:
    """Write one JSONL file a part and a manifest; returns how many samples each file got. Raises UserError."""
    counts: dict[str, int] = {}
    output = Path(config.output_dir or "")
    parts = _parts(config)
    for name in parts:
        if (output / name).exists() and not config.overwrite:
            raise UserError(f"{output / name} exists already; overwrite=true replaces it")
    with disk_errors(output, "output_dir"):
        output.mkdir(parents=True, exist_ok=True)  # it may hold other raw data, which stays
        for name, samples in parts.items():
            lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
            write_text(output / name, "".join(lines))
            counts[str(output / name)] = len(lines)
        manifest = {"source": config.source.model_dump(), "seed": config.seed, "samples": counts}
        write_json(output / "synthetic.json", manifest)
    return counts
