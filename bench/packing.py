"""How long `longalign group` takes and how full its packs get, on the lengths of the paper's mix.

    python bench/packing.py [samples] [lengths.npz] [tokens a row]

Writes a tokenised folder of that many samples (85,000 by default), whose lengths are drawn, with replacement, from
`length` and `n_target` of the npz file, else made like the paper's: 15 in 17 short (log-normal around 800 tokens, at
most 8,192), 2 in 17 spread evenly over 8k to 64k (section 3.3 and Figure 3, left). Its token lists are dummies of one
token each: planning never reads them. Then, for each strategy, in a process of its own that may use one core:

    long      the weight of samples of 8,192 tokens and more in a step's loss, the mean over steps
    seconds   the whole of what `longalign group` does for one epoch: open the folder, read its columns, plan, write
              plan.parquet and its manifest; without the start of Python and the imports
    peak      the most memory that process held, Python and its libraries included. The table is memory-mapped, and
              around a page that is read the kernel maps up to 64 KB of the file; long token lists add that much a
              batch of 64 rows and no more (1 GB for a million samples), which it takes back when memory is short
    read      seconds in which training's reader then goes through every step of the plan, and the peak after it
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, where Python would find tokenize.py in place of its own module

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

MAX_LENGTH = 65536
STRATEGIES = {
    "naive": ["strategy=naive"],
    "sorted": ["strategy=sorted"],
    "packing, next-fit": ["strategy=packing", "strategy.packer=next_fit"],
    "packing, best-fit": ["strategy=packing", "strategy.packer=best_fit"],
    "packing": ["strategy=packing"],
    "packing+weighting, next-fit": ["strategy=packing+weighting", "strategy.packer=next_fit"],
    "packing+weighting, best-fit": ["strategy=packing+weighting", "strategy.packer=best_fit"],
    "packing+weighting": ["strategy=packing+weighting"],
    "balanced": ["strategy=balanced"],
    "balanced, 1.5x": [
        "strategy=balanced",
        "strategy.packer=equal_cost",
        f"strategy.pack_tokens={MAX_LENGTH * 3 // 2}",
    ],
}


def paper_like(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(length, n_target) of n samples."""
    short = np.clip(rng.lognormal(np.log(800), 1.0, n - n * 2 // 17), 16, 8192)
    long = rng.uniform(8192, MAX_LENGTH, n * 2 // 17)
    length = rng.permutation(np.concatenate([short, long]).astype(np.int64))
    return length, np.where(length < 8192, length // 2, 400)


def write_data(folder: Path, length: np.ndarray, n_target: np.ndarray, tokens: int = 1) -> None:
    """A tokenised folder with so many dummy tokens a row."""
    import pyarrow as pa

    from longalign.bench.tokens import write_folder

    def dummies(rows: slice) -> tuple[pa.ListArray, pa.ListArray]:
        offsets = tokens * np.arange(len(length[rows]) + 1, dtype=np.int32)
        token = pa.ListArray.from_arrays(offsets, np.ones(offsets[-1], np.int32))
        return token, token

    shape = {"layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "kv_heads": 32, "head_dim": 128}
    write_folder(folder, length, n_target, dummies, {"fingerprint": "bench", "model_shape": shape})


def memory_gb(field: str) -> float:
    """A figure of /proc/self/status: VmHWM is the peak of this program, which ru_maxrss mixes with its parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e9


def measure(folder: str, words: list[str]) -> None:
    """Group, then read every step; prints the figures as JSON. Runs in a process of its own."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from longalign.config import compose_config
    from longalign.data.plan import Plan, group, read_data

    plan = Path(folder).parent / "plan"
    config = compose_config("group", [f"data_dir={folder}", f"max_length={MAX_LENGTH}", "epochs=1", *words])
    imported, start = memory_gb("VmHWM"), time.perf_counter()
    manifest = group(config, plan)
    seconds = time.perf_counter() - start
    figures = {"seconds": seconds, "imported": imported, "peak": memory_gb("VmHWM")}
    start = time.perf_counter()
    reader = Plan(plan, read_data(folder)[1])
    for step in range(1, reader.n_steps + 1):
        reader.step(step)
    figures |= {"read_seconds": time.perf_counter() - start, "read_peak": memory_gb("VmHWM")}
    print(json.dumps({**manifest["epochs"][0], **figures}))


def main() -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    n, rng = int(sys.argv[1]) if len(sys.argv) > 1 else 85_000, np.random.default_rng(0)
    tokens = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    if len(sys.argv) > 2:
        if not Path(sys.argv[2]).is_file():
            sys.exit(f"{sys.argv[2]}: no such file; leave it out to draw lengths like the paper's")
        mix = np.load(sys.argv[2])
        drawn = rng.integers(len(mix["length"]), size=n)
        length, n_target = mix["length"][drawn], mix["n_target"][drawn]
    else:
        length, n_target = paper_like(n, rng)
    table = Table(title=f"{n:,} samples, {length.sum():,} tokens, one epoch", title_justify="left", box=box.SIMPLE)
    for column in ("strategy", "steps", "packs", "fill", "seqs/pack", "long", "seconds", "peak GB", "read s", "GB"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as scratch:
        write_data(Path(scratch) / "data", length, n_target, tokens)
        for name, words in STRATEGIES.items():
            command = [sys.executable, __file__, "--measure", f"{scratch}/data", *words]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            e = json.loads(done.stdout)
            counts = [f"{e['steps']:,}", f"{e['packs']:,}", f"{e['fill_ratio']:.4f}", f"{e['sequences_per_pack']}"]
            counts.append(f"{e['sources']['LongAlign-10k']['loss_weight']:.1%}")
            costs = [e[key] for key in ("seconds", "peak", "read_seconds", "read_peak")]
            table.add_row(name, *counts, *(f"{cost:.2f}" for cost in costs))
    Console(width=120).print(table)
    print(f"peak memory of Python and its imports alone: {e['imported']:.2f} GB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], sys.argv[3:])
    else:
        main()
