"""The same documents through TRL's SFTTrainer: `python -m longalign.bench.peer CONFIG PEER PACK RESULT`.

    trl            at its best: best-fit packing, flash attention, Liger, gradient checkpointing
    trl-defaults   as SFTConfig is: padded batches of 8 documents, fewer where 8 are over max_length, torch's attention

Loss on completions alone, in both. A micro-step is timed from the end of the one before. A process of its own, since
TRL patches model code.
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
from longalign.model.load import load_config, load_tokenizer, resolve_device, resolve_dtype

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
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


BEST = {
    "packing": True,
    "packing_strategy": "bfd",
    "per_device_train_batch_size": 1,
    "gradient_checkpointing": True,
    "use_liger_kernel": True,
}


def main(config_file: str, peer: str, pack: str, result: str) -> None:
    from trl import SFTConfig, SFTTrainer

    config = load_frozen(config_file)
    hf, rng = load_config(config), np.random.default_rng(config.seed)
    documents = lengths(pack, config.max_length, rng)
    batch = make_batch(documents, hf.get_text_config().vocab_size, config.bench.targets, rng)
    ids = np.split(batch.input_ids[0].numpy(), batch.cu_seqlens[1:-1].numpy())
    learned = np.zeros(sum(documents), dtype=np.int64)
    learned[batch.target_rows.numpy() + 1] = 1
    best, device = peer == "trl", resolve_device(config)
    size = 1 if best else min(SFTConfig.per_device_train_batch_size, max(1, config.max_length // max(documents)))
    per_pass = 1 if best else -(-len(documents) // size)  # micro-steps
    times = WARM_UP + config.bench.repeat + 1
    columns = {"input_ids": ids * times, "completion_mask": np.split(learned, batch.cu_seqlens[1:-1].numpy()) * times}
    dataset = Dataset(pa.table(columns), fingerprint="bench")  # else all of it would be hashed
    torch.manual_seed(config.seed)
    chosen = {"attn_implementation": NAMES[attention_of(config, hf, device)[0]]} if best else {}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(hf, dtype=resolve_dtype(config, device), **chosen)
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            folder,
            max_length=sum(documents),
            completion_only_loss=True,
            gradient_accumulation_steps=times * per_pass,
            max_steps=1,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            optim="sgd",
            save_strategy="no",
            report_to="none",
            **(BEST if best else {"per_device_train_batch_size": size}),
        )
        clock = Clock()
        trainer = SFTTrainer(
            model, settings, train_dataset=dataset, processing_class=load_tokenizer(config), callbacks=[clock]
        )
        tokens: list[int] = []
        collate = trainer.data_collator

        def counted(rows: list[dict[str, Any]]) -> dict[str, Any]:
            tokens.append(sum(len(row["input_ids"]) for row in rows))
            return dict(collate(rows))

        trainer.data_collator = counted
        trainer.train()
    seconds = np.diff(clock.ends)[per_pass * WARM_UP - 1 :].tolist()
    # A pack more may have been read ahead: the peer's packing need not make of `times` packs just as many.
    tokens = tokens[per_pass * WARM_UP :][: len(seconds)]
    assert len(seconds) == len(tokens) > 0, "tokens of every micro-step between the warm-up and the last"
    write_json(
        Path(result),
        {
            "tokens": int(sum(tokens)),
            "seconds": float(sum(seconds)),
            "all_seconds": seconds,
            "all_tokens": tokens,
            "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
            "kept": "layer inputs",
            "attention": model.config._attn_implementation,
            "versions": versions("trl", "transformers"),
        },
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
