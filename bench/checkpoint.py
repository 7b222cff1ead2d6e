"""What a checkpoint costs: how long training stands still, how fast files are written, checked and read.

    python bench/checkpoint.py [FOLDER] [layers=8] [width=512] [tokens=2048] [steps=12] [every=3] [device=cpu]

A Llama of random weights trains in this process, without DeepSpeed, and is saved after `every` steps by the worker's
own Saver into FOLDER (a temporary one by default); they should take longer than a write, which a save waits for.
`stall` is the time that save() takes of the training loop, `beside` a step while a file is being written, `alone` one
without. Medians; the first save, whose memory is new, is left out.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, where Python would find tokenize.py in place of its own module

import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from longalign.train import checkpoint
from longalign.train.saver import Saver


def main(words: list[str]) -> None:
    given = dict(word.split("=") for word in words if "=" in word)
    number = lambda key, default: int(given.get(key, default))
    layers, width, device = number("layers", 8), number("width", 512), given.get("device", "cpu")
    steps, every = number("steps", 12), number("every", 3)
    if steps < 2 * every:
        sys.exit(f"steps={steps} should be at least twice every={every}: the first save is not counted")
    folder = next((word for word in words if "=" not in word), None) or tempfile.mkdtemp()
    heads = max(1, width // 64)
    shape = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    with torch.device(device):
        model = LlamaForCausalLM(shape)
    if device == "cuda":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
    engine: Any = SimpleNamespace(
        module=model, optimizer=optimizer, basic_optimizer=optimizer, zero_optimization_stage=lambda: 0
    )
    config: Any = SimpleNamespace(output_dir=folder, save_every=every, keep_last=1, keep_every=None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ids = torch.randint(0, 32000, (1, number("tokens", 2048)), device=device)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def step() -> float:
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        return time.perf_counter() - began

    step()
    alone, beside, stalls = [], [], []
    with Saver(config, engine, {}) as saver:
        for n in range(1, steps + 1):
            busy = saver.thread is not None and saver.thread.is_alive()
            seconds = step()
            (beside if busy else alone).append(seconds)
            if n % every == 0:
                began = time.perf_counter()
                saver.save(n)
                stalls.append(time.perf_counter() - began)
        saver.finish()
        began = time.perf_counter()
        saver.save(steps + 1)  # with nothing beside it
        saver.finish()
        written = time.perf_counter() - began
    (path,) = checkpoint.complete(Path(folder) / "checkpoints")
    size = sum(file.stat().st_size for file in path.glob("*.bin"))
    began = time.perf_counter()
    assert checkpoint.damage_seen_by_any(path) is None
    checked = time.perf_counter() - began
    began = time.perf_counter()
    checkpoint.load(engine, path)
    synchronize()
    loaded = time.perf_counter() - began
    usual, stall = statistics.median(alone), statistics.median(stalls[1:])
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {size / 1e9:.2f} GB a checkpoint, {device}, {ids.numel()} tokens a step")
    print(f"stall {stall:.3f} s (first {stalls[0]:.3f}, with new memory), {size / stall / 1e9:.1f} GB/s")
    busy_step = statistics.median(beside) if beside else float("nan")
    print(f"step alone {usual:.3f} s, beside a write {busy_step:.3f} s; stall = {stall / usual:.1%} of a step")
    speeds = {"written": written, "checked": checked, "loaded": loaded}
    print(", ".join(f"{what} {size / seconds / 1e9:.2f} GB/s" for what, seconds in speeds.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
