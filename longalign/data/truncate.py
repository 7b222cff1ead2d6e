"""Cutting a row that is longer than max_length."""

from __future__ import annotations

from typing import Literal

import numpy as np

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
    excess = len(row.ids) - max_length
    if excess <= 0:
        return row
    if how in ("drop", "error"):
        raise BadSample("too long")
    start, stop = max_length, len(row.ids)
    if how == "middle":
        first, last = _longest_without_target(row.targets)
        if last - first >= excess + 2 * MARGIN:
            start = first + (last - first - excess) // 2
            stop = start + excess
    cut = Row(np.delete(row.ids, slice(start, stop)), np.delete(row.targets, slice(start, stop)))
    if not cut.n_target:
        raise BadSample("no target left after truncation")
    return cut


def _longest_without_target(targets: np.ndarray) -> tuple[int, int]:
    """(start, stop) of the first of the longest stretches between targets, the row's ends included."""
    borders = np.concatenate([[-1], np.flatnonzero(targets != IGNORE), [len(targets)]])
    widest = int(np.argmax(np.diff(borders)))
    return int(borders[widest]) + 1, int(borders[widest + 1])
