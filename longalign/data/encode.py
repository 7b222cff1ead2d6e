"""Records -> rows of token ids, as many as the template makes of each."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice

from longalign.data.chat_template import Segment
from longalign.data.messages import SYSTEM_MERGED, BadSample, Messages, Raw, conversation, understand
from longalign.data.template import Row, Template
from longalign.data.truncate import Truncate, truncate
from longalign.errors import UserError


@dataclass
class Encoded:
    """What became of one record."""

    file: str
    line: int
    rows: list[Row] = field(default_factory=list)
    content: int = 0  # 64-bit hash of what the conversation or text says, whatever else the record holds
    dropped: str | None = None  # the reason
    tokens_in: int = 0
    targets_in: int = 0
    tokens_cut: int = 0
    n_cut: int = 0
    changes: Counter[str] = field(default_factory=Counter)  # to the messages, see messages.conversation
    rows_dropped: Counter[str] = field(default_factory=Counter)  # reasons, where other rows of the record are kept

    def drop(self, reason: BadSample) -> None:
        self.dropped = str(reason)
        self.rows.clear()
        self.rows_dropped.clear()
        self.changes.clear()


class Encoder:
    """Encodes records, many at a time; one in each worker process."""

    def __init__(self, template: Template, max_length: int, how: Truncate):
        self.template, self.max_length, self.how = template, max_length, how

    def __call__(self, records: list[Raw]) -> list[Encoded]:
        """What became of each record.

        Raises UserError for one that is too long if truncate=error; any other exception names file and line.
        """
        try:
            return self._encode(records)
        except UserError:
            raise
        except Exception as error:
            if len(records) == 1:
                raise RuntimeError(f"{records[0].file}:{records[0].line}: {error!r}") from error
            for record in records:  # one of them is to blame
                self([record])
            raise

    def _encode(self, records: list[Raw]) -> list[Encoded]:
        done, segments = [], []
        for record in records:
            done.append(Encoded(record.file, record.line))
            segments.append(self._understand(record, done[-1]))
        rows = iter(self.template.encode([row for rows in segments for row in rows]))
        for out, of_record in zip(done, segments, strict=True):
            if not out.dropped:
                self._finish(out, [row for row in islice(rows, len(of_record)) if row.n_target])
        return done

    def _understand(self, record: Raw, out: Encoded) -> list[list[Segment]]:
        """The segments of each row, and what is to be said of the record; nothing if it is dropped."""
        try:
            sample = understand(record)
            if self.template.name == "text":
                text = sample.get("text")
                if not isinstance(text, str):
                    raise BadSample('no "text"')
                if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                    raise BadSample("half of a surrogate pair in the text")
                out.content = content_hash([{"role": "text", "content": text}])
                return [self.template.text_segments(text)]
            messages, out.changes = conversation(sample)
            out.content = content_hash(messages)
            if messages[0]["role"] == "system" and not self.template.has_system:
                out.changes[SYSTEM_MERGED] += 1
            return self.template.segments(messages)
        except BadSample as reason:
            out.drop(reason)
            return []

    def _finish(self, out: Encoded, rows: list[Row]) -> None:
        try:
            if not rows:
                raise BadSample("no target")
            out.tokens_in = sum(len(row.ids) for row in rows)
            out.targets_in = sum(row.n_target for row in rows)
            for row in rows:
                self._cut(out, row)
            if not out.rows:
                raise BadSample(next(iter(out.rows_dropped)))
        except BadSample as reason:
            out.drop(reason)

    def _cut(self, out: Encoded, row: Row) -> None:
        try:
            kept = truncate(row, self.max_length, self.how)
        except BadSample as reason:
            if self.how == "error":
                raise UserError(
                    f"{out.file}:{out.line} has {len(row.ids)} tokens, max_length={self.max_length}; "
                    "raise max_length or choose truncate=right, middle or drop"
                ) from None
            out.rows_dropped[str(reason)] += 1
            return
        out.tokens_cut += len(row.ids) - len(kept.ids)
        out.n_cut += len(kept.ids) < len(row.ids)
        out.rows.append(kept)


def content_hash(messages: Messages) -> int:
    """64 bits of what the messages say."""
    digest = hashlib.blake2b(digest_size=8)
    for message in messages:
        content = message["content"].encode()
        digest.update(f"{message['role']} {len(content)} ".encode() + content)
    return int.from_bytes(digest.digest(), "little")
