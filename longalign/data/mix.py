"""How often each sample stands in an epoch, by source (mix.NAME.weight, mix.NAME.max_samples), and weighs in the loss.

A source's samples stand in a ring, in an order drawn from the seed, and every epoch takes the next k of them:
k = weight * samples, max_samples at most. With 4 samples in the order a b c d:

    weight 0.5    a b | c d | a b | ...                half of them, the other half next epoch
    weight 2      a a b b c c d d | ...                each of them twice
    weight 2.5    a a a b b b c c d d | a a b b c c c d d d | ...

So after any number of epochs no sample of a source has been seen more than once more often than another.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from longalign.data.packing import Packs
from longalign.errors import UserError
from longalign.schema import Mix


def check_names(mix: Mapping[str, Mix], sources: list[str]) -> None:
    """Raises UserError if a source is named that the data does not have."""
    if unknown := [name for name in mix if name not in sources]:
        raise UserError(f"mix.{unknown[0]}: the data has no such source, only {', '.join(sources)}")


def epoch_samples(source: np.ndarray, sources: list[str], mix: Mapping[str, Mix], seed: int, epoch: int) -> np.ndarray:
    """Places of an epoch's samples, int64, ascending, each as often as it stands in the epoch.

    source: of each sample the place of its source's name in `sources`. Without a mix: every place once.
    """
    chosen = [np.empty(0, np.int64)]
    for number, name in enumerate(sources):
        mine, wanted = np.flatnonzero(source == number), mix.get(name, Mix())
        per_epoch = wanted.weight * len(mine)
        if wanted.max_samples is not None:
            per_epoch = min(per_epoch, wanted.max_samples)
        ring = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(mine)
        # rounded from the start of all epochs, so that what one epoch lacks of a fraction the next one has
        turns = np.arange(round(epoch * per_epoch), round((epoch + 1) * per_epoch))
        chosen.append(ring[turns % max(len(mine), 1)])
    return np.sort(np.concatenate(chosen))


def loss_weights(
    packs: Packs, n_target: np.ndarray, source: np.ndarray, n_sources: int, average: str, per_step: int
) -> np.ndarray:
    """The weight of each source in a step's loss, the mean over steps, float64 [n_sources], 1 in all.

    n_target and source are those of every sample. A sample weighs more the fewer others its step has, or, with
    average=pack, its pack: the paper's Eq. 2 (sequence) and Eq. 3 (pack).
    """
    pack = np.repeat(np.arange(len(packs.offsets) - 1), np.diff(packs.offsets))
    target = n_target[packs.samples].astype(np.float64)
    weights = np.ones_like(target) if average == "sequence" else target
    if average == "pack":
        weights = target / np.bincount(pack, target)[pack]
    step = pack // per_step
    of_step = weights / np.bincount(step, weights)[step]
    return np.bincount(source[packs.samples], of_step, n_sources) / (step[-1] + 1)
