"""The command line: what it says, refuses and returns."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from longalign.cli import complete_word
from tests.conftest import conversation, in_process, longalign, make_original, write_jsonl


def test_help_is_quick_and_lists_commands(tmp_path: Path) -> None:
    done = longalign("--help", cwd=tmp_path, timeout=20)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("prepare", "tokenize", "group", "train", "eval", "chat"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "lrr=1"], "unknown key 'lrr'"),
        (["train", "--nonsense"], "No such option: --nonsense"),
        (["training"], "No such command"),
        (["tokenize", "long_file=none.jsonl"], "long_file=none.jsonl: no such file"),
        (["group", "data_dir=none"], "holds no tokenised data"),
        (["train", "-m", "strategy=naive,foo"], "strategy=foo does not exist"),
        (["train", "-m", "hydra/launcher=foo", "seed=1,2"], "hydra/launcher/foo"),
        (["train", "cluster=8gpu"], "needs a CUDA device"),
        (
            ["train", "cluster=cpu", "cluster.zero_stage=0", "model.dtype=bfloat16"],
            "cluster.zero_stage=0 trains in float32",
        ),
        (["eval", "model.path=./none", "cluster=cpu"], "model.path=./none: no such folder"),
        (["eval", "model=tiny", "model.tokenizer=./none", "cluster=cpu"], "model.tokenizer=./none: no such folder"),
        (["chat", "model=tiny", "cluster=cpu", "file=none.txt", "prompt=x"], "file=none.txt cannot be read"),
    ],
)
def test_mistakes_end_with_2_and_one_message(words: list[str], said: str, tmp_path: Path) -> None:
    done = in_process(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "runs"])


def test_show_config_is_yaml_of_everything(tmp_path: Path) -> None:
    import yaml

    done = longalign("train", "model=tiny", "lr=1e-3", "--show-config", cwd=tmp_path)
    shown = yaml.safe_load(done.stdout)
    assert shown["lr"] == 1e-3
    assert shown["model"]["rope"] == {"theta": None}
    assert Path(shown["model"]["path"]).is_dir()


def test_dry_run_says_what_would_run_and_writes_nothing(tmp_path: Path, base_words: list[str], data_dir: Path) -> None:
    words = [
        *base_words,
        f"data_dir={data_dir}",
        "cluster.processes=2",
        "strategy=packing",
        "strategy.packs_per_step=4",
    ]
    done = in_process("train", *words, "strategy.window=77", "output_dir=run", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for said in (
        "longalign.train.worker",
        "steps",
        "packs",
        "tokens per step",
        "loss weight",
        "sdpa",
        "2 x cpu, ZeRO-1",
        "would be grouped",
    ):
        assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_warnings_of_what_is_allowed_but_doubtful(tmp_path: Path, base_words: list[str], data_dir: Path) -> None:
    words = [*base_words, f"data_dir={data_dir}", "output_dir=run", "--dry-run"]
    few = in_process("train", *words, "cluster.processes=4", "strategy.packs_per_step=2", cwd=tmp_path)
    assert "2 packs per step on 4 ranks" in few.stderr
    assert "idle" in few.stderr
    beyond = in_process("train", *words, "model.config.max_position_embeddings=64", cwd=tmp_path)
    assert "max_length=128 is above the model's context of 64 tokens" in beyond.stderr
    assert beyond.returncode == few.returncode == 0


def test_refusals_before_training(
    tmp_path: Path, base_words: list[str], data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*base_words, f"data_dir={data_dir}"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    done = in_process("train", *words, "output_dir=mine", "overwrite=true", cwd=tmp_path)
    assert done.returncode == 2
    assert "holds something else" in done.stderr
    done = in_process("train", *words, "output_dir=run", "resume=none/step-000001", cwd=tmp_path)
    assert done.returncode == 2
    assert "is no checkpoint" in done.stderr
    huge = ["model.init=random", "model.config.num_hidden_layers=9", "model.config.intermediate_size=99999999"]
    done = in_process("train", *words, "output_dir=run", *huge, "save_every=null", cwd=tmp_path)
    assert done.returncode == 2
    assert "preflight=false" in done.stderr
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    done = in_process("train", *words, "output_dir=run", cwd=tmp_path)
    assert done.returncode == 2
    assert "its disk has 1000 B free; change output_dir, or lower keep_last (preflight=false" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]


def test_a_model_that_lacks_weights_is_refused_and_the_old_run_kept(
    tmp_path: Path, base_words: list[str], data_dir: Path, model_dir: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "run" / "plan").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("of an earlier run")
    words = [*base_words, f"data_dir={data_dir}", "output_dir=run", "overwrite=true", f"init_from={broken}"]
    done = longalign("train", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert "lacks 1 weights of this model, among them model.layers.0.mlp.up_proj.weight" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run.replaced-1" / "config.yaml").read_text() == "of an earlier run"


def test_data_of_another_tokenizer_is_refused(
    tmp_path: Path, base_words: list[str], data_dir: Path, model_dir: Path
) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    state = json.loads((other / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary[-1][0], vocabulary[-2][0] = vocabulary[-2][0], vocabulary[-1][0]
    (other / "tokenizer.json").write_text(json.dumps(state))
    done = longalign(
        "train", *base_words, f"model.path={other}", f"data_dir={data_dir}", "output_dir=run", cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "run `longalign tokenize` for this model" in done.stderr
    assert "Traceback" not in done.stderr


def test_tokenize_reports_what_it_dropped(tmp_path: Path, base_words: list[str]) -> None:
    write_jsonl(tmp_path / "long.jsonl", [conversation(5, 3, 0), "{broken", {"messages": []}])
    done = in_process("tokenize", *base_words, "long_file=long.jsonl", "short_file=null", "data_dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "malformed JSON" in done.stderr
    assert "2 samples dropped, named in out/dropped.jsonl" in done.stderr.replace("\n", "")


def test_broken_worker_is_reported(tmp_path: Path, base_words: list[str], data_dir: Path) -> None:
    done = in_process(
        "train",
        *base_words,
        f"data_dir={data_dir}",
        "output_dir=run",
        "+cluster.env.LOCAL_RANK=x",
        "cluster.env.WORLD_SIZE=x",
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "rank 0 failed" in done.stderr


def test_completion() -> None:
    assert "strategy=" in complete_word("str")
    assert "strategy=sorted" in complete_word("strategy=so")
    assert "model.attention=sdpa" in complete_word("model.attention=")
    assert "strategy.packer=best_fit" in complete_word("strategy.packer=b")
    assert len(complete_word("model=longalign-")) == 6


def test_shell_completion_is_wired(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "_LONGALIGN_COMPLETE": "complete_bash",
        "COMP_WORDS": "longalign train strategy=so",
        "COMP_CWORD": "2",
    }
    done = longalign(cwd=tmp_path, env=environment)
    assert "strategy=sorted" in done.stdout


def test_convert_there_and_back(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    original = make_original(tmp_path / "original", rope_ratio=None)
    words = ["model=chatglm3-6b", f"model.path={original}"]
    done = longalign("convert", *words, "output_dir=glm", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "glm")
    assert type(model).__name__ == "GlmForCausalLM"
    assert model.config.rope_parameters["rope_theta"] == 2_000_000, "as the preset says"
    assert AutoTokenizer.from_pretrained(tmp_path / "glm")("你好")["input_ids"][:2] == [2001, 2003]
    back = in_process("convert", "model.path=glm", "reverse=true", "output_dir=back", cwd=tmp_path)
    assert back.returncode == 0, back.stderr
    assert json.loads((tmp_path / "back" / "config.json").read_text())["rope_ratio"] == 200
    before, after = load_file(original / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) and before[key].dtype == after[key].dtype for key in before)
    wrong = in_process("convert", "model.path=glm", "output_dir=other", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "need no conversion" in wrong.stderr
