"""source=own_answers: what a model answers to prompts built by program, which answers are kept, and going on after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM

from longalign.commands import prepare
from longalign.config import compose_config
from longalign.data.tokenize import tokenize
from longalign.errors import UserError
from longalign.evaluate.generate import Generator
from longalign.model.load import load_template
from tests.api_server import Api, completion
from tests.conftest import TINY

LIMIT = 64  # tokens of an answer
ROOM = 1000  # tokens of a batch: five to seven prompts with their answers
WORDS = ["source=own_answers", "model=tiny", "cluster=cpu", "seed=1", f"generation.batch_tokens={ROOM}"]
WORDS += ["source.samples=24", f"source.max_new_tokens={LIMIT}"]
FILES = ("short.jsonl", "short_dropped.jsonl")


def run(output: Path, *more: str, dry_run: bool = False) -> None:
    assert prepare(compose_config("prepare", [*WORDS, f"output_dir={output}", *more]), dry_run) == 0


def rows(output: Path) -> list[dict[str, Any]]:
    """Of all prompts, those without a usable answer too."""
    found = [json.loads(line) for name in FILES for line in (output / name).read_text().splitlines()]
    return sorted(found, key=lambda row: row["id"])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("own")
    run(output)
    return output


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The prompts that the model is asked, batch by batch."""
    seen: list[list[list[int]]] = []
    generate = Generator.generate

    def spy(self: Generator, prompts: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        seen.append(prompts)
        return generate(self, prompts, *args, **kwargs)

    monkeypatch.setattr(Generator, "generate", spy)
    return seen


def test_answers_are_the_models_own_likeliest(whole: Path) -> None:
    """Against transformers alone, one prompt after the other, without padding or batches."""
    template = load_template(compose_config("prepare", WORDS))
    model, found = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), rows(whole)
    assert len(found) == 24
    for row in found:
        prompt = torch.tensor([template.prompt_ids(row["messages"][:1])])
        ids = model.generate(prompt, max_new_tokens=LIMIT, do_sample=False)[0, prompt.shape[1] :]
        ended = int(ids[-1]) in template.stop_ids
        text = template.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert row["messages"][1] == {"role": "assistant", "content": text}
        assert row.get("reason") == (None if ended and text else "empty" if ended else "cut at max_new_tokens")
    assert {row.get("reason") for row in found} >= {None, "cut at max_new_tokens"}


def test_files_tell_what_was_kept_and_why_not(whole: Path) -> None:
    kept, dropped = ((whole / name).read_text().splitlines() for name in FILES)
    about = json.loads((whole / "short.json").read_text())
    assert (about["prompts"], about["samples"], sum(about["dropped"].values())) == (24, len(kept), len(dropped))
    assert sum(about["kinds"].values()) == len(kept)
    assert about["model"]["model"]["path"] == str(TINY)


def test_tokenize_reads_it_whole(whole: Path, tmp_path: Path) -> None:
    words = ["model=tiny", "long_file=null", f"short_file={whole}/short.jsonl", f"output_dir={tmp_path / 'tokens'}"]
    tokenize(compose_config("tokenize", [*words, "num_proc=1"]))
    found = load_from_disk(str(tmp_path / "tokens"))
    assert len(found) == len((whole / "short.jsonl").read_text().splitlines()) > 0
    assert all(found["n_target"])


def test_a_killed_run_goes_on_and_ends_alike(
    whole: Path, tmp_path: Path, batches: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "once", "overwrite=true")
    every = list(batches)
    assert len(every) >= 4
    assert all(len(batch) * (max(map(len, batch)) + LIMIT) <= ROOM for batch in every), "answers take room, too"
    batches.clear()
    generate = Generator.generate

    def killed(self: Generator, *args: Any, **kwargs: Any) -> list[list[int]]:
        if len(batches) == 2:
            raise KeyboardInterrupt
        return generate(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "generate", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "twice")
    assert not (tmp_path / "twice/short.jsonl").exists()
    run(tmp_path / "twice")
    assert batches == every, "none is asked twice, none is forgotten"
    for name in FILES:
        assert (tmp_path / "twice" / name).read_bytes() == (whole / name).read_bytes()


def test_a_server_may_answer(api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its answers that end count; the others are left out, each with its reason."""
    replies = {0: completion("half an ans", "length"), 1: completion(" \n"), 2: completion("  Good.\n")}
    api.say = lambda prompt: replies[len(prompt) % 3]
    run(tmp_path, f"model.endpoint={api.url}")
    assert len(api.requests) == 24
    reasons = {0: "cut at max_new_tokens", 1: "empty", 2: None}
    for row in rows(tmp_path):
        prompt, answer = (message["content"] for message in row["messages"])
        assert row.get("reason") == reasons[len(prompt) % 3]
        assert answer == replies[len(prompt) % 3]["choices"][0]["message"]["content"].strip()
    kept = len((tmp_path / "short.jsonl").read_text().splitlines())
    assert 0 < kept < 24
    assert f"{kept} conversations of 24 prompts" in said(capsys)


def test_nothing_usable_is_said(api: Api, tmp_path: Path) -> None:
    api.say = lambda prompt: completion("and so on", "length")
    with pytest.raises(UserError, match=r"24 cut at max_new_tokens.*source.max_new_tokens=64"):
        run(tmp_path, f"model.endpoint={api.url}")
    assert len((tmp_path / "short_dropped.jsonl").read_text().splitlines()) == 24
    assert not (tmp_path / "short.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["source.samples=5000", "source.kinds=[code,facts]"], r"source.samples=5000.*give \d+ different"),
        (["source.max_new_tokens=4090"], "max_new_tokens=4090, but the model's context is 4,096"),
        (["source.kinds=[poem]"], r"source.kinds.*'poem'"),
        (["source.kinds=[]"], "source.kinds"),
    ],
)
def test_mistakes(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path, *words, dry_run=True)


def test_a_finished_one_stays(whole: Path) -> None:
    before = (whole / "short.jsonl").read_bytes()
    with pytest.raises(UserError, match="overwrite=true"):
        run(whole, "seed=2")
    assert (whole / "short.jsonl").read_bytes() == before


def test_dry_run_asks_nothing(tmp_path: Path, batches: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "none", dry_run=True)
    assert not batches
    assert not (tmp_path / "none").exists()
    assert "24 prompts, seed 1" in said(capsys)
