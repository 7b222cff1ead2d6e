"""Documents of your own as text for continued training (template=text): `prepare source=text`."""

from __future__ import annotations

import json
import random
from pathlib import Path

from longalign.data.documents import Unreadable, read_document
from longalign.data.long_tasks import documents_of
from longalign.errors import UserError
from longalign.files import disk_errors, versions, whole_file, write_json
from longalign.model.load import load_tokenizer
from longalign.progress import Bar
from longalign.schema import Config, Text


def outputs(config: Config) -> Path:
    """Raises UserError if it is there already."""
    path = Path(config.output_dir or "") / "text.jsonl"
    if path.exists() and not config.overwrite:
        raise UserError(f"{path} exists already; overwrite=true replaces it")
    return path


def describe(config: Config, source: Text) -> list[str]:
    files = documents_of(source.documents)
    return [f"read {len(files):,} documents of {source.documents}", f"write {outputs(config)}"]


def prepare(config: Config, source: Text) -> list[str]:
    """Write text.jsonl: documents in a seeded order, until source.tokens are reached. Raises UserError."""
    files, path = documents_of(source.documents), outputs(config)
    tokenizer = load_tokenizer(config)
    random.Random(f"text {config.seed}").shuffle(files)
    tokens = count = 0
    dropped: list[dict[str, str]] = []
    with disk_errors(path, "output_dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as out, Bar("prepare", len(files), "documents") as bar:
            for file in files:
                if source.tokens and tokens >= source.tokens:
                    break
                bar.advance(1)
                try:
                    text = read_document(file)
                    if not text:
                        raise Unreadable("empty")
                except Unreadable as error:
                    dropped.append({"file": str(file), "reason": str(error)})
                    continue
                tokens, count = tokens + len(tokenizer(text)["input_ids"]), count + 1
                out.write(json.dumps({"text": text, "id": file.stem}, ensure_ascii=False) + "\n")
            if not count:  # and nothing is in place
                raise UserError(
                    f"source.documents={source.documents}: no document can be read ({dropped[0]['reason']})"
                )
        about = {"source": source.model_dump(), "seed": config.seed, "documents": count, "tokens": tokens}
        write_json(path.with_suffix(".json"), {**about, "left_out": dropped, "versions": versions()})
    told = [f"{path}: {count:,} documents, {tokens:,} tokens"]
    return told + [f"left out: {row['file']}: {row['reason']}" for row in dropped]
