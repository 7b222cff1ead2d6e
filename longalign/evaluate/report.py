"""Scores as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def heatmap(summary: dict[str, Any], path: Path, title: str) -> None:
    """summary["grid"]: lengths across, depths or kinds down, red 0 to green best, every cell with its number."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grid, (across, down) = summary["grid"], summary["grid_axes"]
    rows = list(dict.fromkeys(name for column in grid.values() for name in column))
    cells = [[column.get(name) for column in grid.values()] for name in rows]
    figure, axes = plt.subplots(figsize=(1.6 + 0.8 * len(grid), 1.4 + 0.5 * len(rows)), layout="constrained")
    numbers = [[float("nan") if value is None else value for value in row] for row in cells]
    image = axes.imshow(numbers, vmin=0, vmax=summary["best"], cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(grid)), [f"{int(n):,}" for n in grid], rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), [f"{float(d):.0%}" if down == "depth" else d for d in rows])
    axes.set_xlabel(across)
    axes.set_ylabel(down)
    axes.set_title(f"{title}: {summary['score']:.2f}" if summary["score"] is not None else title, fontsize=10)
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            axes.text(x, y, "-" if value is None else f"{value:.2f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, label="score")
    figure.savefig(path, dpi=130)
    plt.close(figure)
