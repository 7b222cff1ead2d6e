"""Records of any source -> one JSONL file of conversations, and a list of what was left out.

1. read     every record, one by one                                  records.py
2. shape    fields and roles as the format calls them -> messages      shape.py
3. clean    sharegpt: HTML -> Markdown                                 sharegpt.py, html.py
4. pair     questions and answers in turn                              messages.conversation
5. select   sharegpt: languages; cut into parts of max_tokens          sharegpt.py
6. write    NAME.jsonl, NAME_dropped.jsonl, then NAME.json; each whole or not at all
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longalign.data.messages import BadSample, Messages, Raw, conversation, understand
from longalign.data.parallel import count_processes, each
from longalign.data.sources.records import files_of, is_dataset, records
from longalign.data.sources.shape import Shape
from longalign.data.sources.sharegpt import Pages
from longalign.errors import UserError
from longalign.files import disk_errors, require_disk, versions, whole_file, write_json
from longalign.model.load import load_tokenizer, template_settings, tokenizer_hash
from longalign.progress import Bar
from longalign.schema import Config, Conversations, Hub, ShareGPT


@dataclass
class Converted:
    """What became of one record."""

    file: str
    line: int
    samples: list[dict[str, Any]] = field(default_factory=list)  # lines of the output; several if it was cut
    dropped: str | None = None  # the reason
    changes: Counter[str] = field(default_factory=Counter)


class Converter:
    """Converts records; one in each worker process. Raises UserError for settings that cannot hold."""

    def __init__(self, config: Config):
        source = config.source
        assert isinstance(source, Conversations)
        self.shape = Shape(source)
        self.pages = Pages(config, source) if isinstance(source, ShareGPT) else None

    def __call__(self, raw: Raw) -> Converted:
        out = Converted(raw.file, raw.line)
        try:
            if isinstance(raw.value, BadSample):
                raise raw.value
            record = understand(raw)
            messages = self._messages(record, out.changes)
            parts = self.pages.parts(messages) if self.pages else [messages]
            identity = self.shape.id(record)
        except BadSample as reason:
            return Converted(raw.file, raw.line, dropped=str(reason))
        out.samples = [{"messages": part} for part in parts]
        if len(parts) > 1:
            out.changes["conversations cut into parts"] += 1
            identity = f"{Path(raw.file).name}:{raw.line}" if identity is None else identity
        for number, sample in enumerate(out.samples, start=1):
            sample |= {} if identity is None else {"id": identity}
            sample |= {"part": number} if len(parts) > 1 else {}
        return out

    def _messages(self, record: dict[str, Any], changes: Counter[str]) -> Messages:
        """The record's conversation, paired; what was changed is counted. Raises BadSample."""
        messages = self.shape.messages(record)
        if self.pages:
            messages, cleaned = self.pages.clean(messages)
            changes.update(cleaned)
        spoken = [m for m in messages if not _is_empty(m["content"])]
        if spoken != messages:
            changes["empty turns left out"] += len(messages) - len(spoken)
        if messages and not spoken:
            raise BadSample("every turn is empty")
        paired, repairs = conversation({"messages": spoken})
        changes.update(repairs)
        return paired


def _is_empty(content: Any) -> bool:
    return content is None or (isinstance(content, str) and not content.strip())


def outputs(config: Config, source: Conversations, files: list[Path]) -> tuple[Path, Path, Path]:
    """The conversations, what was left out, the manifest. Raises UserError for a name that is missing or taken."""
    name, folder = source.output, Path(config.output_dir or "")
    if name is None and is_dataset(source):
        name = Path(str(source.path)).absolute().name
    elif name is None and len(files) > 1:
        raise UserError(f"source.path gives {len(files)} files: name the one they become, source.output=NAME")
    elif name is None:
        name = files[0].name.split(".")[0]
    paths = folder / f"{name}.jsonl", folder / f"{name}_dropped.jsonl", folder / f"{name}.json"
    for path in paths:
        if path.resolve() in [file.resolve() for file in files]:
            raise UserError(f"source.path={path} would be overwritten by its own result; give source.output=NAME")
        if path.exists() and not config.overwrite:
            raise UserError(f"{path} exists already; overwrite=true replaces it, source.output=NAME writes another")
    return paths


def describe(config: Config, source: Conversations) -> list[str]:
    """What would be read and written. Raises UserError if there is nothing to read."""
    files = files_of(source)
    told = [f"read {file} ({file.stat().st_size:,} bytes)" for file in files]
    if isinstance(source, Hub) and not files:
        where = "folder" if Path(source.path).is_dir() else "hub"
        told = [f"read {source.path}, split {source.split}, subset {source.subset or 'default'} ({where})"]
    return [*told, *(f"write {path}" for path in outputs(config, source, files))]


def prepare(config: Config, source: Conversations) -> list[str]:
    """Run the source; returns what to tell. Raises UserError for missing files, files in the way, nothing usable."""
    files = files_of(source)
    data, dropped, manifest = outputs(config, source, files)
    Converter(config)  # a wrong setting is told here, not by each worker
    require_disk(data, sum(file.stat().st_size for file in files), "output_dir")
    counts: dict[str, int] = {"records_in": 0, "records_kept": 0, "conversations_out": 0}
    reasons, changes = Counter[str](), Counter[str]()
    with disk_errors(data, "output_dir"):
        data.parent.mkdir(parents=True, exist_ok=True)  # it may hold other raw data, which stays
        with whole_file(dropped) as left_out, whole_file(data) as kept, Bar("prepare", None, "records") as bar:
            for one in each(Converter, config, records(source), count_processes(config, files)):
                counts["records_in"] += 1
                counts["records_kept"] += one.dropped is None
                counts["conversations_out"] += len(one.samples)
                kept.writelines(_line(sample) for sample in one.samples)
                left_out.writelines(_line(entry) for entry in _left_out(one))
                reasons.update([one.dropped] if one.dropped else [])
                changes.update(one.changes)
                bar.advance(1)
            if not counts["conversations_out"]:
                raise UserError(f"no conversation is left: {_why(source, reasons)}")
            manifest.unlink(missing_ok=True)  # an older one would not tell about the files now put in place
        write_json(
            manifest, {**_settings(config, source, files), **counts, **_ordered(dropped=reasons, changes=changes)}
        )
    told = [f"{data}: {counts['conversations_out']:,} conversations of {counts['records_in']:,} records"]
    told += [f"  {n:,} x {change}" for change, n in changes.most_common()]
    told += [f"  {n:,} dropped: {reason}" for reason, n in reasons.most_common()]
    return [*told, f"  what was left out is named in {dropped}"] if dropped.stat().st_size else told


def _why(source: Conversations, reasons: Counter[str]) -> str:
    """Why every record was dropped, and what the first of them looks like."""
    said = ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common(3)) or "there is no record"
    for first in records(source):
        with contextlib.suppress(BadSample):
            said += f"; {first.file}, record 1, has {', '.join(map(repr, understand(first)))}"
        break
    return f"{said}; source.format, source.fields and source.roles say what is what"


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _left_out(one: Converted) -> list[dict[str, Any]]:
    """The record itself, or what was left out of it."""
    said = [one.dropped] if one.dropped else [change for change in one.changes if "left out" in change]
    return [{"file": one.file, "line": one.line, "reason": r, "rest_kept": not one.dropped} for r in said]


def _ordered(**counters: Counter[str]) -> dict[str, dict[str, int]]:
    return {name: dict(counter.most_common()) for name, counter in counters.items()}


def _settings(config: Config, source: Conversations, files: list[Path]) -> dict[str, Any]:
    """What decided the result, for the manifest."""
    told: dict[str, Any] = {"source": source.model_dump(), "files": {str(f): f.stat().st_size for f in files}}
    packages = ["datasets"] if isinstance(source, Hub) else []
    if isinstance(source, ShareGPT):
        packages = ["markdownify", "beautifulsoup4", "py3langid"]
        if source.max_tokens:
            told |= {"tokenizer": config.model.tokenizer, "tokenizer_hash": tokenizer_hash(load_tokenizer(config))}
            told |= template_settings(config)
            packages += ["transformers", "tokenizers"]
    return {**told, "versions": versions(*packages)}
