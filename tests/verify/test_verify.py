"""What is deliberately broken is caught, and what is whole passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from longalign.data.packing import Packs
from longalign.data.plan import Plan, group, read_data
from longalign.data.template import IGNORE, Template
from longalign.files import read_json, write_json
from longalign.model import attention, load, loss
from longalign.schema import Config
from longalign.verify import model as models
from longalign.verify import run as command
from longalign.verify.check import Check
from longalign.verify.data import check_asking, check_plan, check_rows
from longalign.verify.probe import Probe, _longest, choose
from tests.conftest import in_process, longalign

STRATEGY = ["strategy=packing+weighting", "strategy.packs_per_step=3", "epochs=2"]


@pytest.fixture
def config(run_config: Callable[..., Config], tmp_path: Path) -> Config:
    return run_config(tmp_path / "verify", *STRATEGY)


@pytest.fixture
def probe(config: Config, tmp_path: Path) -> Probe:
    group(config, tmp_path / "plan")
    dataset, data = read_data(config.data_dir)
    return choose(Plan(tmp_path / "plan", data), dataset, 3, 10_000)


def ours(config: Config) -> torch.nn.Module:
    model = load.load_model(config, torch.float32)
    attention.install(model, "sdpa")
    return model.eval()


def plain(folder: str | Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if check.passed is False]


def compare(config: Config, probe: Probe) -> list[Check]:
    seen = models.packed(ours(config), probe, "sequence")
    alone = models.separate(plain(config.model.path), probe, "sequence", backward=True)
    return [
        models.check_leak(ours(config), probe),
        models.check_packed(seen, alone, None),
        models.check_weights(seen, alone, "sequence"),
        models.check_losses(seen.losses, alone, None, "sequence", torch.float32, "here"),
    ]


def test_whole_things_pass(config: Config, probe: Probe) -> None:
    checks = compare(config, probe)
    assert all(check.passed for check in checks), checks


# -- attention ----------------------------------------------------------------------------------------------

attend = attention.packed_attention


def as_one_document(q: Any, k: Any, v: Any, cu: torch.Tensor, _longest: int, *rest: Any) -> torch.Tensor:
    return attend(q, k, v, torch.tensor([0, len(q)], dtype=torch.int32), len(q), *rest)


def one_token_late(q: Any, k: Any, v: Any, cu: torch.Tensor, longest: int, *rest: Any) -> torch.Tensor:
    """Each document but the first begins with a token that still sees the one before."""
    shifted = cu.clone()
    shifted[1:-1] += 1
    return attend(q, k, v, shifted, longest + 1, *rest)


@pytest.mark.parametrize("leaking", [as_one_document, one_token_late])
def test_leaking_attention(leaking: Any, config: Config, probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "packed_attention", leaking)
    assert {"leak: other documents move by", "packed = every document alone"} <= set(failed(compare(config, probe)))


def test_a_model_that_attends_to_nothing_does_not_pass_for_tight(
    config: Config, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "packed_attention", lambda q, k, v, *_: torch.zeros_like(q))
    assert "attends to nothing" in models.check_leak(ours(config), probe).detail


# -- loss ---------------------------------------------------------------------------------------------------

weights = loss.token_weights


@pytest.mark.parametrize("fault", ["mean over packs", "M of the micro-step", "all tokens alike"])
def test_wrong_normaliser(fault: str, config: Config, probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(average: Any, n_sequence: torch.Tensor, n_pack: torch.Tensor, totals: loss.StepTotals) -> torch.Tensor:
        if fault == "mean over packs" and average == "sequence":
            average = "pack"
        if fault == "M of the micro-step":
            totals = totals._replace(sequences=len(n_sequence.unique()))
        if fault == "all tokens alike":
            return torch.full_like(n_pack, 1 / totals.targets, dtype=torch.float64)
        return weights(average, n_sequence, n_pack, totals)

    monkeypatch.setattr(loss, "token_weights", wrong)
    assert failed(compare(config, probe)) == ["loss: every target's weight", "loss = plain transformers (here)"]


def in_bfloat16(config: Config, probe: Probe, fault: str | None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(ours, whose averages are all `fault` if given; alone; its truth in float32)."""
    model = load.load_model(config, torch.bfloat16)
    attention.install(model, "sdpa")
    alone, truth = (
        models.separate(plain(config.model.path).to(dtype), probe, "sequence", backward=False)
        for dtype in (torch.bfloat16, torch.float32)
    )
    if fault:
        monkeypatch.setattr(loss, "token_weights", lambda _average, *rest: weights(fault, *rest))  # type: ignore[arg-type]
    return models.packed(model.eval(), probe, "sequence"), alone, truth


@pytest.mark.parametrize("fault", [None, "pack", "token"])
def test_weights_are_exact_in_bfloat16(
    fault: str | None, config: Config, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that rounding could be blamed for: the averages are 0.03% apart here."""
    seen, alone, _ = in_bfloat16(config, probe, fault, monkeypatch)
    assert models.check_weights(seen, alone, "sequence").passed is (fault is None)


def test_a_loss_in_bfloat16_may_be_off_by_its_rounding_and_no_more(
    config: Config, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, alone, truth = in_bfloat16(config, probe, None, monkeypatch)
    monkeypatch.setattr(models, "LOSS", {torch.bfloat16: 0.0})  # what rounding is measured to be, alone

    def check(losses: dict[str, float]) -> Check:
        return models.check_losses(losses, alone, truth, "sequence", torch.bfloat16, "here")

    whole = check(seen.losses)
    assert whole.passed, whole
    assert whole.tolerance is not None
    assert 0 < whole.tolerance < 0.01
    for name in models.LOSSES:
        assert not check({**seen.losses, name: seen.losses[name] * 1.01}).passed
        assert not check({**seen.losses, name: float("nan")}).passed
    alone.nll *= 2  # a reference that is wrong widens its own limit, but not without end
    most = check({name: value * 1.5 for name, value in seen.losses.items()})
    assert not most.passed
    assert most.tolerance == models.LOSS_AT_MOST
    assert "verify.tokens" in most.advice


def test_grouped_queries_in_float32_see_what_they_see_without_a_mask(config: Config) -> None:
    model, ids = plain(config.model.path), torch.arange(40)[None]
    text = model.config.get_text_config()
    assert text.num_key_value_heads < text.num_attention_heads
    with torch.no_grad():
        masked = model(ids, attention_mask=models._causal(model, 40)).logits
        torch.testing.assert_close(masked, model(ids).logits, rtol=1e-5, atol=1e-5)
    text.sliding_window = 8
    assert models._causal(model, 40) is None
    text.sliding_window = None
    assert models._causal(model.bfloat16(), 40) is None


def test_out_of_memory_names_the_setting(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    monkeypatch.setattr(models, "packed", full)
    (tmp_path / "scratch").mkdir()
    last = command.run_checks(config, read_data(config.data_dir)[1], tmp_path / "scratch")[-1]
    assert last.passed is False
    assert "2,048 tokens: try verify.tokens=1024" in last.advice


def test_scaled_gradient(config: Config, probe: Probe) -> None:
    alone = models.separate(plain(config.model.path), probe, "sequence", backward=True)
    assert alone.grad_norm is not None
    assert models.check_gradient(alone.grad_norm, alone, torch.float32, "").passed
    assert not models.check_gradient(alone.grad_norm / 2, alone, torch.float32, "").passed
    assert not models.check_gradient(float("nan"), alone, torch.float32, "").passed


# -- rope ---------------------------------------------------------------------------------------------------


def rope_checks(config: Config, probe: Probe, exported: Path) -> list[Check]:
    model = ours(config)
    model.save_pretrained(exported)
    seen = models.packed(model, probe, "sequence")
    alone = models.separate(plain(exported), probe, "sequence", backward=False)
    return list(models.check_rope(seen, alone, command.wanted_rope(config), AutoConfig.from_pretrained(exported)))


def test_ignored_rope_setting(
    run_config: Callable[..., Config], probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(tmp_path / "verify", *STRATEGY, "model.rope.theta=2000000")
    assert not failed(rope_checks(config, probe, tmp_path / "whole"))

    def ignored(hf: Any, theta: float | None, _max_length: int) -> None:
        hf.rope_theta = theta  # where transformers 5 does not read it

    monkeypatch.setattr(load, "set_theta", ignored)
    monkeypatch.setattr(load, "check_inv_freq", lambda *_: None)
    names = ["rope: inv_freq as configured", "rope: exported config says the same"]
    assert failed(rope_checks(config, probe, tmp_path / "broken")) == names


def test_bfloat16_frequencies(config: Config, probe: Probe, tmp_path: Path) -> None:
    model = ours(config)
    seen = models.packed(model, probe, "sequence")
    seen.inv_freq = [x.bfloat16() for x in seen.inv_freq]
    alone = models.separate(plain(config.model.path), probe, "sequence", backward=False)
    checks = list(
        models.check_rope(seen, alone, command.wanted_rope(config), AutoConfig.from_pretrained(config.model.path))
    )
    assert failed(checks) == ["rope: inv_freq as configured"]


def test_exported_weights_that_differ(config: Config, probe: Probe) -> None:
    before, model = models.packed(ours(config), probe, "sequence"), ours(config)
    assert models.check_reload(before, models.packed(model, probe, "sequence")).passed
    with torch.no_grad():
        model.lm_head.weight[5, 3] += 1e-3
    assert not models.check_reload(before, models.packed(model, probe, "sequence")).passed


# -- data ---------------------------------------------------------------------------------------------------


def broken_data(config: Config, folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """A copy of the tokenised data with every row changed."""
    dataset, manifest = read_data(config.data_dir)
    Dataset.from_list([change(row) for row in dataset], features=dataset.features).save_to_disk(str(folder))  # type: ignore[arg-type]
    write_json(folder / "manifest.json", manifest)
    return folder


def without_eos(row: dict[str, Any]) -> dict[str, Any]:
    """As if the template of the short source had forgotten it."""
    if row["source"] == "short":
        row["labels"] = [*row["labels"][:-1], IGNORE]
        row["n_target"] -= 1
    return row


def row_checks(folder: Path | str, vocab: int = 579) -> dict[str, Check]:
    dataset, data = read_data(str(folder))
    return {check.name.partition(":")[0]: check for check in check_rows(dataset, data, [2], vocab)}


def test_missing_eos(config: Config, tmp_path: Path) -> None:
    assert all(check.passed for check in row_checks(config.data_dir).values())
    checks = row_checks(broken_data(config, tmp_path / "data", without_eos))
    assert not checks["stop token"].passed
    assert "short: 18 of 18" in checks["stop token"].detail


def test_missing_eos_after_an_inner_answer(config: Config, tmp_path: Path) -> None:
    def two_answers(row: dict[str, Any]) -> dict[str, Any]:
        row["input_ids"] = [1, 9, 9, 9, 9, 9, 9, 2]
        row["labels"] = [IGNORE, IGNORE, 9, 9, IGNORE, IGNORE, 9, 2]
        return row | {"length": 8, "n_target": 4}

    checks = row_checks(broken_data(config, tmp_path / "data", two_answers))
    assert failed(list(checks.values())) == ["stop token: answers without it, worst source"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda row: row | {"n_target": row["n_target"] + 1}, "rows"),
        (lambda row: row | {"length": row["length"] + 1}, "rows"),
        (lambda row: row | {"labels": row["labels"][1:]}, "rows"),
        (lambda row: row | {"input_ids": [579, *row["input_ids"][1:]]}, "ids"),
        (lambda row: row | {"labels": [IGNORE] * row["length"], "n_target": 0}, "targets"),
    ],
)
def test_rows_that_cannot_be(change: Any, name: str, config: Config, tmp_path: Path) -> None:
    assert not row_checks(broken_data(config, tmp_path / "data", change))[name].passed


@pytest.mark.parametrize("fault", ["lost", "twice", None])
def test_samples_lost_or_repeated_in_a_plan(
    fault: str | None, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longalign.data import plan as module

    def epoch_packs(*args: Any) -> Packs:
        packs = whole(*args)
        samples = packs.samples.copy()
        if fault == "lost":  # the last pack's last sample
            return Packs(samples[:-1], np.append(packs.offsets[:-1], len(samples) - 1))
        if fault == "twice":
            samples[-1] = samples[0]
        return Packs(samples, packs.offsets)

    whole = module.epoch_packs
    monkeypatch.setattr(module, "epoch_packs", epoch_packs)
    group(config, tmp_path / "plan")
    found = failed(check_plan(tmp_path / "plan", read_data(config.data_dir)[0], config.epochs, config.max_length))
    assert ("plan: samples missing or repeated" in found) == (fault is not None)


def test_another_template_asks_differently(config: Config) -> None:
    tokenizer = load.load_tokenizer(config)
    llama = Template("longalign-llama", tokenizer)
    assert check_asking(llama, Template("longalign-llama", tokenizer)).passed
    assert not check_asking(llama, Template("longalign-chatglm", tokenizer)).passed


# -- the probe ----------------------------------------------------------------------------------------------


def test_a_probe_keeps_the_ends_of_documents(config: Config, tmp_path: Path) -> None:
    group(config, tmp_path / "plan")
    dataset, data = read_data(config.data_dir)
    plan = Plan(tmp_path / "plan", data)
    whole, cut = choose(plan, dataset, 3, 10_000), choose(plan, dataset, 3, 100)
    assert whole.tokens == sum(pack.tokens for pack in plan.step(1)) > 100 >= cut.tokens > 90
    assert [len(pack.sample_ids) for pack in cut.packs] == [len(pack.sample_ids) for pack in plan.step(1)]
    for (ids, labels), (all_ids, all_labels) in zip(cut.rows, whole.rows, strict=True):
        assert ids.tolist() == all_ids.tolist()[-len(ids) :]
        assert labels.tolist()[1:] == all_labels.tolist()[1 - len(ids) :] or len(ids) == 1
        assert labels[0] == IGNORE
    assert _longest(np.array([5, 5, 50]), 20) == 10
    assert _longest(np.array([5, 5, 5]), 20) == 5


# -- the command --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command_passes_on_two_ranks(base_words: list[str], data_dir: Path, tmp_path: Path) -> None:
    words = [*base_words, f"data_dir={data_dir}", "output_dir=out", *STRATEGY, "model.rope.theta=50000"]
    done = longalign("verify", *words, "cluster.processes=2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = read_json(tmp_path / "out" / "verify.json")
    assert report["passed"]
    assert [check["name"] for check in report["checks"] if check["passed"] is None] == []
    assert len(report["checks"]) == 17
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["verify.json"]


@pytest.mark.slow
def test_command_fails_and_says_what_to_do(config: Config, base_words: list[str], tmp_path: Path) -> None:
    data = broken_data(config, tmp_path / "data", without_eos)
    done = in_process("verify", *base_words, f"data_dir={data}", "output_dir=out", *STRATEGY, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert [check["name"] for check in report["checks"] if check["passed"] is False] == [
        "stop token: answers without it, worst source"
    ]
    assert "would not learn to stop" in done.stderr
    shutil.rmtree(data)
    missing = in_process("verify", *base_words, f"data_dir={data}", "output_dir=out", cwd=tmp_path)
    assert missing.returncode == 2
    assert "holds no tokenised data" in missing.stderr
