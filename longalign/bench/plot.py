"""bench.json as a picture: tokens/s of every case, packs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(report: dict[str, Any], path: Path) -> None:
    """A PNG: a group of bars for every pack, a colour for every way to run it, the share of the matrix rate on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in report["rows"] if "failed" not in row]
    packs = list(dict.fromkeys(row["pack"] for row in rows))
    ways = list(dict.fromkeys(_way(row) for row in rows))
    figure, axes = plt.subplots(figsize=(2 + 0.8 * len(packs) * max(len(ways), 2), 4), layout="constrained")
    width = 0.8 / max(len(ways), 1)
    for number, way in enumerate(ways):
        of_way = [row for row in rows if _way(row) == way]
        places = [packs.index(row["pack"]) + width * (number - (len(ways) - 1) / 2) for row in of_way]
        bars = axes.bar(places, [row["tokens_per_s"] for row in of_way], 0.92 * width, label=way)
        axes.bar_label(bars, [f"{row['of_matmul']:.2f}" for row in of_way], fontsize=8)
    axes.set_xticks(range(len(packs)), packs)
    axes.set_ylabel("tokens/s")
    axes.set_title(
        f"{report['device']}; above the bars the share of {report['matmul_tflops']:,.3g} TFLOP/s", fontsize=9
    )
    if ways:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _way(row: dict[str, Any]) -> str:
    if row["of"].startswith("trl"):
        return str(row["of"])
    return f"{row['attention']}, {row['activations']}" + (", whole step" if row["of"] == "step" else "")


def plot_strategies(report: dict[str, Any], path: Path) -> None:
    """A PNG: the time of an epoch by strategy, as the paper's Figure 5, with samples/s on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in report["rows"] if "failed" not in row]
    size, unit = (3600, "hours") if any(row["epoch_s"] >= 3600 for row in rows) else (1, "seconds")
    figure, axes = plt.subplots(figsize=(2 + 1.4 * max(len(rows), 2), 4), layout="constrained")
    bars = axes.bar([row["strategy"].replace(" ", "\n") for row in rows], [row["epoch_s"] / size for row in rows], 0.6)
    axes.bar_label(bars, [f"{row['samples_per_s']:,.2f}" for row in rows], fontsize=8)
    axes.set_ylabel(f"{unit} of an epoch")
    axes.set_title(
        f"{report['ranks']} x {report['device']}, ZeRO-{report['zero_stage']}; above the bars samples/s", fontsize=9
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
