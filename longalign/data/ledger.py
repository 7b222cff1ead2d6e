"""The account of one source: what went in, what was kept and why the rest was not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from longalign.data.encode import Encoded


@dataclass
class Ledger:
    """Of one chunk or of one source. Always rows = rows_kept + rows_not_chosen + rows_held_out."""

    samples_in: int = 0
    rows: int = 0  # a template that rewrites earlier turns gives one row per assistant turn
    rows_not_chosen: int = 0  # by datanum
    rows_held_out: int = 0  # by eval_fraction
    rows_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    changes: Counter[str] = field(default_factory=Counter)  # to the messages of kept samples
    tokens_in: int = 0
    tokens_cut: int = 0
    tokens_elsewhere: int = 0  # of rows that are held out or not chosen
    tokens_kept: int = 0
    targets_in: int = 0
    targets_elsewhere: int = 0  # of rows that are held out or not chosen
    targets_kept: int = 0

    def add(self, encoded: Encoded) -> None:
        self.samples_in += 1
        self.rows += len(encoded.rows)
        self.tokens_in += encoded.tokens_in
        self.targets_in += encoded.targets_in
        self.tokens_cut += encoded.tokens_cut
        self.truncated += encoded.n_cut
        self.changes += encoded.changes
        for reason, n in encoded.rows_dropped.items():
            self.dropped[f"{reason} (one turn of several)"] += n
        if encoded.dropped:
            self.dropped[encoded.dropped] += 1

    def add_counts(self, counts: dict[str, Any]) -> None:
        """Add another ledger, given as_dict()."""
        for one in fields(self):
            mine, more = getattr(self, one.name), counts[one.name]
            setattr(self, one.name, mine + (Counter(more) if isinstance(mine, Counter) else more))

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "dropped": dict(self.dropped.most_common()), "changes": dict(self.changes)}
