"""Rows of metrics.jsonl and eval.jsonl for TensorBoard and Weights & Biases (logger=tensorboard, logger=wandb).

Both get every number of a row under train/ or eval/, nested ones as train/loss_by_source/NAME. A resumed run continues
the same curves, without a step twice.
"""

from __future__ import annotations

import json
import netrc
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from longalign.errors import UserError
from longalign.files import read_json
from longalign.schema import Config


class Logger(Protocol):
    def log(self, kind: str, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def check_loggers(config: Config) -> None:
    """Raises UserError if a package or a key is missing; called before any worker starts."""
    wanted = {"tensorboard": config.logger.tensorboard, "wandb": config.logger.wandb is not None}
    for name, is_wanted in wanted.items():
        if is_wanted and not is_installed(name):
            raise UserError(f'logger={name} needs a package that is not installed: pip install "longalign[{name}]"')
    environment = {**os.environ, **config.cluster.env}
    if config.logger.wandb and environment.get("WANDB_MODE", "online") == "online":
        with suppress(OSError, netrc.NetrcParseError):  # where `wandb login` puts the key
            if netrc.netrc(environment.get("NETRC")).hosts:
                return
        if not environment.get("WANDB_API_KEY"):
            raise UserError("logger=wandb needs a key: set WANDB_API_KEY, or WANDB_MODE=offline and `wandb sync` later")


def is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def open_loggers(config: Config, done: int) -> list[Logger]:
    """The loggers of a run that goes on behind step `done`; called by rank 0."""
    run, loggers = Path(config.output_dir or ""), list[Logger]()
    if config.logger.tensorboard:
        loggers.append(TensorBoard(run, done))
    if config.logger.wandb:
        loggers.append(WeightsAndBiases(run, config))
    return loggers


def numbers(row: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """{"step": 3, "loss": 2.0, "time": {"data": 0.1}} -> ("train/loss", 2.0), ("train/time/data", 0.1)."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and key != "step":
            yield f"{prefix}/{key}", float(value)


class TensorBoard:
    """Event files in RUN/tensorboard. A reader forgets what a killed run wrote from `purge_step` on."""

    def __init__(self, run: Path, done: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=done + 1)

    def log(self, kind: str, row: dict[str, Any]) -> None:
        for name, value in numbers(row, kind):
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()  # a killed run resumes from a checkpoint whose rows must stand

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of wandb with its files in RUN/wandb, and in RUN/wandb/longalign.json its id and the last steps sent.

    What was sent cannot be taken back: rows up to the last step sent are not sent again after a resume.
    """

    def __init__(self, run: Path, config: Config):
        os.environ.setdefault("WANDB_SILENT", "true")  # the terminal is the progress bar's
        import wandb

        assert config.logger.wandb
        self.record = run / "wandb" / "longalign.json"
        new = {"id": secrets.token_hex(4)}
        self.sent: dict[str, Any] = read_json(self.record) if self.record.is_file() else new
        self.record.parent.mkdir(exist_ok=True)
        try:
            self.run = wandb.init(
                **config.logger.wandb.model_dump(),
                id=self.sent["id"],
                resume="allow",
                dir=str(run),
                config=config.model_dump(mode="json", exclude={"cluster": {"env"}}),  # which may hold secrets
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise UserError(f"logger=wandb: {error}") from None

    def log(self, kind: str, row: dict[str, Any]) -> None:
        if row["step"] <= self.sent.get(kind, 0):
            return
        self.run.log(dict(numbers(row, kind)), step=row["step"])
        self.sent[kind] = row["step"]
        partial = self.record.with_suffix(".partial")
        partial.write_text(json.dumps(self.sent))
        partial.replace(self.record)

    def close(self) -> None:
        self.run.finish()
