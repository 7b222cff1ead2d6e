"""Writing files so that a killed run leaves nothing that looks finished, and checking room beforehand."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import psutil

from longalign import __version__
from longalign.errors import UserError


def human(n_bytes: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.1f} {unit}" if unit != "B" else f"{n_bytes:.0f} B"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


@contextlib.contextmanager
def disk_errors(path: Path, setting: str) -> Iterator[None]:
    """A full disk or a forbidden folder is the user's to mend: say so in one message."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        # torch and safetensors report a failed write in exceptions of their own, without the number
        words = ("No space left", "File too large", "PytorchStreamWriter", "unexpected pos")
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(word in str(error) for word in words):
            said = f"the disk (or a quota) is full: writing {path} failed"
            raise UserError(f"{said}; free some room or change {setting}") from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"cannot write {path}: {error}; change {setting}") from error
        raise


def require_disk(path: Path, n_bytes: float, setting: str) -> None:
    """Raise UserError if the disk that will hold `path` has less than `n_bytes` free."""
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise UserError(f"{path} needs about {human(n_bytes)} but its disk has {human(free)} free; change {setting}")


@contextlib.contextmanager
def fresh_folder(path: Path, ours: tuple[str, ...], overwrite: bool, setting: str = "output_dir") -> Iterator[Path]:
    """Give a temporary folder beside `path` and move it into place when the block ends well.

    `ours` are patterns of the names such a folder holds. With overwrite=true a folder of these names alone is
    replaced; one that holds anything else is refused. Raises UserError for that or a full disk.
    """
    check_free(path, ours, overwrite, setting)
    with disk_errors(path, setting):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_leftovers(path)
        partial = Path(tempfile.mkdtemp(prefix=f"{path.name}.partial-{os.getpid()}-", dir=path.parent))
        partial.chmod(0o755)
        try:
            yield partial
            if path.exists():  # its content goes away with the temporary folder
                old = Path(tempfile.mkdtemp(prefix=f"{path.name}.partial-{os.getpid()}-", dir=path.parent))
                path.rename(old / path.name)
                partial.rename(path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _sweep_leftovers(path: Path) -> None:
    """Remove temporary folders of processes that were killed."""
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.partial-*-*"):
        if not psutil.pid_exists(int(leftover.name.split(".partial-")[-1].split("-")[0])):
            shutil.rmtree(leftover, ignore_errors=True)


def check_free(path: Path, ours: tuple[str, ...], overwrite: bool, setting: str = "output_dir") -> None:
    """Raise UserError if `path` holds something that a command must not replace."""
    if path.is_file():
        raise UserError(f"{setting}={path} is a file; give a folder")
    if not path.is_dir() or not any(path.iterdir()):
        return
    for name in sorted(p.name for p in path.iterdir()):
        if not any(fnmatch(name, pattern) for pattern in ours):
            raise UserError(f"{setting}={path} holds something else ({name}); give another folder")
    if not overwrite:
        raise UserError(f"{setting}={path} is finished already; overwrite=true replaces it")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A text file to write to, which is in place when the block ends well and absent (or as before) otherwise."""
    partial = path.with_name(path.name + ".partial")
    try:
        # half of a surrogate pair has no UTF-8; this way it is written as JSON escapes it
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def versions(*packages: str) -> dict[str, str]:
    """Version numbers to record beside results: longalign's own and those of installed packages."""
    return {"longalign": __version__, **{name: version(name) for name in packages}}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
