"""What `results.py --smoke` changes: every command at toy size, the bundled model, packages made of this repository."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

WORDS = {  # behind the words of a command, or of `prepare source=`; "model" behind all that are no `prepare`
    "packages": ["source.min_tokens=200", "source.max_tokens=1500", "model=tiny"],
    "long_tasks": ["source.samples=14", "model=tiny"],
    "text": ["model=tiny"],
    "own_answers": ["model=tiny", "cluster=cpu", "source.samples=48", "source.max_new_tokens=64"],
    "model": ["model=tiny", "cluster=cpu", "max_length=2560"],
    "train": ["activations=none", "lr=1e-3"],
    "eval": [
        "generation.context=2560",
        "task.needle.lengths=[1024,2048]",
        "task.needle.depths=[0,1]",
        "task.needle.documents=1",
        "task.retrieval.lengths=[1024,2048]",
        "task.retrieval.kinds=[single_key,multi_value]",
        "task.retrieval.samples=1",
        "task.needle.max_new_tokens=8",
        "task.retrieval.max_new_tokens=8",
    ],
    "verify": ["verify.tokens=300", "verify.packs=1"],
    "bench": [
        "bench.packs=[1x512,4x128]",
        "bench.warm_up=1",
        "bench.repeat=1",
        "bench.activations=[none]",
        "bench.steps=null",
    ],
    "chat": ["max_new_tokens=16"],
}


def enter(folder: Path, root: Path, wheels: tuple[Path, Path]) -> Path:
    """Work in `folder` from here on, with half of this repository's pages in each wheel. The model to take."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    pages = sorted((root / "docs").glob("*.md"))
    for number, wheel in enumerate(wheels):
        wheel.mkdir(parents=True, exist_ok=True)
        wheel.with_name("wheels.done").touch()
        name = f"pages{number}"
        with zipfile.ZipFile(wheel / f"{name}-1.0-py3-none-any.whl", "w") as file:
            about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nLicense-Expression: Apache-2.0\n"
            file.writestr(f"{name}-1.0.dist-info/METADATA", about)
            for page in pages[number::2]:
                file.write(page, f"{name}/{page.name}")
    return root / "longalign/assets/tiny"
