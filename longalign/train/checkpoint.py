"""Checkpoints of a run: which there are, whether they are whole, and how an engine takes one up.

checkpoints/step-000200/   checkpoint.json            step, updates, plan, and the files with their sizes
                           rank-00000.bin, .json      the pieces (train/state.py) that a rank owned, and a checksum

They are written by train/saver.py. What they hold does not depend on ranks or ZeRO stage: any run of the same plan
goes on from them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from longalign.errors import UserError
from longalign.files import read_json, write_json
from longalign.model.load import RECORD as EXPORTED
from longalign.progress import warn
from longalign.schema import Config
from longalign.train import state

RECORD = "checkpoint.json"
LAYOUT = 2  # of the files; 1 was DeepSpeed's own
BLOCK = 2**26  # bytes read at once


def name(step: int) -> str:
    return f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def complete(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; unfinished ones have another name."""
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdigit() and (p / RECORD).is_file()), key=step_of)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    write_json(folder / RECORD, {**record, "checksum": _of_record(record)})


def read_record(checkpoint: Path) -> dict[str, Any]:
    """Raises ValueError if it is not what was written."""
    record = read_json(checkpoint / RECORD)
    if not isinstance(record, dict) or record.pop("checksum", None) != _of_record(record):
        raise ValueError(f"{RECORD} does not have the checksum it was written with")
    return record


def _of_record(record: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(record, sort_keys=True).encode()).hexdigest()


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, by another name first: half of one must not look whole."""
    partial = checkpoint.with_name(f".{checkpoint.name}.partial")
    checkpoint.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


def latest(run: Path) -> str:
    """What a stopped run can go on from, in words."""
    found = complete(run / "checkpoints")
    if not found:
        return "no checkpoint was written yet; resume=auto starts anew"
    return f"the checkpoint of step {step_of(found[-1])} stands; resume=auto continues from it"


def abandon_after(run: Path, step: int) -> None:
    """Rename checkpoints and model beyond the step resumed from: they belong to a course of training that was left."""
    dist.barrier()  # all ranks have loaded
    if dist.get_rank() == 0:
        beyond = [path for path in complete(run / "checkpoints") if step_of(path) > step]
        if (record := run / "model" / EXPORTED).is_file() and read_json(record).get("step", 0) > step:
            beyond.append(run / "model")  # else the new course would be taken for finished by it
        for path in beyond:
            left = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(left, ignore_errors=True)  # of an earlier time
            path.rename(left)


# -- is it whole? ---------------------------------------------------------------------------------------


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's names and sizes, None if nothing."""
    try:
        record = read_json(checkpoint / RECORD)
        if "checksum" not in record and record.get("layout") != LAYOUT:
            return None  # `check` tells more
        files = read_record(checkpoint)["files"]
        for file, size in files.items():
            path = checkpoint / file
            if not path.is_file():
                return f"{file} is missing"
            if path.stat().st_size != size:
                return f"{file} has {path.stat().st_size} bytes of {size}"
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        return str(error) if RECORD in str(error) else f"{RECORD} is cut short"
    except OSError as error:
        return f"it cannot be read: {error}"
    return None


def indexes(checkpoint: Path) -> list[Path]:
    """Those of a whole checkpoint, as its record names them: a host's listing of the folder may be stale."""
    files = read_json(checkpoint / RECORD).get("files", {})
    return [checkpoint / file for file in sorted(files) if file.endswith(".json")]


def bit_damage(checkpoint: Path, rank: int, ranks: int) -> str | None:
    """What is wrong with the content of this rank's share of a checkpoint's files, None if nothing."""
    try:
        for path in indexes(checkpoint)[rank::ranks]:
            try:
                index = read_json(path)
                wanted, found = index["checksum"], xxhash.xxh3_128(repr(index["pieces"]).encode())
            except (ValueError, KeyError, TypeError):
                return f"{path.name} is no index"
            with open(data := path.with_suffix(".bin"), "rb") as file:
                while block := file.read(BLOCK):
                    found.update(block)
            if found.hexdigest() != wanted:
                return f"{data.name} does not have the checksum it was written with"
    except OSError as error:  # of the disk, perhaps under a part of the file alone
        return f"it cannot be read: {error}"
    return None


def damage_seen_by_any(checkpoint: Path) -> str | None:
    """`damage`, and `bit_damage` of every rank's share of the files. Called by every rank, all of which are told."""
    mine = damage(checkpoint) or bit_damage(checkpoint, dist.get_rank(), dist.get_world_size())
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return next((one for one in told if one), None)


def as_rank_0_sees(paths: list[Path]) -> list[Path]:
    """Called by every rank: their hosts' listings of a shared folder may differ for a while."""
    told: list[Any] = [paths]
    dist.broadcast_object_list(told)
    return told[0]


def find(config: Config, together: bool = False) -> Path | None:
    """The checkpoint that `resume` means, None to start anew. Raises UserError if it is missing or damaged.

    together: called by every rank, which all get the same one and have looked at every byte.
    """
    wrong_with = damage_seen_by_any if together else damage
    if config.resume == "none":
        return None
    if config.resume != "auto":
        path = Path(config.resume)
        if not (path / RECORD).is_file():
            raise UserError(f"resume={path} is no checkpoint (no {RECORD} in it); give none, auto or a checkpoint")
        if wrong := wrong_with(path):
            raise UserError(f"resume={path} is damaged: {wrong}; take an older one, or resume=auto finds it")
        return path
    assert config.output_dir is not None
    candidates = complete(Path(config.output_dir) / "checkpoints")
    candidates = as_rank_0_sees(candidates) if together else candidates
    for path in reversed(candidates):
        wrong = wrong_with(path)
        if wrong is None:
            return path
        warn(f"skipping damaged checkpoint {path.name}: {wrong}")
    if candidates:
        raise UserError(f"resume=auto: every checkpoint in {config.output_dir}/checkpoints is damaged; resume=none")
    return None


def check(checkpoint: Path, plan: dict[str, Any]) -> int:
    """The step of a checkpoint. Raises UserError if it was written for another plan. plan: the plan's identity."""
    record = read_json(checkpoint / RECORD)
    if record.get("layout") != LAYOUT:
        raise UserError(f"{checkpoint} has the layout of an older longalign; init_from takes a model's weights alone")
    if record["plan"] != plan:
        changed = sorted(key for key in plan if record["plan"].get(key) != plan[key])
        what = f"another plan ({', '.join(changed)} changed)"
        raise UserError(f"{checkpoint} was written for {what}; init_from takes the weights alone")
    return int(record["step"])


# -- taking it up -----------------------------------------------------------------------------------------


def load(engine: Any, checkpoint: Path) -> None:
    """Restore weights and optimizer states, whatever layout wrote them. Called by every rank; each reads its part."""
    record = read_json(checkpoint / RECORD)
    saved: dict[str, list[tuple[int, int, int, np.ndarray]]] = {}  # name -> (start, stop, place in floats, file)
    for path in indexes(checkpoint):
        index = read_json(path)
        if not index["pieces"]:
            continue
        floats: np.ndarray = np.memmap(path.with_suffix(".bin"), dtype=np.float32, mode="r")
        for parameter, *place in index["pieces"]:
            saved.setdefault(parameter, []).append((*place, floats))
    state.set_updates(engine, record["updates"])
    for piece in state.pieces(engine):
        filled = 0
        for start, stop, at, floats in saved.get(piece.name, []):
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low >= high:
                continue
            for kind, tensor in enumerate(state.tensors(engine, piece)):
                first = at + kind * (stop - start) + low - start
                values = torch.from_numpy(floats[first : first + high - low].copy())
                tensor[low - piece.start : high - piece.start].copy_(values)
            filled += high - low
        if filled != piece.stop - piece.start:
            raise UserError(f"{checkpoint} is of another model: it has not all of {piece.name}")
    state.refresh(engine)
