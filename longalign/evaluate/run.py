"""The eval command: every chosen task on one model, results.json, tables and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longalign.errors import UserError
from longalign.evaluate import needle
from longalign.evaluate.generate import Generator
from longalign.evaluate.report import needle_heatmap, needle_table
from longalign.files import disk_errors, versions, write_json, write_text
from longalign.model.load import load_config
from longalign.progress import console
from longalign.schema import Config


def run(config: Config, dry_run: bool) -> int:
    """Returns 0. Raises UserError for a model or folder that cannot be used."""
    output, task = Path(config.output_dir or ""), config.task.needle
    if task is None:
        raise UserError("task=[] asks nothing; one of: needle")
    if dry_run:
        load_config(config)
        total = len(task.lengths) * len(task.depths) * task.documents * (1 + task.without_document)
        tokens = sum(task.lengths) * len(task.depths) * task.documents
        console.print(f"needle: {total:,} questions, {tokens:,} prompt tokens -> {output}")
        return 0
    generator = Generator(config)
    with disk_errors(output, "output_dir"):
        output.mkdir(parents=True, exist_ok=True)
        results: dict[str, Any] = {
            "model": config.model.path,
            "template": generator.template.name,
            "seed": config.seed,
            "temperature": config.temperature,
            "versions": versions("transformers", "torch"),
            "tasks": {},
        }
        summary, rows = needle.run(task, generator, config.seed)
        results["tasks"]["needle"] = {"settings": task.model_dump(), **summary}
        write_text(output / "needle.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        needle_heatmap(summary, output / "needle.png", Path(config.model.path).name)
        console.print(needle_table(summary))
        write_json(output / "results.json", results)
    console.print(f"written to {output}")
    return 0
