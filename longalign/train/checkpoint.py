"""Checkpoints of a run: their files, whether they are sound, which one to resume from, and reading them on any layout.

checkpoints/step-000200/  checkpoint.json            step, plan, parameters, and size and checksum of every file
                          rank-00000.safetensors ... what each rank held: float32 master weights and Adam's moments,
                                                     "KIND/PARAMETER@START" -> [numbers from START of the parameter]

saver.py writes them. The weights that the model computes with are not in them: they follow from the master weights.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError, safe_open

from longalign.errors import UserError
from longalign.files import write_json
from longalign.progress import warn
from longalign.schema import Config
from longalign.train.fragments import KINDS, Fragment, held, refresh, set_updates, sizes

RECORD, FORMAT, CHECKSUM = "checkpoint.json", 2, "xxh3_128"
CHUNK = 64 << 20  # bytes read or written at a time


# -- names and the record -----------------------------------------------------------------------------------


def name(step: int) -> str:
    return f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def complete(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; unfinished ones have another name."""
    return sorted((p for p in folder.glob("step-*") if (p / RECORD).is_file()), key=step_of)


def latest(run: Path) -> str:
    """What a stopped run can go on from, in words."""
    found = complete(run / "checkpoints")
    if not found:
        return "no checkpoint was written yet; resume=auto starts anew"
    return f"the last checkpoint, step {step_of(found[-1])}, stands; resume=auto continues from it"


def sweep(folder: Path) -> None:
    """Remove what was being written, or removed, when a run was killed. Nobody may be writing there."""
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, by another name first: half of one must not look whole."""
    partial = checkpoint.with_name(f".{checkpoint.name}.partial")
    checkpoint.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


def checksum(path: Path) -> str:
    """xxh3_128 of a file, read a chunk at a time."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _of_record(record: dict[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != CHECKSUM}
    return xxhash.xxh3_128(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_record(folder: Path, record: dict[str, Any]) -> None:
    record = {"format": FORMAT, **record}
    write_json(folder / RECORD, {**record, CHECKSUM: _of_record(record)})


def read_record(checkpoint: Path) -> dict[str, Any]:
    """Raises ValueError if the record is damaged, UserError if DeepSpeed wrote the checkpoint."""
    record = json.loads((checkpoint / RECORD).read_bytes())
    if isinstance(record, dict) and "files" in record and "format" not in record:
        raise UserError(
            f"{checkpoint} is in the layout of an earlier version, which this one cannot read: finish that run with "
            "the version that wrote it, or start from its exported model (init_from)"
        )
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get(CHECKSUM) != _of_record(record):
        raise ValueError(f"{RECORD} differs from its checksum")
    return record


# -- soundness ----------------------------------------------------------------------------------------------


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint at first sight (its record; missing and short files), None if nothing."""
    try:
        files = read_record(checkpoint)["files"]
    except (ValueError, OSError) as error:
        return f"{RECORD} is cut short" if isinstance(error, json.JSONDecodeError) else str(error)
    for file, about in files.items():
        path = checkpoint / file
        if not path.is_file():
            return f"{file} is missing"
        if path.stat().st_size != about["bytes"]:
            return f"{file} has {path.stat().st_size} bytes of {about['bytes']}"
    return None


def changed(checkpoint: Path) -> str | None:
    """Which file's content is not what was written, None if none; every rank reads a share, and all learn of it."""
    wrong = None
    files = sorted(read_record(checkpoint)["files"].items())
    for file, about in files[dist.get_rank() :: dist.get_world_size()]:
        try:
            if checksum(checkpoint / file) != about[CHECKSUM]:
                wrong = f"{file} differs from its checksum"
        except OSError as error:
            wrong = f"{file} cannot be read: {error}"
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, wrong)
    return next((told for told in found if told), None)


def damaged(path: Path, wrong: str) -> UserError:
    return UserError(f"resume={path} is damaged: {wrong}; take an older one, or resume=auto finds it")


def candidates(config: Config) -> Iterator[Path]:
    """What `resume` may mean, the best first; sound at first sight.

    Raises UserError if a named checkpoint is missing or damaged, or if there are checkpoints but all are.
    """
    if config.resume == "none":
        return
    if config.resume != "auto":
        path = Path(config.resume)
        if not (path / RECORD).is_file():
            raise UserError(f"resume={path} is no checkpoint (no {RECORD} in it); give none, auto or a checkpoint")
        if wrong := damage(path):
            raise damaged(path, wrong)
        yield path
        return
    assert config.output_dir is not None
    folder = Path(config.output_dir) / "checkpoints"
    for path in reversed(complete(folder)):
        wrong = damage(path)
        if wrong is None:
            yield path
        else:
            warn(f"skipping damaged checkpoint {path.name}: {wrong}")
    if complete(folder):
        raise UserError(f"resume=auto: every checkpoint in {folder} is damaged; resume=none overwrite=true starts over")


def find(config: Config) -> Path | None:
    """The checkpoint that `resume` means, None to start anew; its content is not read. Raises UserError."""
    return next(candidates(config), None)


def find_sound(config: Config) -> Path | None:
    """The same with its content checked; called by every rank, which all get the same answer."""
    for path in candidates(config):
        wrong = changed(path)
        if wrong is None:
            return path
        if config.resume != "auto":
            raise damaged(path, wrong)
        warn(f"skipping damaged checkpoint {path.name}: {wrong}")
    return None


# -- resuming -----------------------------------------------------------------------------------------------


def check(checkpoint: Path, plan: dict[str, Any]) -> int:
    """The step of a checkpoint. Raises UserError if it was written under another plan (`plan`: its identity)."""
    record = read_record(checkpoint)
    if record["plan"] != plan:
        differing = [key for key in plan if record["plan"].get(key) != plan[key]]
        raise UserError(
            f"{checkpoint} was written with another plan: {', '.join(differing)} changed; set it back, or init_from "
            "takes the weights alone"
        )
    return int(record["step"])


def abandon_after(folder: Path, step: int) -> None:
    """Rename checkpoints beyond the one resumed from: they belong to a course of training that was left."""
    dist.barrier()  # all ranks have chosen their checkpoint among the names that stand here now
    if dist.get_rank() == 0:
        for path in complete(folder):
            if step_of(path) > step:
                shutil.rmtree(folder / f"abandoned-{path.name}", ignore_errors=True)
                path.rename(folder / f"abandoned-{path.name}")


def load(engine: Any, checkpoint: Path) -> None:
    """Put master weights, moments and the count of updates in place, from any number of ranks and ZeRO stage.

    Called by every rank, each of which reads what it holds. Raises UserError if the model has other parameters.
    """
    record = read_record(checkpoint)
    for parameter in record["parameters"].keys() | (mine := sizes(engine)).keys():
        then, now = record["parameters"].get(parameter), mine.get(parameter)
        if then != now:
            raise UserError(
                f"{checkpoint} was written for another model: {parameter} had {then} numbers, now {now}; "
                "set model.path and model.config back"
            )
    wanted: dict[str, list[Fragment]] = defaultdict(list)
    for fragment in held(engine):
        wanted[fragment.name].append(fragment)
    missing = sum(f.numel for fragments in wanted.values() for f in fragments) * len(KINDS)
    with torch.no_grad():
        for file in record["files"]:
            try:
                missing -= _copy(checkpoint / file, wanted, engine.basic_optimizer)
            except SafetensorError as error:
                raise UserError(f"{checkpoint / file} cannot be read: {error}") from error
    assert missing == 0, f"{checkpoint} lacks {missing} numbers of what rank {dist.get_rank()} holds"
    set_updates(engine, record["updates"])
    refresh(engine)
    dist.barrier()


def _copy(path: Path, wanted: dict[str, list[Fragment]], optimizer: torch.optim.Optimizer) -> int:
    """Copy what one file has of the fragments into them; returns how many numbers. Only those are read."""
    copied = 0
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118  (no mapping)
            kind, _, place = key.partition("/")
            parameter, _, start = place.rpartition("@")
            first = int(start)
            for fragment in wanted.get(parameter, ()):
                stored = file.get_slice(key)
                begin, end = max(first, fragment.start), min(first + stored.get_shape()[0], fragment.stop)
                if begin < end:
                    into = fragment.view(optimizer, kind)
                    into[begin - fragment.start : end - fragment.start].copy_(stored[begin - first : end - first])
                    copied += end - begin
    return copied
