"""A record -> rows of token ids, as many as its template makes of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from longalign.data.messages import SYSTEM_MERGED, BadSample, Raw, conversation, understand
from longalign.data.truncate import truncate
from longalign.model.load import load_template
from longalign.schema import Config


@dataclass
class Encoded:
    """What became of one record."""

    file: str
    line: int
    rows: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # (input_ids, labels), int32
    dropped: str | None = None  # the reason
    tokens_in: int = 0
    targets_in: int = 0
    tokens_cut: int = 0
    n_cut: int = 0
    changes: Counter[str] = field(default_factory=Counter)  # to the messages, see messages.conversation
    rows_dropped: Counter[str] = field(default_factory=Counter)  # reasons, where other rows of the record are kept


class Encoder:
    """Encodes records; one in each worker process."""

    def __init__(self, config: Config):
        self.max_length, self.how = config.max_length, config.truncate
        self.template = load_template(config)

    def __call__(self, raw: Raw) -> Encoded:
        out = Encoded(raw.file, raw.line)
        try:
            sample = understand(raw)
            if self.template.name == "text":
                if not isinstance(sample.get("text"), str):
                    raise BadSample('no "text"')
                rows = [self.template.text_row(sample["text"])]
            else:
                messages, out.changes = conversation(sample)
                if messages[0]["role"] == "system" and not self.template.has_system:
                    out.changes[SYSTEM_MERGED] += 1
                rows = self.template.rows(messages)
            out.tokens_in = sum(len(row.input_ids) for row in rows)
            out.targets_in = sum(row.n_target for row in rows)
            for row in rows:
                try:
                    kept = truncate(row, self.max_length, self.how)
                except BadSample as reason:
                    out.rows_dropped[str(reason)] += 1
                    continue
                out.tokens_cut += len(row.input_ids) - len(kept.input_ids)
                out.n_cut += len(kept.input_ids) < len(row.input_ids)
                out.rows.append((np.array(kept.input_ids, np.int32), np.array(kept.labels, np.int32)))
            if not out.rows:
                raise BadSample(next(iter(out.rows_dropped)))
        except BadSample as reason:
            out.dropped = str(reason)
            out.rows_dropped.clear()
            out.changes.clear()
        return out
