"""A run that is stopped and goes on with half of its GPUs, beside itself where it was not stopped.

    python bench/resume.py FOLDER [--ranks 2] [WORD ...]

Trains a model of random weights on invented documents for six steps on all ranks, with a checkpoint after the third,
and from this the last three again on half of the ranks. Tells how far their losses are apart, what the checkpoint
takes, and how long both commands ran. WORDs go to both: `model=hf model.path=LLAMA2_7B cluster.zero_stage=3`.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, where Python would find tokenize.py in place of its own module

import argparse
import subprocess
import time
from pathlib import Path

from longalign.train import checkpoint
from longalign.train.metrics import read_metrics

STEPS, STOPPED = 6, 3


def longalign(*words: str) -> float:
    """Seconds that the command took."""
    print("$ longalign", *words, flush=True)
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "longalign.cli", *words], check=True)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    args, words = parser.parse_known_args()
    raw, tokens = args.folder / "raw", args.folder / "tokens"
    whole, half = args.folder / f"{args.ranks}_ranks", args.folder / f"{args.ranks // 2}_ranks"
    longalign("prepare", "source=synthetic", f"output_dir={raw}")
    files = ["datanum=all", f"long_file={raw}/long.jsonl", f"short_file={raw}/short.jsonl"]
    longalign("tokenize", *words, *files, f"output_dir={tokens}", f"data_dir={tokens}")
    plan = [f"data_dir={tokens}", f"strategy.packs_per_step={args.ranks}", "strategy.strata=1", f"max_steps={STEPS}"]
    train = ["train", *words, *plan, "model.init=random", f"save_every={STOPPED}"]
    lasted = longalign(*train, f"cluster.processes={args.ranks}", f"output_dir={whole}")
    saved = whole / "checkpoints" / checkpoint.name(STOPPED)
    on_half = [f"cluster.processes={args.ranks // 2}", f"output_dir={half}", f"resume={saved}"]
    resumed = longalign(*train, *on_half)
    size = sum(file.stat().st_size for file in saved.iterdir())
    print(f"checkpoint of {size / 1e9:.2f} GB; {lasted:.0f} s never stopped, {resumed:.0f} s resumed")
    print(f"step  loss on {args.ranks} ranks  loss on {args.ranks // 2}  relative difference  s/step  s/step on half")
    before, after = ({row["step"]: row for row in read_metrics(run / "metrics.jsonl")} for run in (whole, half))
    for step in range(STOPPED + 1, STEPS + 1):
        one, other = before[step], after[step]
        apart = abs(one["loss"] / other["loss"] - 1)
        seconds = f"{one['step_s']:.2f}  {other['step_s']:.2f}"
        print(f"{step:4}  {one['loss']:.7f}  {other['loss']:.7f}  {apart:.1e}  {seconds}")


if __name__ == "__main__":
    main()
