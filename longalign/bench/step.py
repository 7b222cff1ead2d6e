"""Whole optimizer steps through the training engine.

    python -m longalign.bench.step CONFIG PACK ATTENTION POLICY RESULT

A process of its own, as a rank of a run is: the packs of a step forward and backward, gradients added up, clipping and
AdamW, by the very code of `longalign train`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from longalign.bench.layouts import lengths, make_batch
from longalign.config import load_frozen
from longalign.data.plan import Pack
from longalign.data.template import IGNORE
from longalign.files import write_json
from longalign.model.load import load_config, resolve_device
from longalign.preflight import settle_offload
from longalign.train.engine import build_engine
from longalign.train.worker import end, join, leave, train_step

WARM_UP = 1  # step: the optimizer makes its states, and activations are chosen


def main(config_file: str, pack: str, backend: str, policy: str, result: str) -> None:
    config = load_frozen(config_file)
    device = resolve_device(config)
    config = config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update={"device": device, "processes": 1, "nodes": 1}),
            "model": config.model.model_copy(update={"init": "random", "attention": backend}),
            "activations": policy,
        }
    )
    config = settle_offload(config)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(alone, MASTER_PORT="0")  # any
    join(device)
    hf, rng = load_config(config), np.random.default_rng(config.seed)
    documents = lengths(pack, config.max_length, rng)
    batch = make_batch(documents, hf.get_text_config().vocab_size, config.bench.targets, rng)
    labels = np.full(sum(documents), IGNORE, dtype=np.int64)
    labels[batch.target_rows.numpy() + 1] = batch.target_ids.numpy()
    split = lambda numbers: np.split(numbers, batch.cu_seqlens[1:-1].numpy())
    columns = {"input_ids": split(batch.input_ids[0].numpy()), "labels": split(labels)}
    dataset = Dataset(pa.table(columns), fingerprint="bench")  # else all of it would be hashed
    of_step = config.bench.step_packs or 1
    packs = [Pack(list(range(len(documents))), sum(documents), len(documents), len(batch.target_ids), 1.0)] * of_step
    torch.manual_seed(config.seed)
    engine = build_engine(config, 1)
    seconds: list[float] = []
    for number in range(WARM_UP + config.bench.repeat):
        if number == WARM_UP and device == "cuda":
            engine.activations.take_peak()
        began = time.perf_counter()
        train_step(engine, dataset, packs, config)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        print(f"step {number + 1}: {seconds[-1]:.2f} s", flush=True)
    measured: dict[str, Any] = {
        "tokens": sum(documents) * of_step,
        "seconds": float(np.median(seconds[WARM_UP:])),
        "all_seconds": seconds,
        "peak_bytes": engine.activations.take_peak() if device == "cuda" else 0,
        "kept": engine.activations.describe(1),
    }
    write_json(Path(result), measured)
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    end(0)
