"""Charts of scores: curves as inline SVG, a grid as cells of colour for HTML, and as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from longalign.evaluate.results import in_order, label

Point = tuple[float, float | None] | None  # score and half of its 95% interval; None: missing

WIDTH, HEIGHT = 560, 250  # pixels
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 12, 46  # margins
VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # also in grey and colour-blind


def curves(
    title: str, axis: str, measure: str, names: list[str], series: dict[str, list[Point]], best: float
) -> Markup:
    """A line per run over the groups `names`, evenly spaced, with 95% intervals; a gap where a score is missing.

    best: the upper end of the axis of scores, whose lower end is 0. Colours and dashes are classes s0 to s5 of the
    page's style sheet.
    """
    x = lambda place: LEFT + (WIDTH - LEFT - RIGHT) * (place + 0.5) / len(names)
    y = lambda value: TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(max(value / best, 0), 1))
    parts = [Markup('<svg class="curves" role="img" viewBox="0 0 {} {}" aria-label="{}">').format(WIDTH, HEIGHT, title)]
    parts.append(Markup("<title>{}</title>").format(title))
    for step in range(5):
        value = best * step / 4
        parts.append(
            Markup('<line class="rule" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>').format(
                LEFT, WIDTH - RIGHT, y=y(value)
            )
        )
        parts.append(_text(LEFT - 6, y(value) + 4, f"{value:.4g}", "end"))
    for place, name in enumerate(names):
        if place % -(-len(names) // 9) == 0:  # nine names fit
            parts.append(_text(x(place), HEIGHT - BOTTOM + 18, label(name, axis), "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, axis, "middle"))
    for order, (run, points) in enumerate(series.items()):
        shift = 5 * (order - (len(series) - 1) / 2)  # so that intervals do not hide one another
        line = ""
        marks = []
        for place, point in enumerate(points):
            if point is None:
                continue
            at, height = x(place) + shift, y(point[0])
            line += f"{'L' if place and points[place - 1] is not None else 'M'}{at:.1f} {height:.1f}"
            told = f"{run}, {label(names[place], axis)}: {measure} {point[0]:.3g}"
            if point[1] is not None:
                low, high = y(point[0] - point[1]), y(point[0] + point[1])
                marks.append(f'<path class="interval" d="M{at:.1f} {low:.1f}V{high:.1f}"/>')
                told += f" ± {point[1]:.2g}"
            marks.append(f'<circle cx="{at:.1f}" cy="{height:.1f}" r="3.5"><title>{escape(told)}</title></circle>')
        parts.append(
            Markup('<g class="s{}"><path class="line" d="{}"/>{}</g>').format(order % 6, line, Markup("".join(marks)))
        )
    return Markup("").join([*parts, Markup("</svg>")])


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def colours(share: float) -> str:
    """Background and text of a cell whose score is this share of the best, as CSS."""
    place = min(max(share, 0), 1) * (len(VIRIDIS) - 1)
    low = min(int(place), len(VIRIDIS) - 2)
    rgb = [round(a + (b - a) * (place - low)) for a, b in zip(VIRIDIS[low], VIRIDIS[low + 1], strict=True)]
    bright = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 100
    return f"background:rgb({rgb[0]},{rgb[1]},{rgb[2]});color:{'#000' if bright else '#fff'}"


def heat_table(summary: dict[str, Any]) -> dict[str, Any]:
    """The grid with lengths across, for pages: {"axes", "columns", "rows": [(name, [(text, CSS)])]}."""
    grid, (across, down) = summary["grid"], summary["grid_axes"]
    lengths, names = in_order(grid), in_order(name for column in grid.values() for name in column)
    cell = lambda value: ("missing", "") if value is None else (f"{value:.2f}", colours(value / summary["best"]))
    rows = [(label(name, down), [cell(grid[length].get(name)) for length in lengths]) for name in names]
    return {"axes": (across, down), "columns": [label(length, across) for length in lengths], "rows": rows}


def heatmap(summary: dict[str, Any], path: Path, title: str) -> None:
    """summary["grid"] as a PNG: lengths across, depths or kinds down, 0 to best, every cell with its number."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grid, (across, down) = summary["grid"], summary["grid_axes"]
    lengths, names = in_order(grid), in_order(name for column in grid.values() for name in column)
    cells = [[grid[length].get(name) for length in lengths] for name in names]
    figure, axes = plt.subplots(figsize=(1.6 + 0.8 * len(lengths), 1.4 + 0.5 * len(names)), layout="constrained")
    numbers = [[float("nan") if value is None else value for value in row] for row in cells]
    image = axes.imshow(numbers, vmin=0, vmax=summary["best"], cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(lengths)), [label(length, across) for length in lengths], rotation=30, ha="right")
    axes.set_yticks(range(len(names)), [label(name, down) for name in names])
    axes.set_xlabel(across)
    axes.set_ylabel(down)
    axes.set_title(f"{title}: {summary['score']:.2f}" if summary["score"] is not None else title, fontsize=10)
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            dark = value is not None and value < 0.5 * summary["best"]
            text = "-" if value is None else f"{value:.2f}"
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    figure.colorbar(image, label="score")
    figure.savefig(path, dpi=130)
    plt.close(figure)
