"""`-m`: a real Hydra multirun, so that its sweepers and launchers (joblib, optuna, submitit) work.

Every run is a plain `longalign COMMAND` in its own folder; one that fails is reported and the sweep goes on.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.table import Table

from longalign.config import conf_dir, hydra_message, override_words, parse, validate
from longalign.errors import UserError
from longalign.files import read_json, write_json
from longalign.progress import console, warn
from longalign.schema import Config
from longalign.train.metrics import read_metrics

IN_DEFAULT_PATH = {"model", "datanum", "strategy"}  # their names are part of train's default output_dir
QUIET = ["hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]  # the command speaks for itself
SHOWN = ("step", "loss", "loss_sequence", "loss_token", "tokens_per_s", "needle", "samples", "tokens", "steps", "packs")
RUNS = "sweep-runs"  # folder of the sweep that collects one record per run


def sweep(command: str, words: list[str], config_dir: str | None, dry_run: bool) -> int:
    """Run every combination; returns 0 if all succeeded, else 1. Raises UserError for mistakes in the words."""
    overrides = parse(words, multirun=True, config_dir=config_dir)
    fixed = [o.key_or_group for o in overrides if not o.is_sweep_override()]
    words = [*QUIET, *override_words(overrides, config_dir)]
    GlobalHydra.instance().clear()
    version.setbase("1.3")
    hydra = Hydra.create_main_hydra2("longalign", create_config_search_path(str(conf_dir().resolve())))
    with tempfile.TemporaryDirectory() as nowhere:
        try:
            composed = hydra.compose_config(command, words, run_mode=RunMode.MULTIRUN)
            folder = Path(nowhere if dry_run else composed.hydra.sweep.dir).absolute()
            shutil.rmtree(folder / RUNS, ignore_errors=True)
            hydra.multirun(
                config_name=command,
                task_function=Job(command, fixed, str(folder), dry_run),
                overrides=[*words, f"hydra.sweep.dir='{folder}'"],
                with_log_configuration=False,
            )
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(hydra_message(error)) from None
        finally:
            GlobalHydra.instance().clear()
        records = [read_json(p) for p in sorted((folder / RUNS).glob("*.json"), key=lambda p: int(p.stem))]
    rows = [{**record, **({} if dry_run else result(command, record))} for record in records]
    console.print(table(rows))
    if not dry_run:
        write_json(folder / "sweep.json", rows)
        console.print(f"written to {folder}/sweep.json")
    return 0 if all(row["exit_code"] == 0 for row in rows) else 1


class Job:
    """One run of a sweep: picklable, since a launcher may send it to another process."""

    def __init__(self, command: str, fixed: list[str], folder: str, dry_run: bool):
        self.command, self.fixed, self.folder, self.dry_run = command, fixed, folder, dry_run

    def __call__(self, composed: DictConfig) -> float:
        """Run, record, and return the objective for the sweeper (NaN for a failed run)."""
        hydra = HydraConfig.get()
        swept = [str(o) for o in hydra.overrides.task if _key(o) not in self.fixed]
        record: dict[str, Any] = {"run": int(hydra.job.num), "overrides": swept, "output_dir": None, "exit_code": 1}
        try:
            config = own_folder(validate(composed), self.command, swept, self.fixed)
            record["output_dir"] = str(Path(config.output_dir or "").absolute())
            self._keep(record)  # for those who watch the sweep
            console.rule(f"{self.command} {' '.join(swept)}")
            from longalign import commands

            record["exit_code"] = getattr(commands, self.command)(config, self.dry_run)
        except UserError as error:
            record |= {"exit_code": 2, "error": str(error)}
            console.print(f"error: {error}", style="red")
        except Exception as error:  # one run's failure does not end the sweep
            record["error"] = repr(error)
            console.print_exception()
        if record["exit_code"] == 130:
            raise KeyboardInterrupt
        if record["exit_code"] == 143:
            sys.exit(143)
        self._keep(record)
        figures = {} if self.dry_run else result(self.command, record)
        if figures and composed.objective not in figures and self.command == "train":
            warn(f"objective={composed.objective} is no figure of a run; one of {', '.join(figures)}")
        return float(figures.get(str(composed.objective), math.nan))

    def _keep(self, record: dict[str, Any]) -> None:
        os.makedirs(Path(self.folder) / RUNS, exist_ok=True)
        write_json(Path(self.folder) / RUNS / f"{record['run']}.json", record)


def own_folder(config: Config, command: str, swept: list[str], fixed: list[str]) -> Config:
    """Give each run an output folder of its own, named by what is swept and not yet in its path."""
    given = "output_dir" in (*fixed, *map(_key, swept))
    named = IN_DEFAULT_PATH if command == "train" and not given else set()
    parts = [o.replace("/", "-") for o in swept if _key(o) not in {*named, "output_dir"}]
    if config.output_dir is None or not parts:
        return config
    return config.model_copy(update={"output_dir": f"{config.output_dir}/{','.join(parts)}"})


def _key(override: str) -> str:
    """'++lr=1e-4' -> 'lr'."""
    return override.partition("=")[0].lstrip("+")


def result(command: str, record: dict[str, Any]) -> dict[str, Any]:
    """The figures of a finished run, read from its folder."""
    if record["exit_code"] != 0 or record["output_dir"] is None:
        return {}
    folder = Path(record["output_dir"])
    if command == "train":
        rows = [row for row in read_metrics(folder / "metrics.jsonl") if not row.get("skipped")]
        return rows[-1] if rows else {}
    if command == "eval" and (folder / "results.json").is_file():
        return {name: task["score"] for name, task in read_json(folder / "results.json")["tasks"].items()}
    if command in ("tokenize", "group") and (folder / "manifest.json").is_file():
        manifest = read_json(folder / "manifest.json")
        return {k: manifest[k] for k in ("samples", "tokens", "steps", "packs") if k in manifest}
    return {}


def table(rows: list[dict[str, Any]]) -> Table:
    """One line a run: what was swept, how it ended, its figures."""
    swept = list(dict.fromkeys(o.partition("=")[0] for row in rows for o in row["overrides"]))
    figures = [name for name in dict.fromkeys(name for row in rows for name in row) if name in SHOWN]
    made = Table(title=f"sweep of {len(rows)} runs", title_justify="left", box=box.SIMPLE)
    for column in (*swept, "ended"):
        made.add_column(column, overflow="fold")
    for column in figures:
        made.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        values = dict(o.split("=", 1) for o in row["overrides"])
        ended = "ok" if row["exit_code"] == 0 else f"failed ({row['exit_code']})"
        made.add_row(*(values.get(key, "") for key in swept), ended, *(_figure(row.get(name)) for name in figures))
    return made


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else f"{value:,}"
