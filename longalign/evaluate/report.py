"""Scores as a table in the terminal and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table


def needle_table(summary: dict[str, Any]) -> Table:
    depths = list(next(iter(summary["grid"].values())))
    table = Table(title=f"needle: exact match {summary['score']:.3f}", title_justify="left", box=box.SIMPLE)
    table.add_column("length", justify="right")
    for depth in depths:
        table.add_column(f"depth {float(depth):.0%}", justify="right")
    table.add_column("mean", justify="right")
    for length, row in summary["grid"].items():
        mean = summary["by_length"][length]
        table.add_row(f"{int(length):,}", *(f"{row[d]:.2f}" for d in depths), f"{mean:.2f}")
    if summary["score_without_document"] is not None:
        table.caption = f"without the document: {summary['score_without_document']:.3f}"
    return table


def needle_heatmap(summary: dict[str, Any], path: Path, title: str) -> None:
    """Lengths across, depths down, red 0 to green 1, every cell with its number."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = list(summary["grid"])
    depths = list(summary["grid"][lengths[0]])
    cells = [[summary["grid"][n][d] for n in lengths] for d in depths]
    figure, axes = plt.subplots(figsize=(1.6 + 0.8 * len(lengths), 1.4 + 0.5 * len(depths)), layout="constrained")
    image = axes.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{int(n):,}" for n in lengths], rotation=30, ha="right")
    axes.set_yticks(range(len(depths)), [f"{float(d):.0%}" for d in depths])
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("depth of the needle")
    axes.set_title(f"{title}: {summary['score']:.2f}", fontsize=10)
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, label="exact match")
    figure.savefig(path, dpi=130)
    plt.close(figure)
