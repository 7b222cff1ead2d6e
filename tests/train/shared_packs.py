"""What every rank runs for test_sequence_parallel.py: gradients.py, and for a run in a folder "leak" the leak probe.

RUN/leak.safetensors: for documents that ranks run together, `before` [D] holds each document's summed loss, `after`
[D, D] the same with another document a (row a) in place of the first, and `joined` [2, D] what documents 0 and 1
give if no border stands between them, before and after a change of document 0.

Logits are made for 4 targets at a time, so that ranks have unlike numbers of chunks, as real packs have of 2,048. Likewise
MLPs that run in tiles have tiles of 8 tokens.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from longalign.data.batch import Batch, concatenate, share
from longalign.model import loss, offload
from longalign.schema import Config
from longalign.train import worker
from longalign.train.engine import build_engine
from tests.train import gradients

LENGTHS = (9, 30, 2, 21, 1, 10)  # 73 tokens: ranks' borders stand within documents, and padding is needed


def losses(engine: Any, config: Config, batch: Batch) -> torch.Tensor:
    """Every document's summed loss, float64 [D]."""
    weights = torch.nn.functional.one_hot(batch.target_sample, len(LENGTHS)).float()
    together = config.cluster.sequence_parallel
    found = engine(*share(batch, weights, dist.get_rank() % together, together))[1].double()
    dist.all_reduce(found)
    return found * together / dist.get_world_size()  # every group has run the same


@torch.no_grad()
def leak(config: Config) -> None:
    engine = build_engine(config, dist.get_world_size())
    engine.module.eval()
    rng = np.random.default_rng(0)
    documents = [rng.integers(4, 100, n) for n in LENGTHS]
    labels = [np.concatenate([[-100], rng.integers(4, 100, n - 1)]) for n in LENGTHS]
    other = lambda a: [document + (d == a) for d, document in enumerate(documents)]
    pack = lambda ids: concatenate(ids, labels)
    merge = lambda batch: dataclasses.replace(batch, cu_seqlens=batch.cu_seqlens[[0, *range(2, 7)]], max_seqlen=39)
    found = {
        "before": losses(engine, config, pack(documents)),
        "after": torch.stack([losses(engine, config, pack(other(a))) for a in range(len(LENGTHS))]),
        "joined": torch.stack([losses(engine, config, merge(pack(ids))) for ids in (documents, other(0))]),
    }
    if dist.get_rank() == 0:
        save_file(found, Path(config.output_dir or "") / "leak.safetensors")
    engine.destroy()


def run(config: Config) -> None:
    (leak if Path(config.output_dir or "").name == "leak" else gradients.measure)(config)


if __name__ == "__main__":
    loss.CHUNK = 4
    offload.TILE, offload.TILE_FROM = 8, 16
    worker.train = run  # what main() calls for each run, with the processes set up
    sys.exit(worker.main(sys.argv[1:]))
