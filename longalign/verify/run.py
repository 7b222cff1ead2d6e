"""The verify command: a table of checks with figures and tolerances, verify.json beside it, exit code 1 on a failure.

1. data      every row and the plan
2. ours      packs of the plan's first step, in this process: leak probe, logits, losses
3. ranks     the same step through the real engine on all ranks, and on one; the model exported
4. plain     the exported folder in plain transformers, one document at a time: what 2 and 3 must equal
"""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from longalign.cluster.workers import run_workers
from longalign.config import to_yaml
from longalign.data.plan import Plan, prepare_plan, read_data
from longalign.data.template import Template
from longalign.errors import UserError
from longalign.files import disk_errors, read_json, require_disk, versions, write_json, write_text
from longalign.launch import resolve
from longalign.model import attention
from longalign.model.load import load_config, load_model, load_template, load_tokenizer, resolve_dtype
from longalign.preflight import check_data, check_memory, count_parameters
from longalign.progress import Bar, console
from longalign.schema import Config
from longalign.verify import model as models
from longalign.verify.check import Check, at_most, not_run
from longalign.verify.data import check_asking, check_plan, check_rows
from longalign.verify.probe import choose

MODEL_CHECKS = 11
DEFECT = "this is a defect of longalign, please report it with verify.json"


def verify(config: Config, dry_run: bool) -> int:
    """Run the command; returns its exit code. Raises UserError."""
    if config.cluster.launcher != "local":
        raise UserError(f"verify runs on this machine alone: cluster=auto instead of cluster={config.cluster.name}")
    config = resolve(config)
    output, parameters = Path(config.output_dir or ""), count_parameters(config)
    data = check_data(config)
    check_memory(config, parameters)
    require_disk(output, parameters * resolve_dtype(config, config.cluster.device).itemsize, "output_dir")
    if dry_run:
        ranks = f"{config.cluster.processes} x {config.cluster.device}"
        console.print(f"{config.model.path} on {config.data_dir}, {ranks} -> {output}/verify.json")
        return 0
    scratch = output / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with disk_errors(output, "output_dir"):
            scratch.mkdir(parents=True)
            checks = run_checks(config, data, scratch)
            passed = all(check.passed is not False for check in checks)
            report = {
                "passed": passed,
                "model": config.model.path,
                "data_dir": config.data_dir,
                "cluster": config.cluster.model_dump(mode="json"),
                "checks": [asdict(check) for check in checks],
                "versions": versions("torch", "transformers", "deepspeed"),
            }
            write_json(output / "verify.json", report)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    console.print(table(checks))
    for check in checks:
        if check.passed is False:
            console.print(f"{check.name}: {check.advice}", style="red")
    console.print(f"written to {output}/verify.json")
    return 0 if passed else 1


def run_checks(config: Config, data: dict[str, Any], scratch: Path) -> list[Check]:
    """Every check; what a model or an engine refuses to do is a failed one."""
    checks: list[Check] = []
    try:
        checks += dataset_checks(config, data, scratch)
        with Bar("verify model", MODEL_CHECKS, "checks") as bar:
            for check in model_checks(config, data, scratch):
                checks.append(check)
                bar.advance(1, note=check.name)
    except (AssertionError, RuntimeError, ValueError, NotImplementedError) as error:
        said = str(error).strip().partition("\n")[0] or repr(error)
        advice = "the model cannot be trained like this; the checks after this one did not run"
        if isinstance(error, torch.OutOfMemoryError):
            tokens = probe_tokens(config)
            advice = f"out of memory with {tokens:,} tokens: try verify.tokens={tokens // 2}; the rest did not run"
        checks.append(Check("model: runs", False, detail=said, advice=advice))
    return checks


def table(checks: list[Check]) -> Table:
    made = Table(box=box.SIMPLE)
    for column in ("check", "figure", "at most", "", "seen"):
        made.add_column(column)
    number = lambda value: "" if value is None else f"{value:,.0f}" if value == int(value) else f"{value:.1e}"
    for check in checks:
        result = {True: "ok", False: "FAILED", None: "not run"}[check.passed]
        style = {True: None, False: "red", None: "yellow"}[check.passed]
        made.add_row(check.name, number(check.figure), number(check.tolerance), result, check.detail, style=style)
    return made


# -- 1. data ----------------------------------------------------------------------------------------------


def dataset_checks(config: Config, data: dict[str, Any], scratch: Path) -> list[Check]:
    dataset = read_data(config.data_dir)[0]
    vocabulary = load_config(config).get_text_config().vocab_size
    prepare_plan(config, scratch)
    return [
        *check_rows(dataset, data, data_template(config, data).stop_ids, vocabulary),
        *check_plan(scratch / "plan", dataset, config.epochs, config.max_length),
    ]


def data_template(config: Config, data: dict[str, Any]) -> Template:
    """The template that made the data, whatever the presets say now."""
    return Template(data["template"], load_tokenizer(config), data.get("chat_template_kwargs"))


# -- 2 to 4. model ----------------------------------------------------------------------------------------


def probe_tokens(config: Config) -> int:
    """At most so many tokens of the plan's packs are run."""
    if config.verify.tokens != "auto":
        return config.verify.tokens
    return 32768 if config.cluster.device == "cuda" else 2048


def model_checks(config: Config, data: dict[str, Any], scratch: Path) -> Iterator[Check]:
    dtype, average = resolve_dtype(config, config.cluster.device), config.strategy.average
    device = config.cluster.device
    backend = attention.backend_of(config, load_config(config), device)[0]
    plan = Plan(scratch / "plan", data)
    probe = choose(plan, read_data(config.data_dir)[0], config.verify.packs, probe_tokens(config))
    with on_device(load_model(config, dtype), device, backend) as model:
        yield models.check_leak(model, probe)
        ours = models.packed(model, probe, average)

    ranks, exported = int(config.cluster.processes), scratch / "model"
    probe.save(scratch / "probe")
    step = engine_step(config, scratch, exported)
    plain = lambda dtype: AutoModelForCausalLM.from_pretrained(exported, dtype=dtype, attn_implementation="sdpa")
    with on_device(plain(dtype), device) as model:
        alone = models.separate(model, probe, average, backward=True)
    with on_device(plain(dtype), device, backend) as model:
        reloaded = models.packed(model, probe, average)
    truth = None
    if dtype != torch.float32:
        with on_device(plain(torch.float32), roomy_device(config, torch.float32)) as model:
            truth = models.separate(model, probe, average, backward=False)

    yield from models.check_rope(ours, alone, wanted_rope(config), AutoConfig.from_pretrained(exported))
    yield models.check_reload(ours, reloaded)
    yield models.check_packed(ours, alone, truth)
    yield models.check_weights(ours, alone, average)
    where = f"engine, {ranks} x {config.cluster.device}, ZeRO-{config.cluster.zero_stage}"
    if config.cluster.sequence_parallel > 1:
        where += f", sequence parallel {config.cluster.sequence_parallel}"
    for seen, place in ((ours.losses, "this process"), (step["losses"], where)):
        yield models.check_losses(seen, alone, truth, average, dtype, place)
    yield models.check_gradient(step["grad_norm"], alone, dtype, where)
    yield check_one_rank(config, scratch, step, dtype)
    if data["template"] == "text":
        yield not_run("asking: prompts that differ from training", "template=text has no questions")
    else:
        there = config.model.model_copy(update={"path": str(exported), "tokenizer": str(exported)})
        asking = load_template(config.model_copy(update={"template": "auto", "model": there}))
        yield check_asking(data_template(config, data), asking)


@contextmanager
def on_device(model: Any, device: str, backend: attention.Backend | None = None) -> Iterator[Any]:
    """The model on its device, under our attention if a backend is given; freed at the end."""
    if backend:
        attention.install(model, backend)
    try:
        yield model.to(device).eval()
    finally:
        model.to("meta")
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def roomy_device(config: Config, dtype: torch.dtype) -> str:
    """The GPU, if the weights in `dtype` fit beside their activations, else the CPU."""
    needed = 1.5 * dtype.itemsize * count_parameters(config)
    return "cuda" if config.cluster.device == "cuda" and needed < torch.cuda.mem_get_info()[0] else "cpu"


def wanted_rope(config: Config) -> dict[str, Any]:
    """rope_parameters as the model's config.json and model.rope say, by no code that training uses."""
    unset = config.model.model_copy(update={"rope": config.model.rope.model_copy(update={"theta": None})})
    rope = load_config(config.model_copy(update={"model": unset})).get_text_config().rope_parameters or {}
    return {**rope, "rope_theta": config.model.rope.theta} if config.model.rope.theta else dict(rope)


def engine_step(config: Config, scratch: Path, export_to: Path | None) -> dict[str, Any]:
    """The probe's step through DeepSpeed on config.cluster.processes ranks: losses and gradient norm."""
    frozen, result = scratch / "config.yaml", scratch / "step.json"
    write_text(frozen, to_yaml(config))
    words = [str(frozen), str(scratch / "probe"), str(result), *([str(export_to)] if export_to else [])]
    command = [sys.executable, "-m", "longalign.verify.ranks", *words]
    code = run_workers(command, config, scratch / "logs", saves=False)
    if code > 2:
        raise KeyboardInterrupt if code == 130 else SystemExit(code)
    if code:
        raise RuntimeError(f"the engine's step failed on {config.cluster.processes} ranks, see above")
    return read_json(result)


def check_one_rank(config: Config, scratch: Path, step: dict[str, Any], dtype: torch.dtype) -> Check:
    """The same step on one rank: loss and gradient norm do not depend on how many share the work."""
    name, ranks = "1 rank = all ranks", int(config.cluster.processes)
    if ranks == 1:
        return not_run(name, "one process here; cluster.processes=2 compares two on a CPU")
    one_process = config.cluster.model_copy(update={"processes": 1, "sequence_parallel": 1})
    alone = config.model_copy(update={"cluster": one_process})
    try:
        check_memory(alone, count_parameters(config))
        one = engine_step(alone, scratch, None)
    except Exception as error:  # one device may be too small for what several hold
        return not_run(name, f"it does not fit one rank: {error}")
    pairs = {
        "loss": (step["losses"]["trained"], one["losses"]["trained"]),
        "norm": (step["grad_norm"], one["grad_norm"]),
    }
    limit = {"loss": models.LOSS[dtype], "norm": models.GRADIENT[dtype]}
    apart = {key: models.relative(a, b) for key, (a, b) in pairs.items()}
    worst = models.worst(apart, limit)
    detail = f"{ranks} ranks; " + ", ".join(f"{key} {a:.6f} and {b:.6f}" for key, (a, b) in pairs.items())
    return at_most(name, apart[worst], limit[worst], detail, DEFECT)
