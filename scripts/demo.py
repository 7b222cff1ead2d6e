"""make demo: the whole pipeline on two cores, by the commands a user would type.

    prepare -> tokenize -> group -> eval (before) -> train (2 processes, packing+weighting) -> eval (after) -> chat

The bundled tiny model already continues a fact whose first words it sees (docs/tiny.md); it has never seen a
question. Training teaches it to answer questions about documents of 256 to 2,048 tokens. Test documents and facts
are not those of training. Leaves runs/demo/summary.json and the heatmaps beside it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
RUNS = Path("runs/demo")
EXPERIMENT = ["experiment=demo"]
console = Console()


def longalign(*words: str) -> float:
    """Run one command as a user would; returns its seconds, or ends the demo with its exit code."""
    console.print(f"\n[bold cyan]$ longalign {' '.join(words)}[/]", highlight=False, soft_wrap=True)
    start = time.monotonic()
    done = subprocess.run([str(Path(sys.executable).with_name("longalign")), *words], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)
    return time.monotonic() - start


def read(path: Path) -> dict:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def main() -> None:
    start = time.monotonic()
    before, train, after = (RUNS / name for name in ("before", "train", "after"))
    longalign("prepare", *EXPERIMENT, "output_dir=data/demo/raw", "overwrite=true")
    longalign("tokenize", *EXPERIMENT, "overwrite=true")
    longalign("group", *EXPERIMENT)
    longalign("eval", *EXPERIMENT, f"output_dir={before}")
    train_seconds = longalign("train", *EXPERIMENT, f"output_dir={train}", "overwrite=true")
    longalign("eval", *EXPERIMENT, f"model.path={train}/model", f"output_dir={after}")

    held_out = json.loads((ROOT / "data/demo/raw/test.jsonl").read_text(encoding="utf-8").splitlines()[0])
    asked, expected = (message["content"] for message in held_out["messages"][:2])
    document, question = asked.rsplit("\n\n", 1)
    (ROOT / RUNS / "document.txt").write_text(document, encoding="utf-8")
    chat = [f"model.path={train}/model", "cluster=cpu", f"file={RUNS}/document.txt", f"prompt={question}"]
    longalign("chat", *chat, "max_new_tokens=32")
    console.print(f"(expected: {expected})", highlight=False)

    old, new = (read(folder / "results.json")["tasks"]["needle"] for folder in (before, after))
    rows = (ROOT / train / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    summary = {
        "score_before": old["score"],
        "score_after": new["score"],
        "score_without_document": new["score_without_document"],
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(time.monotonic() - start, 1),
        "tokens": sum(json.loads(row)["tokens"] for row in rows),
    }
    (ROOT / RUNS / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    table = Table(title="exact match on held-out documents and facts", title_justify="left", box=box.SIMPLE)
    for column in ("prompt tokens", "before", "after"):
        table.add_column(column, justify="right")
    for length, found in new["by_length"].items():
        table.add_row(f"{int(length):,}", f"{old['by_length'][length]['score']:.2f}", f"{found['score']:.2f}")
    table.add_row("all", f"{old['score']:.2f}", f"{new['score']:.2f}")
    table.add_row(
        "without the document", f"{old['score_without_document']:.2f}", f"{new['score_without_document']:.2f}"
    )
    console.print(table)
    console.print(f"heatmaps: {before}/needle.png {after}/needle.png; summary: {RUNS}/summary.json", highlight=False)
    console.print(json.dumps(summary))


if __name__ == "__main__":
    main()
