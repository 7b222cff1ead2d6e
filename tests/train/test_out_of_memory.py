"""A GPU that runs out of memory ends a run with a setting that fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from longalign.config import compose_config
from longalign.errors import UserError
from longalign.forecast import fit, gpus
from longalign.launch import prepare_run
from longalign.schema import Config
from longalign.train import worker
from longalign.train.engine import sharded_loading
from longalign.train.worker import out_of_memory_told
from tests.model.test_attention import pack


def run_out(words: list[str], length: int = 40) -> None:
    _, batch = pack(length, 3)
    with out_of_memory_told(compose_config("train", words), batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 79.1 GiB, and Llama-2-7B's shape."""
    monkeypatch.setattr(gpus, "here", lambda: gpus.GPUS["H100"])
    large: dict[str, Any] = {"layers": 32, "hidden": 4096, "intermediate": 11008}
    monkeypatch.setattr(fit, "shape_of", lambda _: {**large, "heads": 32, "kv_heads": 32, "head_dim": 128})
    monkeypatch.setattr(fit, "count_parameters", lambda _: 6_740_000_000)
    monkeypatch.setattr(fit, "free_host_memory", lambda: int(900e9))


def test_no_device_gets_all_there_is(base_words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "here", lambda: None)
    with pytest.raises(UserError, match=r"micro-step of 43 tokens in 2 documents: set activations=offload, cluster"):
        run_out(base_words)
    with pytest.raises(UserError, match=r"2 documents: set a smaller max_length$"):
        run_out([*base_words, "activations=offload", "cluster.zero_stage=3", "cluster.offload_optimizer=true"])


def test_a_pack_that_does_not_fit_gets_the_nearest_setting(base_words: list[str], h100: None) -> None:
    with pytest.raises(UserError, match=r"does not fit one H100; it would with cluster.offload_optimizer=true$"):
        run_out([*base_words, "cluster=1gpu", "cluster.offload_optimizer=false"])


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["cluster=1gpu"], "activations=offload"),
        (["cluster=1gpu", "activations=offload"], "max_length=49152"),
        (["cluster=1gpu", "activations=offload", "cluster.zero_stage=1"], "cluster.zero_stage=3"),
        (["cluster=2gpu", "activations=offload"], "cluster.sequence_parallel=2"),
    ],
)
def test_a_pack_that_should_fit_is_told_so(base_words: list[str], h100: None, words: list[str], nearest: str) -> None:
    """Never a setting that is in force: memory ran out with it."""
    words = [*words, "cluster.offload_optimizer=true"]
    told = fit.advice(compose_config("train", [*base_words, *words]), [65536])
    assert "of this H100's 79.1 GiB were predicted, so prediction and reality disagree" in told
    assert "more GPUs" in told
    assert told.endswith(f"nearest setting: {nearest}")
    if "max_length" not in nearest:
        assert "max_length=49152" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["cluster.zero_stage=1"], r"states need 113\.0 of this .*; 37\.7 with cluster\.offload_optimizer=true"),
        (
            ["cluster.offload_optimizer=true", "cluster.zero_stage=1"],
            r"need 37\.7 .* disagree .*with cluster.zero_stage=3",
        ),
        (["cluster.offload_optimizer=true"], r"need 12\.6 .* disagree .*; 0\.0 with cluster.offload_param=true"),
    ],
)
def test_out_of_memory_before_the_first_step(
    run_config: Callable[..., Config],
    tmp_path: Path,
    h100: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    """The rank ends with a message and exit code 2."""
    config = prepare_run(run_config(tmp_path / "run"), dry_run=False)[0]
    of_gpu = compose_config("train", ["model=tiny", "cluster=1gpu", "cluster.offload_optimizer=false", *words])
    config = config.model_copy(update={"cluster": of_gpu.cluster.model_copy(update={"processes": 1, "nodes": 1})})

    def build(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    for name, stand_in in (
        ("build_engine", build),
        ("load_frozen", lambda _: config),
        ("join", lambda *_: None),
        ("outlive_readers", lambda: None),
    ):
        monkeypatch.setattr(worker, name, stand_in)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(worker.dist, "get_rank", lambda: 0)
    assert worker.main(["config.yaml"]) == 2
    said = capsys.readouterr().err
    assert "error: out of GPU memory as the engine was built: weights, gradients and optimizer states need" in said
    assert re.search(told, said)


def test_after_a_failed_load_models_are_made_whole_again() -> None:
    """Else the advice, which counts parameters, would wait for ranks that never come."""
    caught = None
    try:
        with sharded_loading({"zero_optimization": {"stage": 3}, "train_batch_size": 1}):
            assert is_deepspeed_zero3_enabled()
            raise torch.OutOfMemoryError("while loading")
    except torch.OutOfMemoryError as error:
        caught = error  # its traceback lives on
    assert not is_deepspeed_zero3_enabled(), caught
