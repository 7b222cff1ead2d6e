"""A model in ChatGLM's original layout is used as it is: golden logits, one conversion, and nothing half done."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longalign.config import compose_config
from longalign.data.template import Template
from longalign.errors import UserError
from longalign.model import original
from longalign.model.load import load_config, load_model, load_tokenizer, tokenizer_hash
from longalign.schema import Config
from longalign.train.metrics import read_metrics
from tests.conftest import conversation, in_process, launch_all, make_original, write_jsonl

GOLDEN = Path(__file__).parent.parent / "golden" / "chatglm_forward" / "golden.npz"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LONGALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config_of(folder: Path | str, *words: str) -> Config:
    return compose_config("eval", ["model=hf", f"model.path={folder}", "cluster=cpu", "max_length=128", *words])


def conversions(cache: Path) -> list[Path]:
    return [path for path in (cache / "glm").iterdir() if path.is_dir()]


def golden_error(model: Any) -> float:
    golden = np.load(GOLDEN)
    with torch.no_grad():
        got = [model(input_ids=torch.from_numpy(golden[f"ids_{c}"]).long()[None]).logits[0].numpy() for c in "AB"]
    return max(np.abs(a - golden[f"logits_ratio1_{c}"]).max() for a, c in zip(got, "AB", strict=True))


def test_golden_logits_straight_from_the_original(tmp_path: Path, cache: Path) -> None:
    folder = make_original(tmp_path / "o")
    assert golden_error(load_model(config_of(folder), torch.float32)) < 2e-5
    assert len(conversions(cache)) == 1


def test_weights_of_init_from(tmp_path: Path) -> None:
    """The shape from model.path, the weights from elsewhere, both in the original layout."""
    shape = make_original(tmp_path / "shape")
    (shape / "model.safetensors").unlink()
    config = config_of(shape, f"init_from={make_original(tmp_path / 'o')}", "model.init=random")
    assert golden_error(load_model(config, torch.float32)) < 2e-5


def test_config_and_tokenizer_need_no_conversion(tmp_path: Path, cache: Path) -> None:
    folder = make_original(tmp_path / "o")
    (folder / "model.safetensors").unlink()
    config = config_of(folder, "template=longalign-chatglm")
    assert load_config(config).model_type == "glm"
    assert Template("longalign-chatglm", load_tokenizer(config)).prompt_ids([{"role": "user", "content": "你好"}])
    assert not cache.exists()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_model(config, torch.float32)
    assert not conversions(cache)


def test_converted_once_and_again_when_changed(tmp_path: Path, cache: Path) -> None:
    folder = make_original(tmp_path / "o")
    first = original.converted(folder)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert original.converted(folder) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "rope_ratio": 7}))
    second = original.converted(folder)
    (folder / "model.safetensors").touch()
    third = original.converted(folder)
    elsewhere = original.converted(Path(shutil.copytree(folder, tmp_path / "copy")))
    assert len({first, second, third, elsewhere}) == len(conversions(cache)) == 4


TOGETHER = """
import sys, time
from pathlib import Path
from longalign.model import chatglm, original
write = chatglm.GlmConfig.save_pretrained
def slowly(*words):
    time.sleep(1)
    write(*words)
chatglm.GlmConfig.save_pretrained = slowly
print("ready", flush=True)
sys.stdin.readline()
original.converted(Path(sys.argv[1]))
"""


def test_one_of_several_processes_converts(tmp_path: Path, cache: Path) -> None:
    command = [sys.executable, "-c", TOGETHER, str(make_original(tmp_path / "o"))]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    started = [subprocess.Popen(command, text=True, **pipes) for _ in range(3)]
    assert [process.stdout.readline() for process in started if process.stdout] == ["ready\n"] * 3
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert sum("converting" in text for text in said) == 1
    assert len(conversions(cache)) == 1


SLOW = """
import sys, time
from pathlib import Path
from longalign.model import chatglm, original
def stuck(*_):
    print("begun", flush=True)
    time.sleep(600)
chatglm.GlmConfig.save_pretrained = stuck
original.converted(Path(sys.argv[1]))
"""


def test_a_killed_conversion_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    folder = make_original(tmp_path / "o")
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"  # the weights are written, the configuration is not
    (partial,) = conversions(cache)
    assert (partial / "model.safetensors").is_file()
    process.kill()
    process.wait()
    made = original.converted(folder)
    assert conversions(cache) == [made]
    assert made != partial
    assert golden_error(AutoModelForCausalLM.from_pretrained(made)) < 2e-5


def test_no_room(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_original(tmp_path / "o")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="change LONGALIGN_CACHE"):
        original.converted(folder)
    assert not conversions(cache)


# -- rotary base ------------------------------------------------------------------------------------


def inv_freq(base: float) -> torch.Tensor:
    return base ** -(torch.arange(4, dtype=torch.float64) / 4)  # a rotary dimension of 8


@pytest.mark.parametrize(
    ("preset", "ratio", "words", "base"),
    [
        ("longalign-6b-64k", None, [], 2_000_000),
        ("longalign-6b-64k-base", None, [], 2_000_000),
        ("chatglm3-6b", None, [], 2_000_000),
        ("chatglm3-6b", None, ["model.rope.theta=null"], 10_000),
        ("chatglm3-6b", 50, ["model.rope.theta=null"], 500_000),
        ("chatglm3-6b", 50, [], 2_000_000),  # model.rope.theta is absolute and wins
        ("chatglm3-6b-128k", 500, [], 5_000_000),
    ],
)
def test_rotary_base(tmp_path: Path, preset: str, ratio: int | None, words: list[str], base: float) -> None:
    folder = make_original(tmp_path / "o", rope_ratio=ratio)
    config = compose_config("eval", [f"model={preset}", f"model.path={folder}", *words])
    model = load_model(config, torch.float32)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq.double(), inv_freq(base))
    assert model.config.rope_parameters["rope_theta"] == base


def test_the_user_is_told_whose_base_holds(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain, told = make_original(tmp_path / "plain"), make_original(tmp_path / "told", rope_ratio=50)
    for _ in range(2):
        load_config(config_of(plain))
        load_config(config_of(plain, "model.rope.theta=2000000"))
        load_config(config_of(told, "model.rope.theta=2000000"))
        load_config(config_of(told))
    said = capfd.readouterr().err
    assert said.count("tells no rope_ratio, so the rotary base is 10000") == 1
    assert said.count("model.rope.theta=2000000 replaces the rotary base 500000") == 1
    assert len(said.splitlines()) == 2


# -- a hub's repository -----------------------------------------------------------------------------


def fake_repository(root: Path, name: str, folder: Path) -> None:
    """`folder` as the hub's cache holds a repository that was downloaded."""
    repository = root / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


def test_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_original(tmp_path / "o")
    (folder / "modeling_chatglm.py").write_text("raise SystemExit('remote code ran')")
    told = json.loads((folder / "config.json").read_text())
    code = {"AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration"}
    (folder / "config.json").write_text(json.dumps({**told, "auto_map": code}))
    fake_repository(tmp_path / "hub", "someone/LongAlign-6B", folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config = config_of("someone/LongAlign-6B")
    assert load_tokenizer(config)("你好")["input_ids"][:2] == [2001, 2003]
    assert golden_error(load_model(config, torch.float32)) < 2e-5
    assert original.find("someone/nothing") is None


def test_code_of_other_models_is_refused(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("raise SystemExit('remote code ran')")
    told = {"model_type": "none_such", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_config(config_of(tmp_path))


def test_what_is_fetched_from_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never code, tensors only when asked for, and one kind of them."""
    folder = make_original(tmp_path / "o")
    asked: list[list[str]] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(original, "hf_hub_download", lambda name, file: str(folder / file))
    monkeypatch.setattr(original, "snapshot_download", snapshot)
    assert original.find("a/one") == folder
    assert asked == [["*.json", "tokenizer.model"]]
    original.find("a/one", weights=True)
    assert asked[1:] == [["*.json", "tokenizer.model", "*.safetensors", "*.bin"]]
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    original.find("a/two", weights=True)
    assert asked[-1] == ["*.json", "tokenizer.model", "*.bin"]
    (folder / "model.safetensors.index.json").write_text("{}")
    original.find("a/three", weights=True)
    assert asked[-1] == ["*.json", "tokenizer.model", "*.safetensors"]


# -- commands ---------------------------------------------------------------------------------------


@pytest.fixture
def trainable(tmp_path: Path) -> list[str]:
    """Words of commands for an original folder whose vocabulary holds the tokenizer's 2009 ids, and its data."""
    folder = make_original(tmp_path / "o", padded_vocab_size=2048, rope_ratio=None)
    short = write_jsonl(tmp_path / "short.jsonl", [conversation(4 + i, 3, i) for i in range(12)])
    return [
        *("model=chatglm3-6b", f"model.path={folder}", "cluster=cpu", "datanum=0k", f"short_file={short}"),
        *("max_length=256", f"data_dir={tmp_path / 'data'}", "seed=1"),
    ]


@pytest.mark.slow
def test_tokenize_train_and_ask(tmp_path: Path, cache: Path, trainable: list[str]) -> None:
    """From the original folder to an exported chat model, with ZeRO-3's sharded loading beside the plain one."""
    done = in_process("tokenize", *trainable, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (cache / "glm").exists(), "tokenize needs no weights"
    settings = ["max_steps=2", "save_every=null", "strategy.packs_per_step=2", "lr=1e-3", "cluster.processes=2"]
    runs = {
        stage: compose_config(
            "train", [*trainable, *settings, f"cluster.zero_stage={stage}", f"output_dir={tmp_path / f'run{stage}'}"]
        )
        for stage in (1, 3)
    }
    assert launch_all(list(runs.values()), tmp_path) == 0
    assert len(conversions(cache)) == 1
    losses = [[row["loss"] for row in read_metrics(tmp_path / f"run{stage}" / "metrics.jsonl")] for stage in runs]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    exported = tmp_path / "run1" / "model"
    model = AutoModelForCausalLM.from_pretrained(exported)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq.double(), inv_freq(2_000_000))
    record = json.loads((exported / "longalign.json").read_text())
    assert (record["template"], record["split_special_tokens"]) == ("longalign-chatglm", True)
    asked = [{"role": "user", "content": "what is <|user|>"}]
    before, after = (
        Template("longalign-chatglm", load_tokenizer(compose_config("chat", words)))
        for words in (trainable, [f"model.path={exported}"])
    )
    assert before.prompt_ids(asked) == after.prompt_ids(asked), "our own chat takes look-alikes for text"
    assert tokenizer_hash(before.tokenizer) == tokenizer_hash(after.tokenizer)
    plain = [{"role": "user", "content": "what is this"}]
    theirs = AutoTokenizer.from_pretrained(exported).apply_chat_template(plain, add_generation_prompt=True)
    assert theirs["input_ids"] == before.prompt_ids(plain), "other programs ask with the ids of training"
    # chat with the original folder, whose conversion is there already
    said = in_process("chat", *trainable, "prompt=what", "max_new_tokens=4", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "converting" not in said.stderr


def test_the_converted_tokenizer_is_the_same(tmp_path: Path) -> None:
    """Data tokenised before a conversion serves after it."""
    folder = make_original(tmp_path / "o")
    direct, converted = (load_tokenizer(config_of(path)) for path in (folder, original.converted(folder)))
    assert tokenizer_hash(direct) == tokenizer_hash(converted)
