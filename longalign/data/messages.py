"""Read conversations from files, and put them into the one form that templates expect.

A raw sample is `{"messages": [{"role": "system" | "user" | "assistant", "content": str | None}, ...]}` or, for
continued training, `{"text": str}`. What cannot be used is returned with its reason, never dropped silently.
"""

from __future__ import annotations

import glob
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longalign.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet")
ROLES = ("system", "user", "assistant")
SYSTEM_MERGED = "system message put into a user turn"
# Invisible characters that answers scraped from web pages carry (the reference removes them too).
ZERO_WIDTH = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))

# A .json array is read in pieces of so many characters; no item may be longer than MAX_ITEM.
CHUNK, MAX_ITEM = 1 << 20, 1 << 26
GAP = re.compile(r"[ \t\r\n]*")

Messages = list[dict[str, str]]


class BadSample(ValueError):
    """A sample that cannot be trained on; the message is the reason that the ledger counts."""


@dataclass(frozen=True)
class Raw:
    """One record of a file, not yet understood: `value` is JSON text (bytes) or an object of a table row."""

    file: str
    line: int  # from 1; for tables and arrays the record's place
    value: Any


def expand(patterns: list[str], setting: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Paths and globs -> files, in a fixed order. Raises UserError for one that is missing or unreadable."""
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        matched = sorted(Path(p) for p in glob.glob(pattern, recursive=True))
        found = [path] if path.is_file() else [file for file in matched if not _beside_prepared(file)]
        if not found:
            hint = f"; {setting}=null leaves this source out" if setting.endswith("_file") else ""
            raise UserError(f"{setting}={pattern}: no such file{hint}")
        for file in found:
            if file.is_dir():
                raise UserError(f"{setting}={file} is a folder; give its files, as {setting}={file}/*.jsonl")
            if not file.name.endswith(suffixes):
                raise UserError(f"{setting}={file}: unknown kind of file; one of {', '.join(suffixes)}")
        files += found
    return files


def _beside_prepared(file: Path) -> bool:
    """Whether `prepare` wrote it beside NAME.jsonl: NAME_dropped.jsonl (what it left out) or NAME.json (its counts)."""
    name = file.name.removesuffix("_dropped.jsonl").removesuffix(".json")
    data, counts = file.with_name(f"{name}.jsonl"), file.with_name(f"{name}.json")
    return name != file.name and data.is_file() and counts.is_file()


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a plain or compressed file. Raises an exception if it is cut short."""
    if path.name.endswith(".zst"):
        yield from _zst_lines(path)
        return
    with gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as file:
        yield from file


def _zst_lines(path: Path) -> Iterator[bytes]:
    """zstandard's own stream reader ends quietly in the middle of a frame, which would lose samples."""
    import zstandard

    rest, frame = b"", None
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                *lines, rest = (rest + frame.decompress(data)).split(b"\n")
                yield from lines
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the file is cut short")
    if rest:
        yield rest


def _array(path: Path) -> Iterator[Any]:
    """The items of a JSON array, one by one, however long the file. Raises ValueError where it is malformed.

    An item that cannot be decoded may just be cut off where the text read so far ends. So more is read, twice as much
    each time, until the item is whole, longer than MAX_ITEM, or the file is over.
    """
    decoder, number, place = json.JSONDecoder(), 1, 0
    with open(path, encoding="utf-8-sig") as file:
        text = ""
        while not text and (more := file.read(CHUNK)):
            text = more.lstrip()
        if not text.startswith("["):
            raise UserError(f"{path}: a .json file holds one array of samples; use .jsonl for one per line")
        sign, text = ",", text[1:]
        while sign == ",":
            try:
                start = GAP.match(text, place).end()  # type: ignore[union-attr]  # it always matches
                if number == 1 and text[start] == "]":
                    sign, place = "]", start + 1
                    break
                value, end = decoder.raw_decode(text, start)
                end = GAP.match(text, end).end()  # type: ignore[union-attr]
                if text[end] not in ",]":  # the rest of a number, such as .5, was not read yet
                    raise ValueError(text[end])
                sign = text[end]
            except (ValueError, IndexError) as error:
                more = file.read(max(CHUNK, len(text) - place)) if len(text) - place <= MAX_ITEM else ""
                if not more:
                    raise ValueError(f"item {number} of the array is malformed or cut short") from error
                text, place = text[place:] + more, 0
                continue
            yield value
            number, place = number + 1, end + 1
        if text[place:].strip() or any(more.strip() for more in iter(lambda: file.read(CHUNK), "")):
            raise ValueError(f"the array does not end after item {number - 1}")


def read(path: Path) -> Iterator[Raw]:
    """Yield every record of a file; blank lines are skipped. Raises UserError if the file is not readable."""
    try:
        if path.name.endswith(".parquet"):
            import pyarrow.parquet as pq

            rows: Iterator[Any] = (row for batch in pq.ParquetFile(path).iter_batches(64) for row in batch.to_pylist())
        elif path.name.endswith(".json"):
            rows = _array(path)
        else:
            for number, line in enumerate(_lines(path), start=1):
                if line.strip():
                    yield Raw(str(path), number, line)
            return
        for number, row in enumerate(rows, start=1):
            yield Raw(str(path), number, row)
    except UserError:
        raise
    except Exception as error:  # each of the four formats has its own exceptions for a damaged file
        raise UserError(f"{path} cannot be read: {error}") from error


def understand(raw: Raw) -> dict[str, Any]:
    """The record as an object. Raises BadSample."""
    value = raw.value
    if isinstance(value, bytes):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, absurd numbers or nesting
            raise BadSample("malformed JSON") from error
    if not isinstance(value, dict):
        raise BadSample("not a JSON object")
    return value


def conversation(sample: dict[str, Any]) -> tuple[Messages, Counter[str]]:
    """The sample's messages in the one form templates expect, and what had to be changed for that, counted.

    The form: at most one system message, then user and assistant in turn, ending with an answer. Roles are paired by
    name: turns of one role in a row are joined by a blank line, an answer to nothing and a question without an answer
    are left out, a later system message goes into the user turn that follows it. None content is empty; zero-width
    characters leave answers. Raises BadSample if no answered question is there.
    """
    messages = sample.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadSample("no messages")
    system: list[str] = []
    turns: Messages = []
    changes: Counter[str] = Counter()
    for role, content in map(_checked, messages):
        if role == "system":
            system.append(content)
        elif role == "user":
            if turns and system:  # inside the conversation; one before it stays until the end
                changes[SYSTEM_MERGED] += 1
                content, system = joined(*system, content), []
            if turns and turns[-1]["role"] == "user":
                changes["user turns in a row joined"] += 1
                content = joined(turns.pop()["content"], content)
            turns.append({"role": role, "content": content})
            if len(turns) == 1:
                opening, system = joined(*system), []
        elif not turns:
            changes["answer without a question left out"] += 1
        elif turns[-1]["role"] == "assistant":
            changes["answers in a row joined"] += 1
            turns[-1]["content"] = joined(turns[-1]["content"], content)
        else:
            turns.append({"role": role, "content": content})
    if turns and turns[-1]["role"] == "user":
        changes["unanswered last turn left out"] += 1
        turns.pop()
    if not turns:
        raise BadSample("no answered question")
    if system:
        changes["system message at the end left out"] += 1
    return ([{"role": "system", "content": opening}] if opening else []) + turns, changes


def _checked(message: Any) -> tuple[str, str]:
    """(role, content) of one message. Raises BadSample."""
    if not isinstance(message, dict) or "role" not in message:
        raise BadSample("message without a role")
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise BadSample(f"unknown role {str(role)[:20]!r}")
    if not isinstance(content, str | None):
        raise BadSample("content is not text")
    content = content or ""
    if not content.isascii() and any("\ud800" <= character <= "\udfff" for character in content):
        raise BadSample("half of a surrogate pair in the text")
    return role, content.translate(ZERO_WIDTH) if role == "assistant" else content


def joined(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)


def merge_system(messages: Messages) -> Messages:
    """For templates without a place for a system message: put it before the first user turn."""
    if messages[0]["role"] != "system":
        return messages
    system, user, *rest = messages
    return [{"role": "user", "content": joined(system["content"], user["content"])}, *rest]
