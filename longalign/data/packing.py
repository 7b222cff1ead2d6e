"""Which samples share a pack and in which order packs are trained on: numpy in, numpy out.

    lengths of all samples -> packs of one epoch (naive, sorted, packing)

Every sample stands in exactly one pack, and the same seed gives the same packs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

from longalign.schema import Strategy


class Packs(NamedTuple):
    """Pack p holds samples[offsets[p] : offsets[p + 1]]."""

    samples: np.ndarray  # int64, places in `lengths`
    offsets: np.ndarray  # int64 [packs + 1]


# -- strategies: one epoch's packs, in training order -----------------------------------------------------


def one_each(order: np.ndarray) -> Packs:
    """Every sample its own pack."""
    return Packs(order.astype(np.int64), np.arange(len(order) + 1))


def sort_in_runs(lengths: np.ndarray, group_size: int, rng: np.random.Generator) -> np.ndarray:
    """Runs of `group_size` neighbours in length order, the runs in random order; a shorter last run stays last.

    Paper section 3.3, "sorted batching": a batch of neighbours in length, chosen without repetition.
    """
    shuffled = rng.permutation(len(lengths))  # so that equal lengths meet at random
    order = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    rest = len(order) % group_size
    # the samples outside whole runs are taken from a random place, not always the longest
    first = group_size * rng.integers(len(order) // group_size + 1)
    runs = np.delete(order, np.s_[first : first + rest]).reshape(-1, group_size)
    return np.concatenate([rng.permutation(runs).reshape(-1), order[first : first + rest]])


def next_fit(lengths: np.ndarray, max_length: int, order: np.ndarray) -> Packs:
    """Fill a pack in the given order until the next sample does not fit: the paper's packing.

    max_length 8, lengths 3 5 4 -> packs (3 5) (4): an exact fill is allowed, the last pack is kept.
    """
    offsets, room = [0], max_length
    for place, length in enumerate(lengths[order].tolist()):
        if length > room:
            offsets.append(place)
            room = max_length
        room -= length
    return Packs(order.astype(np.int64), np.array([*offsets, len(order)]))


def best_fit(lengths: np.ndarray, max_length: int, order: np.ndarray, window: int) -> Packs:
    """Best-fit decreasing within windows of `window` samples of the given order.

    Longest first, each sample goes into the fullest pack that still has room for it. Samples of a window's pack
    that ended less than 99% full wait for the next window.
    """
    packs: list[list[int]] = []
    waiting: list[int] = []
    for start in range(0, len(order), window):
        mine = np.concatenate([np.array(waiting, np.int64), order[start : start + window].astype(np.int64)])
        mine = mine[np.argsort(-lengths[mine], kind="stable")]
        rooms: list[tuple[int, int]] = []  # (room, pack), sorted
        filled: list[list[int]] = []
        room_of: list[int] = []
        for sample, length in zip(mine.tolist(), lengths[mine].tolist(), strict=True):
            place = bisect_left(rooms, (length, -1))
            if place < len(rooms):
                room, pack = rooms.pop(place)
                filled[pack].append(sample)
            else:
                room, pack = max_length, len(filled)
                filled.append([sample])
                room_of.append(max_length)
            room_of[pack] = room - length
            if room_of[pack]:
                insort(rooms, (room_of[pack], pack))
        last = start + window >= len(order)
        waiting = []
        for samples, room in zip(filled, room_of, strict=True):
            if room * 100 > max_length and not last:
                waiting += samples
            else:
                packs.append(samples)
    offsets = np.cumsum([0, *map(len, packs)])
    return Packs(np.array([s for pack in packs for s in pack], np.int64), offsets)


def shuffle_packs(packs: Packs, rng: np.random.Generator) -> Packs:
    order = rng.permutation(len(packs.offsets) - 1)
    sizes = np.diff(packs.offsets)[order]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes)
    return Packs(packs.samples[np.repeat(packs.offsets[:-1][order], sizes) + within], offsets)


def epoch_packs(
    lengths: np.ndarray, strategy: Strategy, max_length: int, seed: int, epoch: int, shuffle: bool = True
) -> Packs:
    """The packs of one epoch in training order; regrouped from (seed, epoch).

    Without shuffle naive and next-fit packing keep the order of samples; the others have an order of their own.
    """
    rng = np.random.default_rng([seed, epoch])
    if strategy.name == "sorted":
        return one_each(sort_in_runs(lengths, strategy.group_size, rng))
    order = rng.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    if strategy.name == "naive":
        return one_each(order)
    if strategy.packer == "next_fit":
        return next_fit(lengths, max_length, order)
    return shuffle_packs(best_fit(lengths, max_length, order, strategy.window), rng)


def packs_per_step(strategy: Strategy) -> int:
    return strategy.batch_size if strategy.name in ("naive", "sorted") else strategy.packs_per_step


# -- ranks ------------------------------------------------------------------------------------------------


def deal(costs: list[float], ranks: int, per_micro_step: int = 1) -> list[list[list[int]]]:
    """Spread a step's packs over ranks: deal(...)[micro_step][rank] = places in `costs`, maybe none.

    Packs of similar cost run at the same time, since under ZeRO-3 all ranks wait for the slowest at every
    micro-step: deal([1, 9, 8, 2], ranks=2) == [[[1], [2]], [[3], [0]]].
    """
    order = sorted(range(len(costs)), key=lambda p: -costs[p])
    width = ranks * per_micro_step
    return [[order[at + r : at + width : ranks] for r in range(ranks)] for at in range(0, len(order), width)]


def idle_share(costs: list[float], ranks: int, per_micro_step: int = 1) -> float:
    """The share of all ranks' time spent waiting in a step, if time is cost."""
    slices = [[sum(costs[p] for p in packs) for packs in m] for m in deal(costs, ranks, per_micro_step)]
    busy = sum(max(m) for m in slices) * ranks
    return 1 - sum(costs) / busy if busy else 0.0
