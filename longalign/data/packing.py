"""Which samples share a pack and in which order packs are trained on: numpy in, numpy out.

    lengths of all samples -> packs of one epoch (naive, sorted, packing, balanced)

Every sample stands in exactly one pack, and the same seed gives the same packs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from longalign.model.cost import Cost
from longalign.schema import Strategy


class Packs(NamedTuple):
    """Pack p holds samples[offsets[p] : offsets[p + 1]]."""

    samples: np.ndarray  # int64, places in `lengths`
    offsets: np.ndarray  # int64 [packs + 1]


TOKENS = Cost(1.0, 0.0)  # where nothing is known of the model


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
        count = min(len(mine), int(np.ceil(fewest)))
        filled: list[list[int]] = [[] for _ in range(count)]
        room = [pack_tokens] * count
        open_ = [(0.0, pack) for pack in range(count)]  # a heap of (cost, pack)
        full: list[tuple[int, float, int]] = []  # a heap of (-room, cost, pack)
        for sample, length, its_cost in zip(mine.tolist(), tokens.tolist(), costs.tolist(), strict=True):
            while full and -full[0][0] >= length:
                heappush(open_, heappop(full)[1:])
            if not open_:
                open_.append((0.0, len(filled)))
                filled.append([])
                room.append(pack_tokens)
            so_far, pack = heappop(open_)
            filled[pack].append(sample)
            room[pack] -= length
            heappush(full, (-room[pack], so_far + its_cost, pack))
        packs += filled
    return Packs(np.array([s for pack in packs for s in pack], np.int64), np.cumsum([0, *map(len, packs)]))


# -- the order of packs: which share a step ---------------------------------------------------------------


def stratify(costs: np.ndarray, per_step: int, strata: int, rng: np.random.Generator) -> np.ndarray:
    """An order of packs in which every step draws from all costs, and yet its packs come in runs of like cost.

    All packs are cut by cost into `strata` equal parts, and a step has a run of neighbours of each. Where one part's
    runs rise the next one's fall, so that steps cost the same. Packs of a run can run at the same time on per_step /
    strata ranks without waiting. strata=1 sorts steps by cost. Packs outside whole steps, drawn at random, are last.
    Steps too small for runs of two are random.
    """
    order = rng.permutation(len(costs))
    if per_step < 2 * strata:
        return order
    steps = len(order) // per_step
    whole, rest = order[: steps * per_step], order[steps * per_step :]
    whole = whole[np.argsort(-costs[whole], kind="stable")]
    sizes = [len(part) for part in np.array_split(np.arange(per_step), strata)]
    parts = np.split(whole, steps * np.cumsum(sizes)[:-1])
    runs = [part.reshape(steps, size)[:: (-1) ** n] for n, (part, size) in enumerate(zip(parts, sizes, strict=True))]
    return np.concatenate([rng.permutation(np.concatenate(runs, axis=1)).reshape(-1), rest])


def in_order(packs: Packs, order: np.ndarray) -> Packs:
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
    cost: Cost = TOKENS,
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
    size = pack_tokens(strategy, max_length)
    if strategy.name == "balanced":
        packs = equal_cost(lengths, cost, size, float(cost(max_length)), order, strategy.window)
        costs = np.add.reduceat(cost(lengths[packs.samples]), packs.offsets[:-1])
        return in_order(packs, stratify(costs, strategy.packs_per_step, strategy.strata, rng))
    if strategy.packer == "next_fit":
        return next_fit(lengths, size, order)
    packs = best_fit(lengths, size, order, strategy.window)
    return in_order(packs, rng.permutation(len(packs.offsets) - 1))


def pack_tokens(strategy: Strategy, max_length: int) -> int:
    """The most tokens of a pack."""
    return strategy.pack_tokens or max_length


def packs_per_step(strategy: Strategy) -> int:
    return strategy.batch_size if strategy.name in ("naive", "sorted") else strategy.packs_per_step


# -- ranks ------------------------------------------------------------------------------------------------


def deal(costs: list[float], ranks: int, per_micro_step: int = 1) -> list[list[list[int]]]:
    """Spread a step's packs over ranks: deal(...)[micro_step][rank] = places in `costs`, maybe none.

    Packs of similar cost run at the same time, since under ZeRO-3 all ranks wait for the slowest at every
    micro-step. Every other row of `ranks` packs is dealt backwards, so that ranks that wait only at a step's end share
    it evenly, too: deal([1, 9, 8, 2], ranks=2) == [[[1], [2]], [[0], [3]]].
    """
    order = sorted(range(len(costs)), key=lambda p: -costs[p])
    rows: list[list[list[int]]] = [
        [order[at + r : at + r + 1] for r in range(ranks)] for at in range(0, len(order), ranks)
    ]
    rows[1::2] = [row[::-1] for row in rows[1::2]]
    together = [rows[at : at + per_micro_step] for at in range(0, len(rows), per_micro_step)]
    return [[[p for row in some for p in row[r]] for r in range(ranks)] for some in together]


def idle_share(costs: list[float], ranks: int, per_micro_step: int = 1) -> float:
    """The share of all ranks' time spent waiting in a step, if time is cost."""
    slices = [[sum(costs[p] for p in packs) for packs in m] for m in deal(costs, ranks, per_micro_step)]
    busy = sum(max(m) for m in slices) * ranks
    return 1 - sum(costs) / busy if busy else 0.0


def dealt(step: np.ndarray, cost: np.ndarray, values: np.ndarray, ranks: int, per_micro_step: int = 1) -> np.ndarray:
    """Sums of `values` by rank, if `deal` deals each step's packs by cost: float64 [steps, micro-steps, ranks].

    step, cost, values: of every pack of a plan, in its order.
    """
    step = step - step[0]
    sizes = np.bincount(step)
    slices = -(-int(sizes.max()) // (ranks * per_micro_step))
    order = np.lexsort((-cost, step))  # by step, as packs already are, so that `step` holds for `order`, too
    row, rank = np.divmod(np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes), ranks)
    rows = np.zeros((len(sizes), slices * per_micro_step, ranks))
    rows[step, row, np.where(row % 2, ranks - 1 - rank, rank)] = values[order]
    return rows.reshape(len(sizes), slices, per_micro_step, ranks).sum(2)


def mean_over_max(dealt_values: np.ndarray) -> float:
    """How evenly ranks share a step, the mean of all steps; 1 = evenly."""
    of_ranks = dealt_values.sum(1)
    largest = of_ranks.max(1)
    return float(np.divide(of_ranks.mean(1), largest, out=np.ones_like(largest), where=largest > 0).mean())


def idle(dealt_costs: np.ndarray) -> float:
    """The share of all ranks' time spent waiting, over all steps, if time is cost and all wait at every micro-step."""
    return 1 - float(dealt_costs.sum() / (dealt_costs.max(2).sum() * dealt_costs.shape[2]))
