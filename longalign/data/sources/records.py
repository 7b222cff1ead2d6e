"""Where records come from: files, local folders and hubs, all read one by one."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longalign.data import messages
from longalign.data.messages import BadSample, Raw, expand
from longalign.errors import UserError
from longalign.progress import console
from longalign.schema import Conversations, Hub

SUFFIXES = (*messages.SUFFIXES, ".csv")
LONGEST_FIELD = 1 << 30  # characters; csv's own limit of 128 Ki is shorter than a long document


def is_dataset(source: Conversations) -> bool:
    """Whether source.path is a folder or a hub's name: one data set, whatever files it is made of."""
    if not isinstance(source, Hub):
        return False
    path = Path(source.path)
    return path.is_dir() or not (path.is_file() or any(sign in source.path for sign in "*?["))


def files_of(source: Conversations) -> list[Path]:
    """The files to read; none if `datasets` reads them, from a hub or as save_to_disk wrote them. Raises UserError.

    Which files of a folder make up a split, by their names or its README, is for `datasets` to say. Reading them
    ourselves names a broken line, where `datasets` gives up the whole set.
    """
    if not is_dataset(source):
        return expand([source.path] if isinstance(source, Hub) else source.path, "source.path", SUFFIXES)
    assert isinstance(source, Hub)
    folder = Path(source.path).absolute()  # `datasets` fails at "."
    if source.path.startswith((".", "/")) and not folder.is_dir():
        raise UserError(f"source.path={source.path}: no such folder")
    if not folder.is_dir() or _is_saved(folder):
        return []
    import datasets

    with _reported(source):
        by_split = datasets.load_dataset_builder(str(folder), source.subset).config.data_files or {}
    if source.split not in by_split:
        raise UserError(f"source.split={source.split}: {source.path} has {', '.join(map(str, by_split))}")
    files = [Path(file) for file in by_split[source.split]]
    return files if all(file.name.endswith(SUFFIXES) for file in files) else []


def records(source: Conversations) -> Iterator[Raw]:
    """Every record, in order. Raises UserError if one of the files, or the data set, cannot be read."""
    files = files_of(source)
    if not files and isinstance(source, Hub):
        yield from _dataset_rows(source)
    for file in files:
        yield from _csv_rows(file) if file.suffix == ".csv" else messages.read(file)


def _csv_rows(path: Path) -> Iterator[Raw]:
    """The rows below the header; a quoted field may hold line ends, so rows are counted, not lines."""
    csv.field_size_limit(LONGEST_FIELD)
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)  # without strict a stray quote swallows the rows that follow it
            header = next(rows, [])
            if twice := [name for name in header if header.count(name) > 1]:
                raise UserError(f"{path}: two columns are named {twice[0]!r}; rename one")
            for number, row in enumerate(filter(None, rows), start=1):
                fits = len(row) == len(header)
                value = dict(zip(header, row, strict=True)) if fits else BadSample("row and header differ in length")
                yield Raw(str(path), number, value)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error} (after row {number})") from error


@contextlib.contextmanager
def _reported(source: Hub) -> Iterator[None]:
    """Hubs, networks, caches and file formats have exceptions of their own: all become one UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        settings = f"source.path={source.path} source.split={source.split} source.subset={source.subset or 'null'}"
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error)).rstrip(".")
        raise UserError(
            f"{settings} cannot be read: {said}; "
            "give the hub's name of a data set, or the folder or files of a local copy"
        ) from error


def _dataset_rows(source: Hub) -> Iterator[Raw]:
    with _reported(source):
        for number, row in enumerate(_dataset(source), start=1):
            yield Raw(f"{source.path}[{source.split}]", number, row)


def _is_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote it: one split, or several by name."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _dataset(source: Hub) -> Any:
    """The rows of one split, as an iterable that reads from disk."""
    import datasets

    folder = Path(source.path)
    if not console.is_terminal:
        datasets.disable_progress_bars()
    if not _is_saved(folder):
        # What comes from a hub is kept in its cache, so it works offline next time; what is here needs no second copy.
        return datasets.load_dataset(source.path, source.subset, split=source.split, streaming=folder.is_dir())
    saved = datasets.load_from_disk(source.path)
    if source.subset:
        raise UserError(f"source.subset={source.subset}: {source.path} was written by save_to_disk and has none")
    if isinstance(saved, datasets.Dataset):
        return saved
    if source.split not in saved:
        raise UserError(f"source.split={source.split}: {source.path} has {', '.join(saved)}")
    return saved[source.split]
