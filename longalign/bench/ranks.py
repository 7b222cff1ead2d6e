"""What every rank runs for bench.strategies: `python -m longalign.bench.ranks OUTPUT NUMBER ...`.

    OUTPUT/strategies/NUMBER/   config.yaml and plan/ of a strategy; failed.txt, if a rank had to give up in it
    OUTPUT/bench.json           what is measured: rank 0 adds a row as a strategy begins, and fills it in as it ends

One engine runs all strategies, by training's own train_step. Weights are drawn at random and nothing is saved.
"""

from __future__ import annotations

import signal
import sys
import time
from bisect import bisect_left
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset

from longalign.bench.summary import Work, summarise, work_of
from longalign.config import load_frozen
from longalign.data.plan import Pack, lengths_of, read_data
from longalign.errors import UserError
from longalign.files import read_json, write_json, write_text
from longalign.progress import Bar
from longalign.schema import Config
from longalign.train.breakdown import Breakdown
from longalign.train.engine import build_engine
from longalign.train.trace import Trace
from longalign.train.worker import end, join, leave, out_of_memory_told, over_ranks, train_step


def run_step(engine: Any, dataset: Dataset, packs: list[Pack], config: Config, breakdown: Breakdown) -> dict[str, Any]:
    """A step as training makes it, timed to the sum of losses that all ranks wait for."""
    trace, began = Trace(engine.device), time.perf_counter()
    shares = train_step(engine, dataset, packs, config, breakdown, trace)
    trace.enter("sync")
    over_ranks(0.0, shares)
    seconds = time.perf_counter() - began
    peak = torch.tensor(engine.activations.take_peak() if trace.on_gpu else 0, device=engine.device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return {
        "seconds": seconds,
        "packs": len(packs),
        "samples": sum(len(pack.sample_ids) for pack in packs),
        "tokens": sum(pack.tokens for pack in packs),
        "peak_bytes": int(peak),
        "micro_seconds": micro_seconds(trace),
    }


def micro_seconds(trace: Trace) -> list[float]:
    """Forward and backward of every micro-step of this rank; the slices that one was cut into are added up.

    On a GPU between events on its stream, so that no micro-step is synchronised for it.
    """
    spans = trace.spans()
    of_phase = lambda wanted: [seconds for phase, seconds in spans if phase == wanted]
    passes = [sum(both) for both in zip(of_phase("forward"), of_phase("backward"), strict=True)]
    slices = zip(passes, (samples for samples, _ in trace.losses), strict=True)
    # slices of one micro-step carry the very same list of samples
    return [sum(seconds for seconds, _ in of_one) for _, of_one in groupby(slices, key=lambda piece: id(piece[1]))]


def kernels_of(documents: np.ndarray) -> tuple[int, int]:
    """A class of micro-steps that the same attention kernels run, by their documents' lengths.

    flash-attn-4 (flash_attn.cute.interface) has other ones for one document, for several and for more than 256, and for
    documents that are all within a tile, which has 64, 128 or 192 tokens.
    """
    return bisect_left((1, 256), len(documents)), bisect_left((64, 128, 192), documents.max())


def warm_up_packs(steps: list[list[Pack]], width: int, ran: list[Pack], lengths: np.ndarray) -> list[Pack]:
    """A step that runs the costliest pack, the fullest, and the smallest of every kind of kernel, each on all ranks.

    The last pack runs on the first rank alone, so that the others are idle once. Kernels are compiled when they are
    first met: in a step that is timed, all ranks would wait for the one that meets it.
    Packs that a micro-step joins (cluster.packs_per_micro_step) may still meet a kernel as they end with a single one.
    width: packs of a micro-step, over all ranks. ran: those of earlier strategies; within their bounds nothing is new.
    """
    packs = [pack for step in steps for pack in step]
    cost, tokens = lambda pack: pack.cost, lambda pack: pack.tokens
    largest = [(size, max(packs, key=size)) for size in (cost, tokens)]
    new = [pack for size, pack in largest if all(size(other) < size(pack) for other in ran)]
    kind = lambda pack: kernels_of(lengths[pack.sample_ids])
    met = {kind(pack) for pack in ran}
    smallest = {kind(pack): pack for pack in sorted(packs, key=tokens, reverse=True)}  # of each kind the last one stays
    new += [pack for its, pack in sorted(smallest.items()) if its not in met]
    unlike = list({tuple(pack.sample_ids): pack for pack in new}.values())
    alone = sorted(unlike, key=cost)[:1] if width > 1 else []
    return [pack for pack in unlike for _ in range(width)] + alone


def measure(
    engine: Any, dataset: Dataset, work: Work, config: Config, breakdown: Breakdown, ran: list[Pack], title: str
) -> list[dict[str, Any]]:
    """Every step of the work, after bench.warm_up steps of what is unlike all packs that earlier strategies ran."""
    cluster = config.cluster
    width = cluster.ranks // cluster.sequence_parallel * cluster.packs_per_micro_step
    new = warm_up_packs(work.steps, width, ran, lengths_of(dataset))
    for _ in range(config.bench.warm_up if new else 0):
        run_step(engine, dataset, new, config, breakdown)
    rows = []
    with Bar(title, len(work.steps), "steps", quiet=dist.get_rank() != 0) as bar:
        for number, packs in enumerate(work.steps, start=1):
            rows.append({"step": number, **run_step(engine, dataset, packs, config, breakdown)})
            bar.advance(1, note=f"{rows[-1]['seconds']:.2f} s")
    return rows


def main(output: str, *numbers: str) -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to save
    file, folders = Path(output, "bench.json"), [Path(output, "strategies", number) for number in numbers]
    first, folder = load_frozen(folders[0] / "config.yaml"), None
    join(first.cluster.device, first.hang_timeout_s)
    try:
        with out_of_memory_told(first):
            engine = build_engine(first, dist.get_world_size())
        report = read_json(file)
        report["device"] = torch.cuda.get_device_name() if first.cluster.device == "cuda" else "CPU"
        every = {item: work_of(Path(output, "strategies", str(n))) for n, item in enumerate(report["strategies"])}
        dataset = read_data(first.data_dir)[0]
        breakdown, ran = Breakdown(dataset), list[Pack]()
        for folder in folders:
            config, item = load_frozen(folder / "config.yaml"), report["strategies"][int(folder.name)]
            row: dict[str, Any] = {"strategy": item, "settings": config.strategy.model_dump()}
            report["rows"].append({**row, "failed": "did not end"})
            if dist.get_rank() == 0:
                write_json(file, report)
            row["steps"] = measure(engine, dataset, every[item], config, breakdown, ran, item)
            ran += [pack for packs in every[item].steps for pack in packs]
            report["rows"][-1] = row
            if dist.get_rank() == 0:
                summarise(report, every)
                write_json(file, report)
    except UserError as error:
        if folder:
            write_text(folder / "failed.txt", str(error))  # the launcher tells it
        else:
            print(f"error: {error}", file=sys.stderr)
        return 2
    leave()
    return 0


if __name__ == "__main__":
    end(main(*sys.argv[1:]))
