"""A tokenised folder with the paper's lengths and random token ids, for `longalign bench bench.strategies=[...]`.

    python bench/paper_tokens.py lengths.npz FOLDER [--samples 400] [--vocab 32000] [--seed 0]
    python bench/paper_tokens.py FOLDER --one 524288

lengths.npz has `length` and `n_target` of every sample; from these --samples are drawn, with replacement, by the seed.
--one writes a single document of so many tokens instead, of which the last 5% are learned. Nothing is learned from
random ids, but a step takes as long.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, where Python would find tokenize.py in place of its own module

import argparse
from pathlib import Path

import numpy as np

from longalign.bench.tokens import write_random


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", type=Path, nargs="?")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", type=int, metavar="TOKENS")
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} is there already")
    if (args.lengths is None) == (args.one is None):
        parser.error("give lengths.npz or --one TOKENS")
    if args.one:
        length, n_target = np.array([args.one]), np.array([args.one // 20])
    else:
        mix = np.load(args.lengths)
        drawn = np.random.default_rng(args.seed).integers(len(mix["length"]), size=args.samples)
        length, n_target = mix["length"][drawn].astype(np.int64), mix["n_target"][drawn].astype(np.int64)
    n_target = np.clip(n_target, 1, length - 1)  # nothing comes before a sample's first token
    write_random(args.folder, length, n_target, args.vocab, args.seed)
    print(f"{args.folder}: {len(length):,} samples, {length.sum():,} tokens, {n_target.sum():,} targets")


if __name__ == "__main__":
    main()
