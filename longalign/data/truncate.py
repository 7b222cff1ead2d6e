"""Cutting a row that is longer than max_length."""

from __future__ import annotations

from typing import Literal

from longalign.data.messages import BadSample
from longalign.data.template import IGNORE, Row

Truncate = Literal["right", "middle", "drop", "error"]
MARGIN = 64  # tokens that `middle` leaves at least at either end of the stretch it cuts: its head, the question


def truncate(row: Row, max_length: int, how: Truncate) -> Row:
    """Cut a row to `max_length` tokens. Raises BadSample if that is not allowed or leaves no target.

    right: keep the beginning, as the paper. middle: cut the middle out of the longest stretch without targets,
    normally the document of a question, so that its head, the question and the answers stay; a row whose length lies
    in many turns or in its answers has no such stretch and is cut from the right.
    """
    excess = len(row.input_ids) - max_length
    if excess <= 0:
        return row
    if how in ("drop", "error"):
        raise BadSample("too long")
    start, stop = max_length, len(row.input_ids)
    if how == "middle":
        first, last = _longest_without_target(row.labels)
        if last - first >= excess + 2 * MARGIN:
            start = first + (last - first - excess) // 2
            stop = start + excess
    cut = Row(row.input_ids[:start] + row.input_ids[stop:], row.labels[:start] + row.labels[stop:])
    if not cut.n_target:
        raise BadSample("no target left after truncation")
    return cut


def _longest_without_target(labels: list[int]) -> tuple[int, int]:
    best, first = (0, 0), 0
    for place, label in enumerate([*labels, 0]):
        if label != IGNORE:
            if place - first > best[1] - best[0]:
                best = (first, place)
            first = place + 1
    return best
