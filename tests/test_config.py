"""Every shipped file composes and validates; every mistake gets one message that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from longalign.config import COMMANDS, KEYS, compose_config, conf_dir, from_dict, groups, load_frozen, quote, to_yaml
from longalign.errors import UserError

NEEDS = {
    "hf": ["model.path=somewhere"],
    **{source: ["source.path=somewhere"] for source in ("hub", "files", "sharegpt", "packages")},
    **{source: ["source.documents=somewhere"] for source in ("text", "long_tasks")},
    "self_instruct": ["source.documents=somewhere", "source.model=m"],
    **{judge: ["judge.model=m"] for judge in ("openai", "local")},
    "longbench": ["task.longbench.path=somewhere"],
    "longbench_chat": ["task.longbench_chat.cases=somewhere"],
}
OPTIONS = [(group, option) for group, options in groups().items() for option in options]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command: str) -> None:
    assert compose_config(command, []).model.name == "llama2-7b"


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group: str, option: str) -> None:
    config = compose_config("train", [f"{group}={option}", *NEEDS.get(option, [])])
    if (group, option) == ("judge", "none"):
        assert config.judge is None
    elif group not in ("experiment", "task", "logger"):  # of the last two there may be several
        assert getattr(config, group).name == option


def test_every_yaml_is_an_option_or_a_base() -> None:
    known = {f"{group}/{option}.yaml" for group, option in OPTIONS} | {f"{c}.yaml" for c in (*COMMANDS, "config")}
    found = {str(f.relative_to(conf_dir())) for f in conf_dir().rglob("*.yaml") if f.stem != "base"}
    assert found == known
    assert len(OPTIONS) > 20


def test_defaults_of_the_contract() -> None:
    c = compose_config("train", ["strategy=sorted", "model=llama2-7b"])
    assert (c.seed, c.max_length, c.truncate, c.epochs, c.lr, c.warmup_ratio) == (42, 65536, "right", 2, 2e-5, 0.03)
    assert (c.betas, c.grad_clip, c.save_every, c.keep_last, c.resume) == ((0.9, 0.95), 1.0, 200, 10, "none")
    assert (c.strategy.batch_size, c.strategy.group_size, c.strategy.packs_per_step) == (96, 8, 8)
    assert c.output_dir == "runs/llama2-7b/10k/sorted"
    assert compose_config("tokenize", ["datanum=5k"]).output_dir == "data/llama2-7b/5k"
    assert compose_config("group", []).output_dir == "data/llama2-7b/10k/plans/packing+weighting"
    assert compose_config("train", ["strategy=packing"]).strategy.average == "pack"


@pytest.mark.parametrize(
    ("preset", "path", "template", "max_length", "theta"),
    [
        ("longalign-6b-64k-base", "THUDM/LongAlign-6B-64k-base", "longalign-chatglm", 65536, 2e6),
        ("longalign-6b-64k", "THUDM/LongAlign-6B-64k", "longalign-chatglm", 65536, 2e6),
        ("longalign-7b-64k-base", "THUDM/LongAlign-7B-64k-base", "longalign-llama", 65536, None),
        ("longalign-7b-64k", "THUDM/LongAlign-7B-64k", "longalign-llama", 65536, None),
        ("longalign-13b-64k-base", "THUDM/LongAlign-13B-64k-base", "longalign-llama", 65536, None),
        ("longalign-13b-64k", "THUDM/LongAlign-13B-64k", "longalign-llama", 65536, None),
        ("chatglm3-6b-128k", "THUDM/chatglm3-6b-128k", "chatglm3", 131072, None),
        ("chatglm3-6b", "THUDM/LongAlign-6B-64k-base", "longalign-chatglm", 65536, 2e6),
        ("llama2-7b", "THUDM/LongAlign-7B-64k-base", "longalign-llama", 65536, None),
        ("llama2-13b", "THUDM/LongAlign-13B-64k-base", "longalign-llama", 65536, None),
    ],
)
def test_released_checkpoints(preset: str, path: str, template: str, max_length: int, theta: float | None) -> None:
    for command in ("tokenize", "train", "eval", "chat"):
        config = compose_config(command, [f"model={preset}"])
        model = config.model
        assert (model.name, model.path, model.tokenizer) == (preset, path, path)
        assert (model.template, config.max_length, model.rope.theta) == (template, max_length, theta)
    assert compose_config("train", [f"model={preset}"]).output_dir == f"runs/{preset}/10k/packing+weighting"


def test_frozen_file_gives_the_same_config(tmp_path: Path) -> None:
    config = compose_config("train", ["model=tiny", "prompt=你好: {x}"])
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_frozen(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("prompt=What's this, (briefly)?", "prompt", "What's this, (briefly)?"),
        ("prompt=你好", "prompt", "你好"),
        ('prompt="quoted" and \\back\\', "prompt", '"quoted" and \\back\\'),
        ("prompt=${data_dir} stays", "prompt", "${data_dir} stays"),
        ("prompt=[a, b]", "prompt", "[a, b]"),
        ("prompt=a=b", "prompt", "a=b"),
        ("prompt=null", "prompt", None),
        ("file=My Docs (1).txt", "file", "My Docs (1).txt"),
        ("output_dir=2024", "output_dir", "2024"),
        ("output_dir=${data_dir}/x", "output_dir", "data/llama2-7b/10k/x"),
        ("long_file=a b.jsonl", "long_file", ["a b.jsonl"]),
        ("long_file=[a.jsonl,b c.jsonl]", "long_file", ["a.jsonl", "b c.jsonl"]),
        ("long_file=null", "long_file", []),
    ],
)
def test_text_needs_no_quoting(word: str, key: str, value: object) -> None:
    assert getattr(compose_config("chat", [word]), key) == value


def test_sweep_lists_are_not_quoted() -> None:
    assert quote("output_dir=a,b", multirun=True) == "output_dir=a,b"
    assert quote("output_dir=a b", multirun=True) == 'output_dir="a b"'
    assert quote("lr=1e-4,1e-5", multirun=True) == "lr=1e-4,1e-5"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("lrr=3", "unknown key 'lrr'; did you mean 'lr'?"),
        ("strategy.batchsize=4", "unknown key 'strategy.batchsize'; did you mean 'strategy.batch_size'?"),
        ("+new=1", "unknown key 'new'"),
        ("lr=abc", "lr='abc' is not allowed: it should be a valid number"),
        ("lr=", "lr='' is not allowed"),
        ("lr", "expected key=value, got 'lr'"),
        ("keep_every=300", "keep_every=300 is not allowed: it should be a multiple of save_every=200"),
        ("epochs=0", "epochs=0 is not allowed: it should be greater than 0"),
        ("max_length=3.5", "max_length=3.5 is not allowed: it should be a valid integer"),
        ("betas=[1]", "betas=[1] is not allowed"),
        ("strategy.average=mean", "'sequence', 'pack' or 'token'"),
        ("truncate=left", "'right', 'middle', 'drop' or 'error'"),
        ("cluster.processes=two", "it should be a valid integer or 'auto'"),
        ("model=llama2-7c", "did you mean 'llama2-7b'?"),
        ("task=needles", "did you mean 'needle'?"),
        ("model=hf", "model.path has no value: give it as model.path=..."),
        ("strategy=[a", "cannot read the overrides"),
        ("hydra/launcher=joblib", "takes effect in a sweep only: add -m"),
        ("~lr", "lr is missing"),
        ("lr=inf", "lr=inf is not allowed: it should be a finite number"),
        ("source.max_tokens=200 ", "at least min_tokens=256"),
        ("source.max_tokens=many", "source.max_tokens='many' is not allowed: it should be a valid integer"),
        (
            "source.html=all",
            "source.html is no setting of the source chosen: give source= as well (one of files, hub, ",
        ),
        ("judge.model=m", "judge.model is no setting of the judge chosen"),
        ("task.needle.depths=[2]", "it should be less than or equal to 1"),
    ],
)
def test_mistakes(word: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        compose_config("train", [word])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_an_experiments_settings_of_a_task_that_is_not_chosen() -> None:
    with pytest.raises(UserError) as error:
        compose_config("eval", ["experiment=smollm2_64k", "task=[needle,retrieval]"])
    said = "task.heldout has settings, but task= does not choose it; ~task.heldout leaves it out"
    assert str(error.value) == said
    chosen = compose_config("eval", ["experiment=smollm2_64k", "~task.heldout"]).task
    assert [name for name, settings in chosen if settings] == ["needle", "retrieval"]


def test_free_sections_take_any_key() -> None:
    config = compose_config("train", ["model.config.num_hidden_layers=4", "cluster.deepspeed.zero_optimization.x=1"])
    assert config.model.config == {"num_hidden_layers": 4}
    assert config.cluster.deepspeed == {"zero_optimization": {"x": 1}}


def test_free_sections_merge_what_is_given() -> None:
    config = compose_config(
        "prepare", ["source=files", "source.path=[a b.jsonl, c.csv]", "source.roles={bot: assistant}"]
    )
    assert config.source.path == ["a b.jsonl", "c.csv"]
    assert config.source.roles["bot"] == "assistant"
    assert config.source.roles["human"] == "user"


def test_home_folder_is_expanded_but_not_in_a_prompt() -> None:
    config = compose_config(
        "chat", ["model.path=~/m", "prompt=~/x", "long_file=[~/a.jsonl]", "cluster.env.OMP_NUM_THREADS=4"]
    )
    assert config.model.path == config.model.tokenizer == str(Path.home() / "m")
    assert config.long_file == [str(Path.home() / "a.jsonl")]
    assert config.prompt == "~/x"
    assert config.cluster.env == {"OMP_NUM_THREADS": "4"}


def test_unknown_key_in_a_file_is_named() -> None:
    plain = compose_config("train", []).model_dump(mode="json")
    plain["model"]["rope"]["thetta"] = 1
    with pytest.raises(UserError, match=r"unknown key 'model\.rope\.thetta'; did you mean 'model\.rope\.theta'"):
        from_dict(plain)


def test_groups_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [base]\nname: mine\npath: /models/mine\n")
    config = compose_config("train", ["model=mine"], str(tmp_path))
    assert (config.model.name, config.model.tokenizer, config.model.rope.theta) == ("mine", "/models/mine", None)
    with pytest.raises(UserError, match="no such folder"):
        compose_config("train", [], str(tmp_path / "none"))


def test_every_key_has_a_default_in_yaml() -> None:
    composed = compose_config("train", []).model_dump()
    sources = [compose_config("train", [f"source={o}", *NEEDS.get(o, [])]).source for o in groups()["source"]]
    composed["source"] = {key: value for source in sources for key, value in source.model_dump().items()}
    tasks = groups()["task"]
    words = [
        "judge=local",
        "logger=[tensorboard,wandb]",
        f"task=[{','.join(tasks)}]",
        *(word for o in ("local", *tasks) for word in NEEDS.get(o, [])),
    ]
    full = compose_config("train", words)
    composed |= {
        name: part and part.model_dump() for name in ("task", "judge", "logger") for part in [getattr(full, name)]
    }
    for key in KEYS:
        value: object = composed
        for part in key.split("."):
            assert isinstance(value, dict)
            assert part in value, key
            value = value[part]
