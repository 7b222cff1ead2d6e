"""The command: look, show, wait, until all runs are over."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from longalign.schema import Config
from longalign.watch.page import page
from longalign.watch.state import Run, State, find_runs


def watch(config: Config) -> int:
    """Show the runs of output_dir: once, or live until they are over. Raises UserError if there is none."""
    folder, runs = Path(config.output_dir or ""), dict[Path, Run]()

    def look() -> list[State]:
        return [runs.setdefault(path, Run(path)).look() for path in find_runs(folder)]

    console = Console(width=None if sys.stdout.isatty() else 140)
    terminal = console.is_terminal and not console.is_dumb_terminal
    if config.watch.once is True or (config.watch.once == "auto" and not terminal):
        console.print(page(look()))
        return 0
    states = look()
    with Live(page(states), console=console, auto_refresh=False) as live:
        while not all(state.over for state in states):
            time.sleep(config.watch.every_s)
            states = look()
            live.update(page(states), refresh=True)
    return 0
