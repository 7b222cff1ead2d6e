"""Shared fixtures: a small random Llama with the bundled tokenizer, tokenised data for it, and a way to launch runs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of models this small mostly wait for one another

from longalign.config import compose_config
from longalign.schema import Config

TINY = Path(__file__).parent.parent / "longalign" / "assets" / "tiny"
WORDS = ["the", "quiet", "lantern", "near", "mill", "keeps", "amber", "falcon", "golden", "river", "what", "is", "of"]


def make_model(folder: Path, **changes: Any) -> Path:
    """A Llama of 0.1M parameters in `folder`, float32, with grouped queries and untied embeddings."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    with torch.no_grad():  # the default 0.02 leaves attention so flat that a leak would hardly move a logit
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def conversation(n_words: int, n_answer: int, salt: int) -> dict[str, Any]:
    word = lambda i: WORDS[(i * 7 + salt) % len(WORDS)]
    user = " ".join(word(i) for i in range(n_words))
    return {
        "messages": [
            {"role": "user", "content": user},
            {"role": "assistant", "content": " ".join(word(i + 3) for i in range(n_answer))},
        ]
    }


def filling(n_tokens: int) -> dict[str, Any]:
    """A conversation of exactly so many tokens under longalign-llama."""
    from transformers import AutoTokenizer

    from longalign.data.template import Template

    template = Template("longalign-llama", AutoTokenizer.from_pretrained(TINY))
    candidates = (conversation(n, 5, salt) for n in range(n_tokens) for salt in range(3))
    return next(c for c in candidates if len(template.rows(c["messages"])[0].input_ids) == n_tokens)


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def make_original(folder: Path, **fields: Any) -> Path:
    """The golden ChatGLM3 of 0.2M parameters as a folder in the original layout; a field of None is left out.

    Its 256 rows of vocabulary are repeated where padded_vocab_size asks for more, so that the tokenizer's ids fit.
    """
    from safetensors.torch import load_file, save_file

    golden = Path(__file__).parent / "golden"
    folder.mkdir(parents=True)
    shutil.copy(golden / "chatglm_tokenizer" / "tokenizer.model", folder)
    told = {**json.loads((golden / "chatglm_forward" / "config_ratio1.json").read_text()), **fields}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in told.items() if value is not None}))
    tensors = load_file(golden / "chatglm_forward" / "model.safetensors")
    for name in ("transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight"):
        tensors[name] = tensors[name].repeat(told["padded_vocab_size"] // 256, 1)
    save_file(tensors, folder / "model.safetensors")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with most slow tests first: of two processes that share the files, none has a long one left at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell that runs the tests in its background has them ignore SIGINT, and so would the commands they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Conversions of tests stay out of the user's cache."""
    os.environ["LONGALIGN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def base_words(model_dir: Path) -> list[str]:
    """Overrides that every command of a test shares."""
    return [
        "model=hf",
        f"model.path={model_dir}",
        "model.template=longalign-llama",
        "datanum=all",
        "cluster=cpu",
        "max_length=128",
        "seed=7",
    ]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory, base_words: list[str]) -> Path:
    """27 samples of about 10 to 120 tokens, one of which fills a pack of 128 exactly."""
    from longalign.data.tokenize import tokenize

    root = tmp_path_factory.mktemp("data")
    long = [conversation(30 + 4 * i, 3 + i, i) for i in range(8)] + [filling(128)]
    short = [conversation(4 + i, 1 + i % 5, 3 * i) for i in range(18)]
    files = [
        f"long_file={write_jsonl(root / 'long.jsonl', long)}",
        f"short_file={write_jsonl(root / 'short.jsonl', short)}",
    ]
    tokenize(compose_config("tokenize", [*base_words, *files, f"data_dir={root / 'tokens'}"]))
    return root / "tokens"


@pytest.fixture(scope="session")
def run_config(base_words: list[str], data_dir: Path) -> Callable[..., Config]:
    """run_config(folder, "lr=1", ...) -> the composed Config of a train run in that folder."""

    def make(folder: Path, *words: str) -> Config:
        return compose_config("train", [*base_words, f"data_dir={data_dir}", f"output_dir={folder}", *words])

    return make


def launch_all(configs: list[Config], folder: Path, worker: Sequence[str] = ("-m", "longalign.train.worker")) -> int:
    """Train several runs one after the other in one launch, which saves the start of the processes.

    worker: what every rank runs, in Python's own words.
    """
    from longalign import launch

    prepared = [launch.prepare_run(config, dry_run=False)[0] for config in configs]
    command = [sys.executable, *worker, *(f"{config.output_dir}/config.yaml" for config in prepared)]
    return launch.run_workers(command, prepared[0], folder / "logs")


def in_process(*words: str, cwd: Path, input: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command line without a process of its own, whose start takes longer than most commands.

    longalign() is for what needs one: signals, limits, real standard streams, what a command imports and, once for
    every command, that it can be started.
    """
    from longalign.cli import app

    handler = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.chdir(cwd):
            done = CliRunner().invoke(app, words, input=input, prog_name="longalign", catch_exceptions=False)
    finally:
        signal.signal(signal.SIGTERM, handler)
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


def longalign(*words: str, cwd: Path, timeout: float = 300, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run the installed command line in a real process."""
    command = [str(Path(sys.executable).with_name("longalign")), *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, **kwargs)
