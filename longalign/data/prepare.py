"""Raw conversations: source=synthetic writes seeded ones, for the demo, the tests and the bundled model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longalign.data.synthetic import base_texts, conversations
from longalign.files import fresh_folder, write_json
from longalign.schema import Config


def _parts(config: Config) -> dict[str, Iterator[dict[str, Any]]]:
    """File name -> its samples. Train and test share no fact."""
    source, seed = config.source, config.seed
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
    with fresh_folder(output, "manifest.json", config.overwrite) as folder:
        for name, samples in _parts(config).items():
            counts[name] = 0
            with open(folder / name, "w", encoding="utf-8") as file:
                for sample in samples:
                    file.write(json.dumps(sample, ensure_ascii=False) + "\n")
                    counts[name] += 1
        write_json(
            folder / "manifest.json", {"source": config.source.model_dump(), "seed": config.seed, "samples": counts}
        )
    return {str(output / name): n for name, n in counts.items()}
