"""scripts/benchmarks.py: what its stages ask for exists, and needs what an earlier one makes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from longalign.config import compose_config
from longalign.model.load import load_config

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import benchmarks


def test_every_stage_is_a_command_whose_needs_are_made_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    benchmarks.write_models()
    made: set[Path] = set()
    processes = {}
    for stage in benchmarks.stages(Path("mix.npz"), 8, ["activations=offload"]):
        words = stage.command()
        assert set(stage.needs) <= made, stage.name
        made.add(stage.done)
        if stage.name.startswith("resume:"):
            config = compose_config("train", [*words[4:], f"cluster.processes={stage.gpus // 2}"])
            assert load_config(config).num_hidden_layers == 8
            assert words[3] == f"--ranks={stage.gpus}"
        if words[: len(benchmarks.CLI)] != benchmarks.CLI:
            continue
        config = compose_config(words[3], words[4:])
        processes[stage.name] = config.cluster.processes
        assert stage.gpus == config.cluster.processes
        assert config.activations == "offload", "--also comes last"
        assert stage.done.parent == Path(config.output_dir or "")
        assert load_config(config).hidden_size == 4096
        if stage.name.startswith("epoch:"):
            assert config.strategy.packs_per_step % config.cluster.processes == 0
    wanted = {f"{kind}:{count}": count for kind in ("epoch", "longest") for count in (1, 2, 4, 8)}
    assert {name: count for name, count in processes.items() if ":" in name} == {**wanted, "512k:4": 4, "512k:8": 8}


def test_shapes_are_those_of_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, worked out by hand from the published shapes: 6.74 and 8.03 billion."""
    monkeypatch.chdir(tmp_path)
    benchmarks.write_models()
    for name, billions in (("llama2-7b", 6.738), ("llama3.1-8b", 8.030)):
        c = json.loads((benchmarks.MODELS / name / "config.json").read_text())
        h, kv = c["hidden_size"], c["hidden_size"] * c["num_key_value_heads"] // c["num_attention_heads"]
        layer = 2 * h * h + 2 * h * kv + 3 * h * c["intermediate_size"] + 2 * h
        count = 2 * c["vocab_size"] * h + c["num_hidden_layers"] * layer + h
        assert count / 1e9 == pytest.approx(billions, abs=0.001)
