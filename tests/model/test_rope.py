"""Rotary frequencies are those of the configuration, in float32, whatever way the model was loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longalign.errors import UserError
from longalign.model.load import load_model
from longalign.model.rope import check_inv_freq, context_warning, restore_inv_freq, set_theta
from longalign.schema import Config
from longalign.train.metrics import read_metrics
from tests.conftest import launch_all


def inv_freq(model: torch.nn.Module) -> torch.Tensor:
    return model.model.rotary_emb.inv_freq


def test_theta_reaches_the_model_and_its_export(model_dir: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(model_dir)
    set_theta(config, 2_000_000, 4096)
    assert config.max_position_embeddings == 4096, "the export tells everyone its new context"
    model = AutoModelForCausalLM.from_pretrained(model_dir, config=config)
    expected = 2_000_000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    torch.testing.assert_close(inv_freq(model).double(), expected)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(inv_freq(AutoModelForCausalLM.from_pretrained(tmp_path)), inv_freq(model))
    check_inv_freq(model, 2_000_000)
    with pytest.raises(AssertionError, match=r"not that of model\.rope\.theta=10000"):
        check_inv_freq(model, 10_000)


def test_a_cast_is_caught_and_mended(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    before = inv_freq(model).clone()
    model.model.rotary_emb.inv_freq = before.bfloat16()
    with pytest.raises(AssertionError, match="bfloat16, not float32"):
        check_inv_freq(model, None)
    restore_inv_freq(model)
    assert torch.equal(inv_freq(model), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_drawn_on_a_gpu_turn_as_those_loaded_from_their_export(
    run_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = run_config(tmp_path / "run", "model.init=random", "cluster.device=cuda", "model.rope.theta=2e6")
    drawn = load_model(config, torch.bfloat16)
    assert inv_freq(drawn).is_cuda
    drawn.config.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert torch.equal(inv_freq(drawn).cpu(), inv_freq(loaded))


def test_what_cannot_be_set() -> None:
    from transformers import GPT2Config

    with pytest.raises(UserError, match="no single rope_theta"):
        set_theta(GPT2Config(), 1e6, 4096)


def test_context_warning(model_dir: Path) -> None:
    config = AutoConfig.from_pretrained(model_dir)  # context 512
    assert context_warning(config, 512, None) is None
    assert context_warning(config, 1024, 1e6) is None
    assert "above the model's context of 512" in (context_warning(config, 1024, None) or "")


@pytest.mark.slow
def test_bfloat16_under_every_zero_stage(tmp_path: Path, run_config: Callable[..., Config]) -> None:
    """ZeRO-3 loads inside a bfloat16 context that takes the rotary frequencies along; the worker asserts they are whole."""
    words = [
        "model.dtype=bfloat16",
        "max_steps=2",
        "save_every=null",
        "strategy.packs_per_step=2",
        "model.rope.theta=5000",
    ]
    runs = {stage: run_config(tmp_path / str(stage), *words, f"cluster.zero_stage={stage}") for stage in (1, 2, 3)}
    assert launch_all(list(runs.values()), tmp_path) == 0
    losses = [read_metrics(tmp_path / str(stage) / "metrics.jsonl")[-1]["loss"] for stage in runs]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-2)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "3" / "model")
    assert exported.dtype == torch.bfloat16
    check_inv_freq(exported, 5000)
