"""States of runs as rich tables: one run in detail, several in a line each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from longalign.progress import ago, clock
from longalign.train.heartbeat import position
from longalign.train.loggers import numbers
from longalign.watch.state import State

BARS = "▁▂▃▄▅▆▇█"
COLOURS = {"running": "green", "finished": "green", "stopped": "yellow", "quiet": "yellow", "waiting": "yellow"}
SHOWN = ("loss", "loss_sequence", "loss_token", "loss_by_source", "loss_by_length", "grad_norm", "lr", "tokens_per_s")
EVAL = re.compile("loss|/score$")  # of the many figures of an evaluation
RANKS = 16  # shown at most, those behind first


def spark(values: Iterable[float | None], width: int = 32) -> str:
    """The last values as bars, several to a bar (their mean) if there are more than `width`; × where there is none."""
    every = list(values)
    size = max(1, -(-len(every) // width))
    groups = [[v for v in every[at : at + size] if v is not None] for at in range(0, len(every), size)]
    means = [sum(group) / len(group) if group else None for group in groups]
    known = [mean for mean in means if mean is not None]
    low, span = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    place = lambda mean: round((mean - low) / span * (len(BARS) - 1)) if span else 0
    return "".join("×" if mean is None else BARS[place(mean)] for mean in means)


def figure(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def page(states: Sequence[State]) -> RenderableType:
    return detail(states[0]) if len(states) == 1 else overview(states)


def overview(states: Sequence[State]) -> Table:
    made = Table(box=box.SIMPLE)
    for column in ("run", "state", "step", "loss", "", "tokens/s", "left", "checkpoint"):
        made.add_column(column, overflow="fold", justify="right" if column in ("step", "loss", "tokens/s") else "left")
    for state in states:
        losses = [row["loss"] for row in state.rows]
        made.add_row(
            str(state.run),
            Text(state.how, COLOURS.get(state.how, "red")),
            f"{state.step}/{state.n_steps}",
            figure(losses[-1]) if losses else "",
            spark(losses, 24),
            f"{state.tokens_per_s:,.0f}" if losses else "",
            clock(state.left_s) if state.left_s is not None else "",
            state.checkpoint or "none",
        )
    return made


def detail(state: State) -> Group:
    parts: list[RenderableType] = [head(state), curves(columns(state.rows, SHOWN, ""))]
    if state.evals:
        every = columns(state.evals, None, "eval")
        parts.append(curves({name: values for name, values in every.items() if EVAL.search(name)}))
    if state.rows and "time" in state.rows[-1]:
        parts.append(seconds(state.rows[-1]))
    parts.append(ranks(state))
    if state.how == "hung":
        parts.append(Text(state.why))
    return Group(*parts)


def head(state: State) -> Table:
    made = Table.grid(padding=(0, 2))
    told = Text(state.how, COLOURS.get(state.how, "red"))
    made.add_row(
        Text(str(state.run), "bold"), told.append(f": {state.why}" if state.why and state.how != "hung" else "")
    )
    left = f"{clock(state.left_s)} left" if state.left_s is not None else ""
    epoch = f"epoch {state.rows[-1]['epoch']}" if state.rows else ""
    made.add_row(f"step {state.step:,} of {state.n_steps:,}  {epoch}", left)
    made.add_row(ProgressBar(total=max(state.n_steps, 1), completed=state.step, width=48), "")
    saved = f"{state.checkpoint}, {ago(state.checkpoint_age_s)} ago" if state.checkpoint else "none yet"
    made.add_row(f"last checkpoint: {saved}", "")
    if skipped := [row["step"] for row in state.rows if row.get("skipped")]:
        made.add_row(Text(f"{len(skipped)} steps skipped, not finite; the last was {skipped[-1]}", "red"), "")
    if state.rows:
        made.add_row(f"{state.tokens_per_s:,.0f} tokens/s, {state.step_s:.2f} s a step", "")
    return made


def columns(rows: list[dict[str, Any]], keys: Sequence[str] | None, prefix: str) -> dict[str, list[float | None]]:
    """Name -> its values in all rows that have it; None where the row tells null. keys: None is all numbers."""
    found: dict[str, list[float | None]] = {}
    for row in rows:
        chosen = row if keys is None else {key: row[key] for key in keys if key in row}
        nulls = {key: None for key, value in chosen.items() if value is None}
        for name, value in [*numbers(chosen, prefix), *nulls.items()]:
            found.setdefault(name.removeprefix("/"), []).append(value)
    return found


def curves(values: dict[str, list[float | None]]) -> Table:
    made = Table(box=box.SIMPLE, show_header=False)
    for name, of_rows in values.items():
        made.add_row(name, Text(figure(of_rows[-1]), justify="right"), spark(of_rows))
    return made


def seconds(row: dict[str, Any]) -> Text:
    """Where the last step's time went, on rank 0."""
    spent = {**row["time"], "other": max(0.0, row["step_s"] - sum(row["time"].values()))}
    parts = [f"{name} {value:.2f} s ({value / max(row['step_s'], 1e-9):.0%})" for name, value in spent.items()]
    return Text("  last step: " + ", ".join(parts))


def ranks(state: State) -> Table:
    made = Table(box=box.SIMPLE)
    for column in ("rank", "host", "began last", "ago"):
        made.add_column(column)
    order = sorted(state.beats.items(), key=lambda item: (item[1]["beats"], item[0]))
    age = lambda beat: ago(state.looked - beat["time"])
    for rank, beat in order[:RANKS]:
        made.add_row(str(rank), beat["host"], beat["ended"] or position(beat), age(beat))
    if len(order) > RANKS:
        made.add_row("...", "", f"{len(order) - RANKS} more ranks, further on", "")
    return made
