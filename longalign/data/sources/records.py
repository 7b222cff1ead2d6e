"""Where records come from: files, local folders and hubs, all read one by one."""

from __future__ import annotations

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


def files_of(source: Conversations) -> list[Path]:
    """The files to read; none if the source is a folder or hub name, which `datasets` reads. Raises UserError."""
    if not isinstance(source, Hub):
        return expand(source.path, "source.path", SUFFIXES)
    is_file = Path(source.path).is_file() or any(sign in source.path for sign in "*?[")
    return expand([source.path], "source.path", SUFFIXES) if is_file else []


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
        raise UserError(f"{path} cannot be read: {error} (after line {rows.line_num})") from error


def _dataset_rows(source: Hub) -> Iterator[Raw]:
    settings = f"source.path={source.path} source.split={source.split} source.subset={source.subset or 'null'}"
    try:
        for number, row in enumerate(_dataset(source), start=1):
            yield Raw(f"{source.path}[{source.split}]", number, row)
    except UserError:
        raise
    except Exception as error:  # hubs, networks, caches and file formats have exceptions of their own
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error)).rstrip(".")
        raise UserError(
            f"{settings} cannot be read: {said}; "
            "give the hub's name of a data set, or the folder or files of a local copy"
        ) from error


def _dataset(source: Hub) -> Any:
    """The rows of one split, as an iterable that reads from disk."""
    import datasets

    folder = Path(source.path)
    if not console.is_terminal:
        datasets.disable_progress_bars()
    if source.path.startswith((".", "/")) and not folder.is_dir():
        raise UserError(f"source.path={source.path}: no such folder")
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        # What comes from a hub is kept in its cache, so it works offline next time; what is here needs no second copy.
        return datasets.load_dataset(source.path, source.subset, split=source.split, streaming=folder.is_dir())
    saved = datasets.load_from_disk(source.path)  # written by save_to_disk: one split, or several by name
    if isinstance(saved, datasets.Dataset):
        return saved
    if source.split not in saved:
        raise UserError(f"source.split={source.split}: {source.path} has {', '.join(saved)}")
    return saved[source.split]
