"""The same packs through TRL's SFTTrainer: `python -m longalign.bench.peer CONFIG PACK RESULT`, a process of its own.

At its best: best-fit packing, flash attention, Liger, gradient checkpointing, loss on completions alone. A pass is
timed from the end of one accumulation micro-step to the end of the next, as SFTTrainer runs them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from longalign.bench.layouts import lengths, make_batch
from longalign.config import load_frozen
from longalign.files import versions, write_json
from longalign.model.attention import Backend
from longalign.model.attention import backend_of as attention_of
from longalign.model.load import load_config, load_tokenizer

WARM_UP = 2
NAMES: dict[Backend, str] = {
    "flash4": "flash_attention_4",
    "flash3": "flash_attention_3",
    "flash2": "flash_attention_2",
    "varlen": "sdpa",
    "sdpa": "sdpa",
}


class Clock(TrainerCallback):  # type: ignore[misc]
    """The time at the end of every micro-step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def main(config_file: str, pack: str, result: str) -> None:
    from trl import SFTConfig, SFTTrainer

    config = load_frozen(config_file)
    hf, rng = load_config(config), np.random.default_rng(config.seed)
    documents = lengths(pack, config.max_length, rng)
    batch = make_batch(documents, hf.get_text_config().vocab_size, config.bench.targets, rng)
    ids = np.split(batch.input_ids[0].numpy(), batch.cu_seqlens[1:-1].numpy())
    learned = np.zeros(sum(documents), dtype=np.int64)
    learned[batch.target_rows.numpy() + 1] = 1
    passes = WARM_UP + config.bench.repeat + 1
    columns = {"input_ids": ids * passes, "completion_mask": np.split(learned, batch.cu_seqlens[1:-1].numpy()) * passes}
    dataset = Dataset(pa.table(columns), fingerprint="bench")  # else all of it would be hashed
    torch.manual_seed(config.seed)
    attention = NAMES[attention_of(config, hf, "cuda")[0]]
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(hf, dtype=torch.bfloat16, attn_implementation=attention)
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            folder,
            max_length=sum(documents),
            packing=True,
            packing_strategy="bfd",
            completion_only_loss=True,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=passes,
            max_steps=1,
            gradient_checkpointing=True,
            use_liger_kernel=True,
            bf16=True,
            optim="sgd",
            save_strategy="no",
            report_to="none",
        )
        clock = Clock()
        trainer = SFTTrainer(
            model, settings, train_dataset=dataset, processing_class=load_tokenizer(config), callbacks=[clock]
        )
        packs = [len(row) for row in trainer.train_dataset["input_ids"]]  # equal documents pack otherwise than once
        trainer.train()
    seconds = np.diff(clock.ends)[WARM_UP - 1 :].tolist()
    write_json(
        Path(result),
        {
            "tokens": int(np.mean(packs[:passes])),
            "packs": packs,
            "seconds": float(np.median(seconds)),
            "all_seconds": seconds,
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "kept": "layer inputs",
            "attention": model.config._attn_implementation,
            "versions": versions("trl", "transformers"),
        },
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
