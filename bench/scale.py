"""The tables of docs/scale.md: what grows how with model, length and GPUs, from the cost model alone.

    python bench/scale.py

Nothing is measured here but what longalign/forecast/gpus.py says of one H200; bandwidths between hosts are assumed.
"""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.table import Table

from longalign.forecast.gpus import H200
from longalign.forecast.predict import Bytes, predict
from longalign.model.cost import cost_of

LLAMA3 = {"heads": 32, "kv_heads": 8, "head_dim": 128, "vocab": 128256}
SHAPES = {
    "Llama-2-7B": {**LLAMA3, "layers": 32, "hidden": 4096, "intermediate": 11008, "kv_heads": 32, "vocab": 32000},
    "Llama-3.1-8B": {**LLAMA3, "layers": 32, "hidden": 4096, "intermediate": 14336},
    "Llama-3.1-70B": {**LLAMA3, "layers": 80, "hidden": 8192, "intermediate": 28672, "heads": 64},
}
NETWORK = 50e9  # bytes/s between hosts for each GPU: 400 Gbit/s
DISK = 2e9  # bytes/s that one host writes to a shared file system
GIB = 2**30
HOURS_BETWEEN_FAILURES = 54 * 24 / 419 * 16384  # of one GPU: the Llama 3 report, arXiv 2407.21783, table 5


def parameters(shape: dict[str, int]) -> float:
    return cost_of(shape).linear / 6 + 2 * shape["hidden"] * shape["vocab"]


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left", box=box.MARKDOWN)
    for column in columns:
        made.add_column(column, justify="right")
    return made


def lengths() -> Table:
    made = table(
        "One document", "model", "tokens", "PFLOP", "attention", "s, one GPU", "layer inputs GiB", "GPUs for them",
    )  # fmt: skip
    for name, shape in SHAPES.items():
        for tokens in (65536, 262144, 1048576):
            cost = cost_of(shape)
            flops, attention = float(cost(tokens)), cost.quadratic * tokens**2
            found = predict([tokens], shape, H200, "offload", 0.0)
            seconds = found.seconds if found else flops / (0.75 * H200.matmul)
            inputs = tokens * Bytes.of(shape).inputs / GIB
            made.add_row(
                name, f"{tokens:,}", f"{flops / 1e15:,.1f}", f"{attention / flops:.0%}", f"{seconds:,.0f}",
                f"{inputs:,.0f}", f"{2 ** max(0, math.ceil(math.log2(inputs / 60)))}",
            )  # fmt: skip
    return made


def ranks() -> Table:
    made = table(
        "ZeRO-3, one pack of 65,536 tokens per GPU and micro-step", "model", "GPUs", "states GiB a GPU",
        "pass s", "exchange s", "million tokens a step at least", "checkpoint GiB", "s to write", "failure every h",
        "save every min",
    )  # fmt: skip
    for name in ("Llama-3.1-8B", "Llama-3.1-70B"):
        shape, count = SHAPES[name], parameters(SHAPES[name])
        for gpus in (8, 64, 256, 1024):
            fixed = 18 * count / gpus
            found = predict([65536], shape, H200, "budget", fixed) if fixed < 0.9 * H200.memory else None
            exchange = 8 * count / (H200.link if gpus <= 8 else NETWORK)
            checkpoint, failure = 12 * count, HOURS_BETWEEN_FAILURES / gpus
            write = checkpoint / (DISK * max(1, gpus // 8))
            save = math.sqrt(2 * write * failure * 3600) / 60  # Young's interval
            made.add_row(
                name, f"{gpus:,}", f"{fixed / GIB:,.1f}", f"{found.seconds:.1f}" if found else "does not fit",
                f"{exchange:.1f}", f"{gpus * 65536 / 1e6:,.1f}", f"{checkpoint / GIB:,.0f}", f"{write:,.1f}",
                f"{failure:,.0f}", f"{save:,.0f}",
            )  # fmt: skip
    return made


def main() -> None:
    console = Console(width=200)
    console.print(lengths())
    console.print(ranks())
    for name, shape in SHAPES.items():
        cost, count = cost_of(shape), parameters(shape)
        hidden = 8 * count / NETWORK * 0.75 * H200.matmul / cost.linear
        console.print(
            f"{name}: {count / 1e9:.1f}e9 parameters; attention costs as much as matrices at "
            f"{cost.linear / cost.quadratic:,.0f} tokens; exchange is hidden from {hidden:,.0f} tokens a micro-step"
        )


if __name__ == "__main__":
    main()
