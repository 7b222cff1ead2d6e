"""Checkpoints of a run: written whole or not at all, the newest kept, refused when cut short.

checkpoints/step-000200/   checkpoint.json   step, world size, ZeRO stage, plan, and the size of every file
                           state/            what DeepSpeed saves: weights, optimizer states
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from longalign.errors import UserError
from longalign.files import disk_errors, read_json, write_json
from longalign.progress import warn
from longalign.schema import Config

RECORD = "checkpoint.json"


def name(step: int) -> str:
    return f"step-{step:06d}"


def save(engine: Any, folder: Path, step: int, keep_last: int, about: dict[str, Any]) -> Path:
    """Save the engine's state after optimizer step `step`; called by every rank.

    `about` is what a resumed run must have in common with this one (see `needs`). Raises UserError on a full disk.
    """
    final, partial = folder / name(step), folder / f".{name(step)}.partial"
    first = dist.get_rank() == 0
    try:
        with disk_errors(final, "output_dir"):
            if first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            dist.barrier()
            engine.save_checkpoint(str(partial), tag="state", save_latest=False)
            dist.barrier()
            if first:
                files = {str(f.relative_to(partial)): f.stat().st_size for f in partial.rglob("*") if f.is_file()}
                write_json(partial / RECORD, {"step": step, **about, "files": files})
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
                for old in complete(folder)[:-keep_last]:
                    shutil.rmtree(old)
    finally:
        if first:  # after a failure; a whole checkpoint has been renamed
            shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    return final


def complete(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; unfinished ones have another name."""
    return sorted(p for p in folder.glob("step-*") if (p / RECORD).is_file())


def abandon_after(folder: Path, step: int) -> None:
    """Rename checkpoints beyond the one resumed from: they belong to a course of training that was left."""
    dist.barrier()  # all ranks have chosen their checkpoint among the names that stand here now
    if dist.get_rank() == 0:
        for path in complete(folder):
            if path.name > name(step):
                path.rename(folder / f"abandoned-{path.name}")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing."""
    try:
        files = read_json(checkpoint / RECORD)["files"]
    except (ValueError, KeyError):
        return f"{RECORD} is cut short"
    for file, size in files.items():
        path = checkpoint / file
        if not path.is_file():
            return f"{file} is missing"
        if path.stat().st_size != size:
            return f"{file} has {path.stat().st_size} bytes of {size}"
    return None


def find(config: Config) -> Path | None:
    """The checkpoint that `resume` means, None to start anew. Raises UserError if it is missing or damaged."""
    if config.resume == "none":
        return None
    if config.resume != "auto":
        path = Path(config.resume)
        if not (path / RECORD).is_file():
            raise UserError(f"resume={path} is no checkpoint (no {RECORD} in it); give none, auto or a checkpoint")
        if wrong := damage(path):
            raise UserError(f"resume={path} is damaged: {wrong}; take an older one, or resume=auto finds it")
        return path
    assert config.output_dir is not None
    candidates = complete(Path(config.output_dir) / "checkpoints")
    for path in reversed(candidates):
        wrong = damage(path)
        if wrong is None:
            return path
        warn(f"skipping damaged checkpoint {path.name}: {wrong}")
    if candidates:
        raise UserError(f"resume=auto: every checkpoint in {config.output_dir}/checkpoints is damaged; resume=none")
    return None


def needs(config: Config, plan: dict[str, Any]) -> dict[str, Any]:
    """What a run must have in common with the one that wrote a checkpoint. `plan`: the plan's identity."""
    return {"processes": config.cluster.ranks, "zero_stage": config.cluster.zero_stage, "plan": plan}


def check(checkpoint: Path, about: dict[str, Any]) -> int:
    """The step of a checkpoint. Raises UserError if the run that wrote it cannot be continued by this one."""
    record = read_json(checkpoint / RECORD)
    advice = {
        "processes": "resume with as many processes",
        "zero_stage": "resume with the same cluster.zero_stage",
        "plan": "data, strategy, max_length, seed, epochs or mix changed; init_from takes the weights alone",
    }
    for key, hint in advice.items():
        if record[key] != about[key]:
            raise UserError(f"{checkpoint} was written with another {key} ({record[key]}, now {about[key]}): {hint}")
    return int(record["step"])


def load(engine: Any, checkpoint: Path) -> None:
    """Restore weights and optimizer states; called by every rank."""
    path, _ = engine.load_checkpoint(str(checkpoint), tag="state", load_lr_scheduler_states=False)
    assert path is not None, f"DeepSpeed did not load {checkpoint}"
