"""ChatGLM's original layout wherever a model is expected: found on disk or on a hub, converted once into a cache.

The configuration and the tokenizer are read from the original files directly. Only the weights need a conversion,
which is kept in LONGALIGN_CACHE (default ~/.cache/longalign) for every later command.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from longalign.errors import UserError
from longalign.files import disk_errors, human, read_json
from longalign.model.chatglm import is_original, to_glm
from longalign.progress import console

CONVERSION = 1  # to be raised when to_glm writes something else, so that no older conversion is used
SMALL = ("*.json", "tokenizer.model")  # of a hub repository; its *.py is never fetched, let alone run
OF_CONVERSION = ("config.json", "tokenizer.model", "*.index.json", "*.safetensors", "*.bin")


def find(path: str, weights: bool = False) -> Path | None:
    """The folder of a checkpoint in the original layout, given a folder or a hub name; None for any other model.

    From a hub come config and tokenizer, with `weights` the tensors too. Raises UserError if these cannot be had; a
    path that is no model at all is None, for the loader of ordinary models to complain of.
    """
    if Path(path).is_dir():
        return Path(path) if is_original(Path(path)) else None
    if path.startswith((".", "/")):
        return None
    try:
        if not is_original(_hub_config(path).parent):
            return None
    except (OSError, ValueError):  # no such name, or no connection
        return None
    try:
        folder = _hub_folder(path, SMALL)
        if weights:
            folder = _hub_folder(path, (*SMALL, *_kinds_of_weights(folder)))
        return folder
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be downloaded: {str(error).splitlines()[0]}") from None


@functools.cache
def _hub_config(name: str) -> Path:
    return Path(hf_hub_download(name, "config.json"))


@functools.cache
def _hub_folder(name: str, patterns: tuple[str, ...]) -> Path:
    return Path(snapshot_download(name, allow_patterns=list(patterns)))


def _kinds_of_weights(folder: Path) -> list[str]:
    """Repositories may hold the tensors twice: the index tells, and safetensors are preferred."""
    kinds = ["*.safetensors", "*.bin"]
    return next(([kind] for kind in kinds if list(folder.glob(f"{kind}.index.json"))), kinds)


def converted(folder: Path) -> Path:
    """The cached GLM model of an original checkpoint, converted now unless it was before.

    Processes of one machine that ask at the same time wait for the first. A changed source is converted anew.
    Raises UserError if the source is not whole or the cache has no room.
    """
    target = cache() / "glm" / fingerprint(folder)
    with disk_errors(target, "LONGALIGN_CACHE"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_name(f"{target.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back by the kernel, also when this process is killed
            if not target.is_dir():
                size = sum(path.stat().st_size for path in _sources(folder) if path.suffix in (".safetensors", ".bin"))
                console.print(
                    f"{folder} is in ChatGLM's original layout: converting its {human(size)} once, into {target} "
                    "(LONGALIGN_CACHE=FOLDER puts it elsewhere)",
                    soft_wrap=True,
                )
                to_glm(folder, target, setting="LONGALIGN_CACHE")
    return target


def cache() -> Path:
    return Path(os.environ.get("LONGALIGN_CACHE") or "~/.cache/longalign").expanduser().absolute()


def fingerprint(folder: Path) -> str:
    """Of the files that a conversion reads: place, names, sizes, times, and what config.json says.

    The place counts because archives may give every file the same time, and models of one shape have equal sizes.
    """
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _sources(folder)]
    told = [CONVERSION, str(folder.resolve()), files, read_json(folder / "config.json")]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _sources(folder: Path) -> list[Path]:
    return sorted(path for pattern in OF_CONVERSION for path in folder.glob(pattern))
