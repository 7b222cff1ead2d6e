"""`longalign bench`: forward and backward passes over packs, by attention backend and activation policy.

Weights are drawn at random and gradients are not used: speed does not depend on them. Model FLOP/s count what the
model must compute (model/cost.py: causal attention within documents, no recomputation) and are set beside the rate of
a large matrix product, measured in the same run.
"""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.table import Table
from transformers import AutoModelForCausalLM

from longalign.bench.layouts import lengths, make_batch, sequence_weights
from longalign.bench.plot import plot
from longalign.config import to_yaml
from longalign.data.batch import cut
from longalign.files import disk_errors, read_json, versions, write_json, write_text
from longalign.model import attention, kernels
from longalign.model.activations import Activations, Policy
from longalign.model.cost import cost_of, fit, shape_of
from longalign.model.load import load_config, resolve_device, resolve_dtype
from longalign.model.loss import WeightedLoss
from longalign.progress import Bar, console, warn
from longalign.schema import Config


class Case(NamedTuple):
    pack: str
    attention: str
    activations: Policy
    of: str = (
        "pass"  # forward and backward; or "step", through the training engine; or a peer's name, through SFTTrainer
    )


def bench(config: Config, dry_run: bool) -> int:
    """Run the command; returns its exit code. Raises UserError."""
    device, hf = resolve_device(config), load_config(config)
    wanted = config.bench
    backends = [attention.backend_of(config, hf, device, name)[0] for name in wanted.attention]
    cases = [Case(p, b, a) for b in dict.fromkeys(backends) for a in wanted.activations for p in wanted.packs]
    if wanted.step_packs:
        cases += [Case(p, backends[0], a, "step") for a in wanted.activations for p in wanted.packs]
    cases += [Case(p, "its own", "full", peer) for peer in wanted.peer for p in wanted.packs]
    documents = {p: lengths(p, config.max_length, np.random.default_rng(config.seed)) for p in wanted.packs}
    flops = {pack: float(cost_of(shape_of(hf))(documents[pack]).sum()) for pack in wanted.packs}
    for case in cases if dry_run else []:
        tokens = sum(documents[case.pack])
        count = f"{len(documents[case.pack])} documents, {tokens:,} tokens, {flops[case.pack] / 1e12:,.0f} TFLOP"
        console.print(f"{' '.join(case)}: {count}")
    if dry_run:
        return 0
    output = Path(config.output_dir or "")
    with disk_errors(output, "output_dir"):
        output.mkdir(parents=True, exist_ok=True)
    rate = matmul_rate(device)
    rows: list[dict[str, Any]] = []
    with Bar("bench", len(cases), "cases") as bar:
        for case in cases:
            row: dict[str, Any] = {**case._asdict(), "documents": documents[case.pack]}
            if case.of == "pass":
                row |= run_case(config, hf, case, documents[case.pack], device)
            else:
                row |= run_apart(config, case, output)
            if "seconds" in row:
                row["tokens_per_s"] = row["tokens"] / row["seconds"]
                row["tflops"] = flops[case.pack] * row["tokens"] / sum(documents[case.pack]) / row["seconds"] / 1e12
                row["of_matmul"] = row["tflops"] / rate
            rows.append(row)
            write_json(output / "bench.json", report(config, device, rate, rows))
            bar.advance(1, note=f"{' '.join(case)}: {row.get('tokens_per_s', 0):,.0f} tokens/s")
    console.print(table(rows, rate))
    for way in dict.fromkeys((case.attention, case.activations) for case in cases if case.of == "pass"):
        tell_cost([row for row in rows if (row["attention"], row["activations"], row["of"]) == (*way, "pass")], way)
    plot(report(config, device, rate, rows), output / "bench.png")
    console.print(f"written: {output}/bench.json, bench.png")
    return 0


def tell_cost(rows: list[dict[str, Any]], way: tuple[str, str]) -> None:
    """The setting by which packs cost what they took here, if the packs are unlike enough to tell."""
    done = [row for row in rows if "seconds" in row]
    with contextlib.suppress(ValueError):
        cost = fit([row["documents"] for row in done], [row["seconds"] for row in done])
        off = max(abs(float(cost(row["documents"]).sum()) / row["seconds"] - 1) for row in done)
        setting = f"strategy.cost=[{cost.linear:.5g},{cost.quadratic:.5g}]"
        console.print(f"{' '.join(way)}: {setting} tells these packs' seconds within {off:.1%}")


def run_case(config: Config, hf: Any, case: Case, documents: list[int], device: str) -> dict[str, Any]:
    """Seconds of a pass (median), peak bytes and what was kept; or what went wrong."""
    dtype, warm_up = resolve_dtype(config, device), config.bench.warm_up
    torch.manual_seed(config.seed)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(hf, dtype=dtype)
        attention.install(model, case.attention, config.deterministic)  # type: ignore[arg-type]
        fused = kernels.install(model) if device == "cuda" and config.model.kernels == "auto" else []
        keep, module = Activations(model, case.activations), WeightedLoss(model.train())
        batch = make_batch(
            documents, hf.get_text_config().vocab_size, config.bench.targets, np.random.default_rng(config.seed)
        )
        weights = sequence_weights(batch)
        passes: list[dict[str, Any]] = []
        for number in range(warm_up + config.bench.repeat):
            if device == "cuda":
                torch.cuda.synchronize()
                if number >= warm_up and not keep.memory:
                    torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            limit = config.slice_tokens or keep.slice_tokens()
            slices = cut(batch, weights, limit) if limit else [(batch, weights)]
            peak = 0
            for piece, its_weights in slices:
                keep.before(piece.input_ids.numel())
                module(piece.to(device), its_weights.to(device))[0].backward()
                if device == "cuda":
                    peak = max(peak, torch.cuda.max_memory_allocated())
                keep.after()
            if device == "cuda":
                torch.cuda.synchronize()
            passes.append(
                {"seconds": time.perf_counter() - began, "peak_bytes": peak, "kept": keep.describe(len(slices))}
            )
        return {
            "tokens": sum(documents),
            "seconds": float(np.median([p["seconds"] for p in passes[warm_up:]])),
            "peak_bytes": passes[-1]["peak_bytes"],
            "kept": passes[-1]["kept"],
            "passes": passes,
            "kernels": fused,
        }
    except torch.OutOfMemoryError as error:
        warn(f"{' '.join(case)}: out of memory ({str(error).splitlines()[0]})")
        return {"tokens": sum(documents), "failed": "out of memory"}
    finally:
        model = module = keep = None  # type: ignore[assignment]
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def run_apart(config: Config, case: Case, output: Path) -> dict[str, Any]:
    """A case in a process of its own: steps, whose engine is a rank's, and the peer, which patches model code."""
    name = f"{case.of}-{case.pack}-{case.activations}"
    frozen, result, log = output / "config.yaml", output / f"{name}.json", output / f"{name}.log"
    write_text(frozen, to_yaml(config))
    result.unlink(missing_ok=True)
    words = ["peer", case.of, case.pack] if case.of != "step" else ["step", *case[:3]]
    command = [sys.executable, "-m", f"longalign.bench.{words[0]}", str(frozen), *words[1:], str(result)]
    with open(log, "w") as said:
        code = subprocess.run(command, stdout=said, stderr=said).returncode
    if code or not result.is_file():
        said_last = (log.read_text(errors="replace").strip().splitlines() or ["nothing was said"])[-1]
        warn(f"{' '.join(case)} failed with exit code {code}: {said_last}; more in {log}")
        return {"failed": "failed"}
    return dict(read_json(result))


def matmul_rate(device: str) -> float:
    """TFLOP/s of a product of two large random matrices: 8192 wide in bf16 on a GPU, 1024 in float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(30):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(5):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / 5)
    return 2 * size**3 / float(np.median(seconds[10:])) / 1e12


def report(config: Config, device: str, rate: float, rows: list[dict[str, Any]]) -> dict[str, Any]:
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {
        "device": where,
        "matmul_tflops": rate,
        "model": {"path": config.model.path, **config.model.config},
        "targets": config.bench.targets,
        "rows": rows,
        "versions": {"torch": torch.__version__, **versions("transformers")},
    }


def table(rows: list[dict[str, Any]], rate: float) -> Table:
    made = Table(
        title=f"a matrix product runs at {rate:,.3g} TFLOP/s",
        title_justify="left",
        box=box.SIMPLE,
    )
    for column in ("pack", "attention", "activations", "of", "tokens/s", "TFLOP/s", "of matmul", "peak GiB", "kept"):
        numeric = column in ("tokens/s", "TFLOP/s", "of matmul", "peak GiB")
        made.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        names = row["pack"], row["attention"], row["activations"], row["of"]
        if "failed" in row:
            made.add_row(*names, row["failed"], "", "", "", "")
        else:
            numbers = f"{row['tokens_per_s']:,.0f}", f"{row['tflops']:,.3g}", f"{row['of_matmul']:.3f}"
            made.add_row(*names, *numbers, f"{row['peak_bytes'] / 2**30:.1f}", row["kept"])
    return made
