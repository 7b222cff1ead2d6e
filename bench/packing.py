"""How full packs get and how long planning takes, on a long-tailed mix of lengths like the paper's.

    python bench/packing.py [samples]

85,000 samples by default: 15 in 17 short (log-normal around 800 tokens, at most 8,192), 2 in 17 spread evenly over
8k to 64k (paper section 3.3 and Figure 3, left). Prints fill ratio, sequences per pack, seconds; one seed.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from longalign.data.packing import epoch_packs
from longalign.schema import Strategy

MAX_LENGTH = 65536


def paper_like(n: int, rng: np.random.Generator) -> np.ndarray:
    short = np.clip(rng.lognormal(np.log(800), 1.0, n - n * 2 // 17), 16, 8192)
    long = rng.uniform(8192, MAX_LENGTH, n * 2 // 17)
    return rng.permutation(np.concatenate([short, long]).astype(np.int64))


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 85_000
    lengths = paper_like(n, np.random.default_rng(0))
    table = Table(title=f"{n:,} samples, {lengths.sum():,} tokens", title_justify="left", box=box.SIMPLE)
    for column in ("strategy", "packs", "fill ratio", "sequences/pack", "seconds"):
        table.add_column(column, justify="right")
    for name, packer in (
        ("naive", "best_fit"),
        ("sorted", "best_fit"),
        ("packing", "next_fit"),
        ("packing", "best_fit"),
    ):
        strategy = Strategy(
            name=name, average="sequence", batch_size=96, group_size=8, packs_per_step=8, packer=packer, window=5000
        )
        start = time.perf_counter()
        packs = epoch_packs(lengths, strategy, MAX_LENGTH, seed=0, epoch=0)
        seconds, count = time.perf_counter() - start, len(packs.offsets) - 1
        label = f"{name}, {packer}" if name == "packing" else name
        fill = lengths.sum() / count / MAX_LENGTH
        table.add_row(label, f"{count:,}", f"{fill:.4f}", f"{n / count:.1f}", f"{seconds:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
