"""Which samples share a pack and in which order packs are trained on: numpy in, numpy out.

    lengths of all samples -> packs of one epoch (naive, sorted, packing, balanced)

Every sample stands in exactly one pack, and the same seed gives the same packs.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

from longalign.model.cost import Cost
from longalign.schema import Strategy

SPREAD_FILL = 0.999  # how full `spread` plans packs: with no room to spare the last samples need packs of their own


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


def spread(lengths: np.ndarray, max_length: int, order: np.ndarray, window: int) -> Packs:
    """Worst-fit decreasing into a fixed number of packs, within windows of `window` samples of the given order.

    Longest first, each sample goes into the emptiest pack of as many as the window's tokens fill, so that every pack
    gets its share of long and short samples: costs and targets of packs vary less than those of best_fit, which leaves
    packs of nothing but short samples. One more pack is opened for a sample that fits nowhere.
    """
    packs: list[list[int]] = []
    for start in range(0, len(order), window):
        mine = order[start : start + window].astype(np.int64)
        mine = mine[np.argsort(-lengths[mine], kind="stable")]
        count = math.ceil(lengths[mine].sum() / (SPREAD_FILL * max_length))
        filled: list[list[int]] = [[] for _ in range(count)]
        emptiest = [(0, pack) for pack in range(count)]  # a heap of (tokens, pack)
        for sample, length in zip(mine.tolist(), lengths[mine].tolist(), strict=True):
            tokens, pack = emptiest[0]
            if tokens + length <= max_length:
                heapq.heapreplace(emptiest, (tokens + length, pack))
            else:
                pack = len(filled)
                filled.append([])
                heapq.heappush(emptiest, (length, pack))
            filled[pack].append(sample)
        packs += [samples for samples in filled if samples]
    offsets = np.cumsum([0, *map(len, packs)])
    return Packs(np.array([s for pack in packs for s in pack], np.int64), offsets)


def equal_cost(
    lengths: np.ndarray, cost: Cost, pack_tokens: int, target: float, order: np.ndarray, window: int
) -> Packs:
    """Packs of like cost: the costliest sample left goes into the cheapest pack with room (longest processing time
    first), within windows of about `window` samples of the given order.

    A window has as few packs as tokens allow and as a mean cost of `target` at most allows. A pack that nothing fits
    into waits in `full` until samples are short enough.
    """
    packs: list[list[int]] = []
    for samples in np.array_split(order, max(1, round(len(order) / window))):
        mine = samples[np.argsort(-lengths[samples], kind="stable")]
        tokens, costs = lengths[mine], cost(lengths[mine])
        fewest = max(tokens.sum(dtype=np.int64) / pack_tokens, costs.sum() / target)
        count = min(len(mine), math.ceil(fewest))
        filled: list[list[int]] = [[] for _ in range(count)]
        room = [pack_tokens] * count
        open_ = [(0.0, pack) for pack in range(count)]  # a heap of (cost, pack)
        full: list[tuple[int, float, int]] = []  # a heap of (-room, cost, pack)
        for sample, length, its_cost in zip(mine.tolist(), tokens.tolist(), costs.tolist(), strict=True):
            while full and -full[0][0] >= length:
                heapq.heappush(open_, heapq.heappop(full)[1:])
            if not open_:
                open_.append((0.0, len(filled)))
                filled.append([])
                room.append(pack_tokens)
            so_far, pack = heapq.heappop(open_)
            filled[pack].append(sample)
            room[pack] -= length
            heapq.heappush(full, (-room[pack], so_far + its_cost, pack))
        packs += filled
    return Packs(np.array([s for pack in packs for s in pack], np.int64), np.cumsum([0, *map(len, packs)]))


def stratify(costs: np.ndarray, per_step: int, strata: int, rng: np.random.Generator) -> np.ndarray:
    """Packs in training order, so that packs of like cost can run at the same time and steps are still alike.

    Packs in order of cost are cut into `strata` equal parts, and each part into groups of per_step / strata
    neighbours. A step is one group of each part, and steps come in random order: with as many ranks as a group has
    packs, every micro-step runs one group. Where one part's groups rise in cost the next one's fall, so that steps cost
    nearly the same. No step is long or short, as those of sorted batching are, unless strata is 1. What is left over,
    evenly spaced in cost, is the last step.

    costs: float [packs]. Returns int64 [packs], places in costs.
    """
    shuffled = rng.permutation(len(costs))  # so that equal costs meet at random
    order = shuffled[np.argsort(costs[shuffled], kind="stable")]
    steps, rest = divmod(len(costs), per_step)
    left = ((np.arange(rest) + rng.random()) * len(costs) / max(rest, 1)).astype(np.int64)
    groups = np.delete(order, left).reshape(strata, steps, per_step // strata)
    groups[1::2] = groups[1::2, ::-1].copy()
    return np.concatenate([rng.permutation(groups.swapaxes(0, 1)).reshape(-1), order[left]])


def in_order(packs: Packs, order: np.ndarray) -> Packs:
    """The packs in another order. order: int64 [packs]."""
    sizes = np.diff(packs.offsets)[order]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes)
    return Packs(packs.samples[np.repeat(packs.offsets[:-1][order], sizes) + within], offsets)


def epoch_packs(
    lengths: np.ndarray,
    strategy: Strategy,
    max_length: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    cost: Cost | None = None,
) -> Packs:
    """The packs of one epoch in training order; regrouped from (seed, epoch). cost: of a sample.

    Without shuffle naive and next-fit packing keep the order of samples; the others have an order of their own.
    """
    rng = np.random.default_rng([seed, epoch])
    if strategy.name == "sorted":
        return one_each(sort_in_runs(lengths, strategy.group_size, rng))
    order = rng.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    if strategy.name == "naive":
        return one_each(order)
    size = pack_tokens(strategy, max_length)
    if strategy.packer == "next_fit":
        packs = next_fit(lengths, size, order)
    elif strategy.packer == "equal_cost":
        assert cost is not None
        packs = equal_cost(lengths, cost, size, float(cost(max_length)), order, strategy.window)
    else:
        fill = best_fit if strategy.packer == "best_fit" else spread
        packs = fill(lengths, size, order, strategy.window)
    if strategy.name == "balanced":
        assert cost is not None
        costs = np.add.reduceat(cost(lengths[packs.samples]), packs.offsets[:-1])
        return in_order(packs, stratify(costs, strategy.packs_per_step, strategy.strata, rng))
    return packs if strategy.packer == "next_fit" else in_order(packs, rng.permutation(len(packs.offsets) - 1))


def pack_tokens(strategy: Strategy, max_length: int) -> int:
    """The most tokens of a pack."""
    return strategy.pack_tokens or max_length


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


def balance(costs: np.ndarray, per_step: int, ranks: int, values: np.ndarray | None = None) -> float:
    """The mean over ranks over the maximum, summed over the micro-steps of all steps of per_step packs.

    1 = nobody waits. Packs are dealt by their costs as `deal` does; `values`, by default the costs, are what is
    weighed; both float [packs].
    """
    steps = -(-len(costs) // per_step)
    width = -(-per_step // ranks) * ranks
    dealt = np.zeros((2, steps, width))
    for row, numbers in zip(dealt, (costs, costs if values is None else values), strict=True):
        padded = np.zeros(steps * per_step)
        padded[: len(numbers)] = numbers
        row[:, :per_step] = padded.reshape(steps, per_step)
    by_cost = np.argsort(-dealt[0], axis=1, kind="stable")
    micro = np.take_along_axis(dealt[1], by_cost, axis=1).reshape(steps, -1, ranks)
    longest = micro.max(axis=2).sum()
    return float(micro.mean(axis=2).sum() / longest) if longest else 1.0
