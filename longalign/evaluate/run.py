"""The eval command: every chosen task on one model, results.json, tables and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longalign.evaluate import needle
from longalign.evaluate.generate import Generator
from longalign.evaluate.report import needle_heatmap, needle_table
from longalign.files import fresh_folder, versions, write_json
from longalign.progress import console
from longalign.schema import Config


def run(config: Config, dry_run: bool) -> int:
    """Returns 0. Raises UserError for a model or folder that cannot be used."""
    output, task = Path(config.output_dir or ""), config.task.needle
    if dry_run:
        if task:
            cells = len(task.lengths) * len(task.depths)
            total = cells * task.documents * (1 + task.without_document)
            tokens = sum(task.lengths) * len(task.depths) * task.documents
            console.print(f"needle: {total:,} questions, {tokens:,} prompt tokens -> {output}", highlight=False)
        return 0
    generator = Generator(config)
    # A new evaluation of the same model replaces the old one: it can be made again at any time.
    with fresh_folder(output, "results.json", overwrite=True) as folder:
        results: dict[str, Any] = {
            "model": config.model.path,
            "template": generator.template.name,
            "seed": config.seed,
            "temperature": config.temperature,
            "versions": versions("transformers", "torch"),
            "tasks": {},
        }
        if task:
            summary, rows = needle.run(task, generator, config.seed)
            results["tasks"]["needle"] = {"settings": task.model_dump(), **summary}
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / "needle.jsonl").write_text(lines, encoding="utf-8")
            needle_heatmap(summary, folder / "needle.png", Path(config.model.path).name)
            console.print(needle_table(summary))
        write_json(folder / "results.json", results)
    console.print(f"written to {output}", highlight=False)
    return 0
