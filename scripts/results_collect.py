"""What the runs of results.py leave, as small JSON: docs/results/NAME.json of every run, data.json of the data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

from longalign.data.documents import read_document

COLUMNS = ("step", "loss", "loss_sequence", "loss_token", "lr", "grad_norm", "tokens", "targets", "sequences", "step_s")
SETTINGS = ("seed", "max_length", "epochs", "max_steps", "lr", "lr_final", "warmup_ratio", "weight_decay", "strategy")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def stages_of(folder: Path) -> list[dict[str, Any]]:
    """Of a stage that was run again the last time."""
    return list({row["stage"]: row for row in rows_of(folder / "stages.jsonl")}.values())


def machine() -> str:
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(asked, capture_output=True, text=True).stdout.split("\n")
        if found := [name.strip() for name in names if name.strip()]:
            return f"{len(found)} x {found[0]}"
    return f"CPU, {os.cpu_count()} cores"


def note(folder: Path, stage: str, command: str, seconds: float, where: str) -> None:
    """Keep in the run's folder what was done to it, how long that took, and where."""
    folder.mkdir(parents=True, exist_ok=True)
    row = {"stage": stage, "command": command, "seconds": round(seconds, 1), "machine": where, "ended": time.time()}
    with open(folder / "stages.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def short(value: Any) -> Any:
    """The same with five significant digits, but for times and other large numbers."""
    if isinstance(value, dict):
        return {key: short(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [short(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) and abs(value) < 1e6 else value


def training(run: Path) -> dict[str, Any]:
    """settings, plan and the columns of metrics.jsonl."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    plan = read(run / "plan/manifest.json")
    rows, sources = rows_of(run / "metrics.jsonl"), plan["epochs"][0]["sources"]
    buckets = sorted({name for row in rows for name in row["loss_by_length"]})
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    columns["loss_by_length"] = {name: [row["loss_by_length"].get(name) for row in rows] for name in buckets}
    settings = {key: config[key] for key in SETTINGS}
    settings |= {"rope_theta": config["model"]["rope"]["theta"], "template": config["template"]}
    settings |= {key: config["cluster"][key] for key in ("device", "processes", "zero_stage")}
    return {
        "settings": settings,
        "plan": {key: plan[key] for key in ("steps", "packs")},
        "fill_ratio": plan["epochs"][0]["fill_ratio"],
        "loss_weight_of_long": sum(held["loss_weight"] for source, held in sources.items() if source != "short"),
        "peak_mem_gb": max((row["peak_mem_gb"] for row in rows), default=None),
        "metrics": columns,
    }


def record(run: Path) -> dict[str, Any]:
    """All that is finished of a run."""
    found: dict[str, Any] = {"stages": stages_of(run)}
    if (run / "model/config.json").is_file():
        found["train"] = training(run)
    if (run / "eval/results.json").is_file():
        found["eval"] = read(run / "eval/results.json")
    if (run / "verify/verify.json").is_file():
        found["verify"] = read(run / "verify/verify.json")
    if (run / "bench/bench.json").is_file():
        found["bench"] = read(run / "bench/bench.json")
    if (run / "chat.jsonl").is_file():
        found["chat"] = talk(run)
    return found


def talk(run: Path) -> list[dict[str, str]]:
    """Every question, what was answered (nothing, if it was refused), and what the text says."""
    document = read_document(run / "document.txt")
    said = [message["content"].removeprefix(document).strip() for message in rows_of(run / "chat.jsonl")[0]["messages"]]
    answers = dict(zip(said[::2], said[1::2], strict=True))
    return [{"question": q, "answer": answers.get(q, ""), "expected": e} for q, e in read(run / "expected.json")]


def packages_of(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each package: what its documents come to."""
    found: dict[str, dict[str, Any]] = {}
    for row in documents:
        about = {key: row[key] for key in ("name", "version", "licence")}
        package = found.setdefault(row["name"], {**about, "documents": 0, "tokens": 0})
        package["documents"] += 1
        package["tokens"] += row["tokens"]
    return list(found.values())


def collect(runs: Path, data: Path, output: Path) -> None:
    """Write what this machine has; files of runs that are elsewhere stay as they are."""
    folders = {file.parent for file in runs.rglob("stages.jsonl")}
    found = {str(folder.relative_to(runs)).replace("/", "_"): record(folder) for folder in folders}
    told = ("samples", "long_samples", "tokens", "targets", "longest", "fingerprint")
    manifests = {file.parent.name: file for file in data.glob("tokens/*/manifest.json")}
    if manifests:
        tables = {name: {key: read(file)[key] for key in told} for name, file in manifests.items()}
        held = data / "tokens/heldout/eval/manifest.json"
        tables |= {"heldout": {key: read(held)[key] for key in told}} if held.is_file() else {}
        packages = {file.parent.name: packages_of(read(file)["documents"]) for file in data.glob("*/documents.json")}
        found["data"] = {"stages": stages_of(data), "tables": tables, "packages": packages}
    output.mkdir(parents=True, exist_ok=True)
    for name, value in found.items():
        text = json.dumps(short(value), ensure_ascii=False, separators=(",", ":")).replace(f"{Path.cwd()}/", "")
        (output / f"{name}.json").write_text(text + "\n", encoding="utf-8")
