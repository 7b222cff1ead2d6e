"""tokenize against the raw tokenizer and against the dense method of the reference: time and peak memory.

    python bench/tokenizing.py [--samples 2000] [--lengths FILE.npz] [--processes 2] [--times 1 10] [--folder DIR]

The samples are generated from a seed. Their lengths are the paper's mix (section 3.3, Figure 3 left): 15 in 17 short,
log-normal around 800 tokens, at most 8,192, about half of them targets; 2 in 17 spread evenly over 8k to 64k, a few
hundred targets. `--lengths` takes a file with `length` and `n_target` instead. The tokenizer is a sentencepiece BPE of
32,000 pieces, trained here on generated text.

    longalign   `longalign tokenize`: workers, shards, mix, Arrow, ledger
    raw         the same texts through the same tokenizer's `encode_batch`, nothing else timed
    dense       the reference's method in our words: sentencepiece piece by piece as the slow LlamaTokenizer did (it
                took text apart into pieces and looked up each one; transformers 5 no longer has it), rows padded to
                65,536 int64, each worker stacks and saves its share, the parent concatenates all

Each method is one process tree. Seconds are those of the work, without imports; peak memory is that of the whole tree
(RSS, every 20 ms; pages that processes share count in each; PSS counts them once).
`--times 1 10` runs longalign on that many times the data, for its memory alone.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, where Python would find this script in place of its own module `tokenize`

import argparse
import io
import json
import os
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

MAX_LENGTH = 65536
SYLLABLES = "ka to mi ren sol ba din ger pol at en ing er st lo qu ve ou th an re is or al".split()  # noqa: SIM905


# -- data -----------------------------------------------------------------------------------------------


def paper_like(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(length, n_target) of n samples, mixed."""
    n_long = n * 2 // 17
    short = np.clip(rng.lognormal(np.log(800), 1.0, n - n_long), 16, 8192)
    length = np.concatenate([short, rng.uniform(8192, MAX_LENGTH, n_long)]).astype(np.int64)
    n_target = np.concatenate([short // 2, rng.integers(100, 600, n_long)]).astype(np.int64)
    order = rng.permutation(n)
    return length[order], n_target[order]


class Text:
    """Words of a made-up language, as frequent as in any other (Zipf)."""

    def __init__(self, rng: np.random.Generator):
        words = {"".join(rng.choice(SYLLABLES, rng.integers(1, 5))) for _ in range(80_000)}
        self.words = np.array(sorted(words))
        rng.shuffle(self.words)
        self.cumulated = np.cumsum(1 / np.arange(1, len(self.words) + 1))
        self.rng = rng

    def __call__(self, n_words: int) -> str:
        places = np.searchsorted(self.cumulated, self.rng.random(n_words) * self.cumulated[-1])
        return " ".join(self.words[places])


def train_tokenizer(text: Text, folder: Path) -> float:
    """A Llama-like tokenizer; returns tokens per word."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text(25) for _ in range(40_000)),
        model_writer=model,
        vocab_size=32_000,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=os.cpu_count(),
        minloglevel=2,
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False}))
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return len(processor.encode(text(20_000))) / 20_000


def write_samples(path: Path, length: np.ndarray, n_target: np.ndarray, text: Text, per_word: float) -> None:
    with open(path, "w") as file:
        for n, target in zip(length, n_target, strict=True):
            user, answer = (text(max(int(tokens / per_word), 1)) for tokens in (n - target, target))
            messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


# -- methods: each runs in a process of its own and returns the seconds of its work ----------------------


def overrides(folder: Path, data: str, processes: int) -> list[str]:
    return [
        "model=hf",
        f"model.path={folder / 'model'}",
        "model.template=longalign-llama",
        f"max_length={MAX_LENGTH}",
        "datanum=all",
        "long_file=null",
        f"short_file={folder / data}",
        f"output_dir={folder / 'out'}",
        "overwrite=true",
        f"num_proc={processes}",
    ]


def run_longalign(folder: Path, data: str, processes: int) -> float:
    from longalign.data.parallel import start_server

    start_server()  # as the command does
    from longalign.config import compose_config
    from longalign.data.tokenize import tokenize

    config = compose_config("tokenize", overrides(folder, data, processes))
    start = time.perf_counter()
    tokenize(config)
    return time.perf_counter() - start


def run_raw(folder: Path, data: str, processes: int) -> float:
    from longalign.config import compose_config
    from longalign.model.load import load_tokenizer

    backend = load_tokenizer(compose_config("tokenize", overrides(folder, data, processes))).backend_tokenizer
    seconds, texts = 0.0, []

    def encode() -> float:
        start = time.perf_counter()
        backend.encode_batch(texts, add_special_tokens=False)
        return time.perf_counter() - start

    with open(folder / data, "rb") as file:
        for line in file:
            user, answer = (message["content"] for message in json.loads(line)["messages"])
            texts += [f"[INST]{user}[/INST]", answer]
            if len(texts) >= 512:
                seconds += encode()
                texts = []
    return seconds + (encode() if texts else 0)


def dense_share(folder: Path, data: str, share: int, shares: int) -> None:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "model" / "tokenizer.model"))
    slow = lambda text: [model.piece_to_id(piece) for piece in model.encode(text, out_type=str)]
    lines = (folder / data).read_bytes().splitlines()
    inputs, labels = [], []
    for line in lines[share::shares]:
        user, answer = (message["content"] for message in json.loads(line)["messages"])
        prompt, target = [1, *slow(f"[INST]{user}[/INST]")], [*slow(answer), 2]
        for rows, ids in ((inputs, prompt + target), (labels, [-100] * len(prompt) + target)):
            row = np.full(MAX_LENGTH, 0 if rows is inputs else -100, np.int64)
            row[: min(len(ids), MAX_LENGTH)] = ids[:MAX_LENGTH]
            rows.append(row)
    np.save(folder / f"inputs_{share}.npy", np.stack(inputs))
    np.save(folder / f"labels_{share}.npy", np.stack(labels))


def run_dense(folder: Path, data: str, processes: int) -> float:
    start = time.perf_counter()
    with ProcessPoolExecutor(processes) as pool:
        for done in [pool.submit(dense_share, folder, data, share, processes) for share in range(processes)]:
            done.result()
    for name in ("inputs", "labels"):
        parts = [np.load(folder / f"{name}_{share}.npy") for share in range(processes)]
        np.save(folder / f"{name}.npy", np.concatenate(parts))
    seconds = time.perf_counter() - start
    for path in folder.glob("*.npy"):
        path.unlink()
    return seconds


METHODS = {"longalign": run_longalign, "raw": run_raw, "dense": run_dense}


# -- measuring ------------------------------------------------------------------------------------------


def measure(method: str, folder: Path, data: str, processes: int) -> dict[str, float]:
    """seconds; of the whole process tree CPU seconds, imports included, and rss and pss, peaks in GB."""
    import psutil

    cache = folder / f"cache-{method}-{data}"
    environment = {**os.environ, "LONGALIGN_CACHE": str(cache), "RAYON_NUM_THREADS": str(processes)}
    environment |= {"TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, __file__, "--method", method, "--folder", str(folder), "--data", data]
    command += ["--processes", str(processes)]
    with open(folder / "result", "w") as result:
        child = subprocess.Popen(command, stdout=result, env=environment)
        peak, rounds = {"rss": 0.0, "pss": 0.0}, 0
        cpu: dict[int, float] = {}
        while child.poll() is None:
            kinds = ("rss", "pss") if rounds % 25 == 0 else ("rss",)  # PSS is slow to read
            now = dict.fromkeys(kinds, 0.0)
            for process in [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]:
                try:
                    cpu[process.pid] = sum(process.cpu_times()[:2])
                    info = process.memory_full_info() if "pss" in kinds else process.memory_info()
                except psutil.Error:  # it ended just now
                    continue
                for kind in kinds:
                    now[kind] += getattr(info, kind) / 1e9
            peak |= {kind: max(peak[kind], now[kind]) for kind in kinds}
            rounds += 1
            time.sleep(0.02)
    if child.returncode:
        raise SystemExit(f"{method} failed")
    return {"seconds": float((folder / "result").read_text().split()[-1]), "cpu": sum(cpu.values()), **peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--times", type=int, nargs="*", default=[])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.method:
        print(METHODS[args.method](args.folder, args.data, args.processes))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        compare(args, Path(scratch))


def compare(args: argparse.Namespace, folder: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rng = np.random.default_rng(0)
    text = Text(rng)
    per_word = train_tokenizer(text, folder / "model")
    length, n_target = paper_like(args.samples, rng)
    if args.lengths:
        mix = np.load(args.lengths)
        length, n_target = (mix[name][: args.samples].astype(np.int64) for name in ("length", "n_target"))
    write_samples(folder / "1.jsonl", length, n_target, text, per_word)
    size = (folder / "1.jsonl").stat().st_size
    table = Table(title=f"{len(length):,} samples, {size / 1e6:.0f} MB, {args.processes} processes", box=box.SIMPLE)
    for column in ("method", "seconds", "MB/s", "CPU seconds", "peak RSS, GB", "peak PSS, GB"):
        table.add_column(column, justify="right" if column != "method" else "left")

    def add(method: str, data: str, times: int) -> dict[str, float]:
        done = measure(method, folder, data, args.processes)
        figures = [f"{done['seconds']:.1f}", f"{size * times / done['seconds'] / 1e6:.2f}", f"{done['cpu']:.1f}"]
        label = method if times == 1 else f"{method}, {times}x the data"
        table.add_row(label, *figures, f"{done['rss']:.2f}", f"{done['pss']:.2f}")
        return done

    results = {method: add(method, "1.jsonl", 1) for method in METHODS}
    for times in args.times:
        name = f"{times}-times.jsonl"
        write_samples(folder / name, np.tile(length, times), np.tile(n_target, times), text, per_word)
        add("longalign", name, times)
    ours, raw, dense = (results[method] for method in METHODS)
    console = Console()
    console.print(table)
    console.print(f"throughput / raw encode_batch: {raw['seconds'] / ours['seconds']:.2f}")
    console.print(f"time, dense / longalign: {dense['seconds'] / ours['seconds']:.2f}")
    memory = [dense[kind] / ours[kind] for kind in ("rss", "pss")]
    console.print(f"peak memory, dense / longalign: {memory[0]:.1f} (RSS), {memory[1]:.1f} (PSS)")


if __name__ == "__main__":
    main()
