"""Raw conversations: source=synthetic writes seeded ones, for the demo, the tests and the bundled model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longalign.data.synthetic import base_texts, conversations
from longalign.files import fresh_folder, write_json
from longalign.schema import Config


def _parts(config: Config) -> dict[str, tuple[int, Iterator[dict[str, Any]]]]:
    """File name -> (number of samples, the samples). Train and test share no fact."""
    source, seed = config.source, config.seed
    lengths = (source.min_tokens, source.max_tokens)
    parts = {
        "long.jsonl": (source.long, conversations("long", "train", source.long, seed, *lengths)),
        "short.jsonl": (source.short, conversations("short", "train", source.short, seed)),
        "test.jsonl": (source.test, conversations("long", "test", source.test, seed, *lengths)),
        "text.jsonl": (source.text, base_texts(source.text, seed, source.max_tokens)),
    }
    return {name: part for name, part in parts.items() if part[0]}


def describe(config: Config) -> list[str]:
    return [f"{config.output_dir}/{name}: {n:,} samples, seed {config.seed}" for name, (n, _) in _parts(config).items()]


def prepare_synthetic(config: Config) -> dict[str, int]:
    """Write one JSONL file a part and a manifest; returns how many samples each file got. Raises UserError."""
    counts: dict[str, int] = {}
    output = Path(config.output_dir or "")
    with fresh_folder(output, "manifest.json", config.overwrite) as folder:
        for name, (_, samples) in _parts(config).items():
            with open(folder / name, "w", encoding="utf-8") as file:
                for sample in samples:
                    file.write(json.dumps(sample, ensure_ascii=False) + "\n")
                    counts[name] = counts.get(name, 0) + 1
        write_json(folder / "manifest.json", {"source": config.source.model_dump(), "seed": config.seed, "samples": counts})
    return {str(output / name): n for name, n in counts.items()}
