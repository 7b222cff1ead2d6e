"""Tokenizers and models, from a local folder or a hub, through plain transformers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from longalign.data.template import Template
from longalign.errors import UserError
from longalign.files import read_json
from longalign.model import chatglm
from longalign.model.cost import shape_of
from longalign.model.rope import check_inv_freq, restore_inv_freq, set_theta
from longalign.progress import console
from longalign.schema import Config

RECORD = "longalign.json"  # beside an exported model: the template it was trained with


def _load(kind: Any, path: str, setting: str, **kwargs: Any) -> Any:
    """kind.from_pretrained(path), with the usual failures told in one message."""
    if chatglm.is_original(Path(path)):
        raise UserError(
            f"{setting}={path} is in ChatGLM's original layout; "
            f"`longalign convert model.path={path} output_dir=NEW` makes a folder to use instead"
        )
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise UserError(f"{setting}={path}: no such folder")
    try:
        return kind.from_pretrained(path, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise UserError(
            f"{setting}={path} cannot be loaded: {first.rstrip('.')}; give a folder or a hub name"
        ) from None


def load_tokenizer(config: Config) -> Any:
    """The tokenizer of model.tokenizer. Raises UserError."""
    tokenizer = _load(AutoTokenizer, config.model.tokenizer, "model.tokenizer")
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.tokenizer={config.model.tokenizer} has no EOS token: answers could not end")
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """A fingerprint of everything that decides the ids of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    for runtime_only in ("padding", "truncation"):
        state.pop(runtime_only, None)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]


def template_settings(config: Config) -> dict[str, Any]:
    """`template` and `chat_template_kwargs`; template=auto takes what is recorded beside the model, else the preset."""
    record = Path(config.model.path) / RECORD
    recorded = read_json(record) if record.is_file() else {}
    learnt = recorded.get("template", "text") != "text"  # a base is yet to learn a template
    name = config.template
    if name == "auto":
        name = recorded["template"] if learnt else config.model.template
    arguments = {**(recorded.get("chat_template_kwargs") or {}), **config.model.chat_template_kwargs}
    return {"template": name, "chat_template_kwargs": arguments}


def load_template(config: Config) -> Template:
    """The encoder of conversations for this model. Raises UserError."""
    settings = template_settings(config)
    return Template(settings["template"], load_tokenizer(config), settings["chat_template_kwargs"])


def load_config(config: Config, shape_only: bool = False) -> Any:
    """The Hugging Face config with model.config and model.rope applied; or only its shape, None if out of reach."""
    try:
        hf = _load(AutoConfig, config.model.path, "model.path")
    except UserError:
        if shape_only:
            return None
        raise
    for key, value in config.model.config.items():
        if not hasattr(hf, key):
            raise UserError(f"model.config.{key}: {hf.model_type} has no such setting")
        setattr(hf, key, value)
    set_theta(hf, config.model.rope.theta, config.max_length)
    return shape_of(hf) if shape_only else hf


def resolve_device(config: Config) -> str:
    """'cuda' or 'cpu'. Raises UserError if the wanted one is missing."""
    if config.cluster.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"cluster={config.cluster.name} needs a CUDA device and there is none; use cluster=cpu")
    if config.cluster.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.cluster.device


def resolve_dtype(config: Config, device: str) -> torch.dtype:
    """model.dtype; auto is bfloat16 on CUDA and float32 on a CPU, most of which emulate bfloat16 slowly."""
    if config.model.dtype == "auto":
        return torch.bfloat16 if device == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.model.dtype]


def load_model(config: Config, dtype: torch.dtype) -> Any:
    """The causal language model on the CPU in `dtype`, with rotary frequencies checked. Raises UserError.

    init_from replaces the weights of model.path; model.init=random draws them from the seed instead.
    """
    if not console.is_terminal:
        transformers_logging.disable_progress_bar()
    hf = load_config(config)
    if config.model.init == "random" and config.init_from is None:
        torch.manual_seed(config.seed)
        model = AutoModelForCausalLM.from_config(hf, dtype=dtype)
    else:
        setting, path = ("init_from", config.init_from) if config.init_from else ("model.path", config.model.path)
        model, found = _load(AutoModelForCausalLM, str(path), setting, config=hf, dtype=dtype, output_loading_info=True)
        if lost := sorted(found["missing_keys"]) + sorted(str(key[0]) for key in found["mismatched_keys"]):
            raise UserError(f"{setting}={path} lacks {len(lost)} weights of this model, among them {lost[0]}")
    restore_inv_freq(model)
    check_inv_freq(model, config.model.rope.theta)
    return model
