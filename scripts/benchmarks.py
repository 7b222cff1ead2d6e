"""The runs of docs/benchmarks.md on your own GPUs, in stages that can be stopped and begun again.

    python scripts/benchmarks.py paper_mix.npz [--gpus 4] [--until 1500] [--only STAGE ...] [--list] [--also WORD ...]

    passes        one GPU: one long document, many short ones, the paper's mix, beside TRL at its best (pip install trl)
    32k           one GPU: one document of half the length
    epoch:1       an epoch of the paper's lengths, balanced, AdamW on the GPU
    epoch:N       the paper's Figure 5 on N GPUs under ZeRO-3: the same data, and every strategy
    longest:N     one document as long as N GPUs should hold, Llama-3.1-8B's shape, N running it together
    512k:N        one of 524,288 tokens likewise, where N GPUs should hold more
    resume:N      a run on N GPUs gone on with on half of them, 8 layers of Llama-2-7B's shape (bench/resume.py)

paper_mix.npz has `length` and `n_target` of every sample. Models are shapes with random weights. What a stage measured
lies in runs/benchmarks/STAGE/bench.json, what it said in runs/benchmarks/logs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from results_stages import CLI, ROOT, Stage, Words, add_options, choose, run_all

RUNS = Path("runs/benchmarks")
MODELS, TOKENS = RUNS / "models", RUNS / "tokens"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "torch_dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama2-7b": {**LLAMA, "intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
    "llama3.1-8b": {**LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
}
STRATEGIES = ["packing packer=next_fit", "packing packer=best_fit", "balanced", "naive", "sorted"]
ON_GPU = "cluster.offload_optimizer=false"
# One pack a GPU and step: with several, neighbours among them are alike, and few GPUs have little to wait for.
STEP = ("strategy.strata=1", "bench.warm_up=1")
SAMPLES = {2: 122, 4: 244, 8: 520}  # of an epoch on so many GPUs: best-fit and balanced packs fill its steps
LONGEST = {1: 393_216, 2: 524_288, 4: 1_048_576, 8: 2_097_152}  # tokens


def write_models() -> None:
    """Folders with a config.json, and the bundled model's tokenizer for TRL, which asks for one."""
    for name, shape in SHAPES.items():
        folder = MODELS / name
        folder.mkdir(parents=True, exist_ok=True)
        positions = {"max_position_embeddings": max(LONGEST.values()), "rope_theta": 5e6}
        (folder / "config.json").write_text(json.dumps({**shape, **positions}), encoding="utf-8")
        for file in (ROOT / "longalign/assets/tiny").glob("tokenizer*"):
            shutil.copy(file, folder)


def data_stage(name: str, *words: str) -> Stage:
    folder = TOKENS / name
    command = [sys.executable, str(ROOT / "bench/paper_tokens.py"), *words]
    return Stage(f"data:{name}", folder / "manifest.json", lambda: command, TOKENS, parts=1)


def bench(name: str, model: str, gpus: int, *words: str, needs: tuple[Path, ...] = ()) -> Stage:
    output = RUNS / name.replace(":", "-")
    where = ["model=hf", f"model.path={MODELS / model}", "cluster=1gpu", f"cluster.processes={gpus}"]
    command = [*CLI, "bench", *where, *words, f"output_dir={output}"]
    return Stage(name, output / "bench.png", lambda: command, RUNS, needs, gpus=gpus)


def epoch_stages(n: int, lengths: Path, also: Words) -> Iterator[Stage]:
    """An epoch on n GPUs. One GPU runs what two do, with the optimizer's states beside the weights, by `balanced`."""
    data, packs = f"epoch-{max(n, 2)}", max(n, 2)
    if n != 2:
        yield data_stage(data, str(lengths), str(TOKENS / data), f"--samples={SAMPLES[packs]}")
    stage, items = (1, ["balanced"]) if n == 1 else (3, STRATEGIES)
    where = [f"data_dir={TOKENS / data}", "max_length=65536", f"cluster.zero_stage={stage}", ON_GPU]
    how = [f"strategy.packs_per_step={packs}", *STEP, f"bench.strategies={json.dumps(items)}"]
    yield bench(f"epoch:{n}", "llama2-7b", n, *where, *how, *also, needs=(TOKENS / data / "manifest.json",))


def longest_stages(n: int, also: Words) -> Iterator[Stage]:
    if n == 1:
        one = [f"bench.packs=[1x{LONGEST[1]}]", "bench.activations=[offload]", "bench.warm_up=0", "bench.repeat=1"]
        yield bench("longest:1", "llama3.1-8b", 1, *one, *also)
        return
    how = [f"cluster.sequence_parallel={n}", "activations=offload", "bench.strategies=[naive]", "bench.warm_up=0"]
    for name, tokens in {f"longest:{n}": LONGEST[n], **({f"512k:{n}": 524_288} if n > 2 else {})}.items():
        folder = TOKENS / name.replace(":", "-")
        yield data_stage(folder.name, str(folder), f"--one={tokens}", "--vocab=128256")
        where = [f"data_dir={folder}", f"max_length={tokens}", "cluster.zero_stage=3", ON_GPU]
        yield bench(name, "llama3.1-8b", n, *where, *how, *also, needs=(folder / "manifest.json",))


def resume_stage(n: int) -> Stage:
    folder, told = RUNS / f"resume-{n}", RUNS / f"resume-{n}.txt"
    model = [f"model.path={MODELS / 'llama2-7b'}", "model.config.num_hidden_layers=8", "template=longalign-llama"]
    where = ["max_length=65536", "cluster=1gpu", "cluster.zero_stage=3", ON_GPU, "strategy=balanced"]
    command = [sys.executable, str(ROOT / "bench/resume.py"), str(folder), f"--ranks={n}", "model=hf", *model, *where]
    return Stage(f"resume:{n}", told, lambda: command, RUNS, output=told, gpus=n)


def stages(lengths: Path, gpus: int, also: Words) -> Iterator[Stage]:
    """also: words put behind every bench command, such as activations=offload."""
    yield bench("passes", "llama2-7b", 1, "bench.packs=[1x65536,64x1024,mix]", "bench.peer=[trl]", *also)
    yield bench("32k", "llama2-7b", 1, "bench.packs=[1x32768]", *also)
    for n in (n for n in LONGEST if n <= gpus):
        yield from epoch_stages(n, lengths, also)
        yield from longest_stages(n, also)
        if n > 1:
            yield resume_stage(n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", type=Path)
    add_options(parser)
    parser.add_argument("--also", nargs="+", metavar="WORD", default=[], help="words behind every bench command")
    options = parser.parse_args()
    chosen = choose(list(stages(options.lengths, options.gpus, options.also)), options, parser)
    write_models()
    TOKENS.mkdir(parents=True, exist_ok=True)
    sys.exit(run_all(chosen, RUNS / "logs", options.gpus, options.until))


if __name__ == "__main__":
    main()
