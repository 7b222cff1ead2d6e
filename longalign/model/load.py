"""Tokenizers and models, from a local folder or a hub, through plain transformers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer
from transformers.utils import logging as transformers_logging

from longalign.data.template import Template
from longalign.errors import UserError
from longalign.files import read_json
from longalign.model import original
from longalign.model.chatglm import glm_config
from longalign.model.cost import shape_of
from longalign.model.rope import check_inv_freq, restore_inv_freq, set_theta
from longalign.model.spm import chatglm_tokenizer, exact_llama, is_bare_llama
from longalign.progress import console, note
from longalign.schema import Config, Model

RECORD = "longalign.json"  # beside an exported model: the template it was trained with


def _load(kind: Any, path: str, setting: str, model: Model, **kwargs: Any) -> Any:
    """kind.from_pretrained(path), with the usual failures told in one message."""
    names_folder = path.startswith((".", "/")) or path.count("/") > 1  # a hub's names are NAME and OWNER/NAME
    if names_folder and not Path(path).is_dir():
        how = f"; {model.obtain}" if model.obtain and path == model.path else ""
        raise UserError(f"{setting}={path}: no such folder{how}")
    try:
        return kind.from_pretrained(path, trust_remote_code=False, **kwargs)  # unset, transformers would ask
    except (OSError, ValueError, RuntimeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise UserError(
            f"{setting}={path} cannot be loaded: {first.rstrip('.')}; give a folder or a hub name"
        ) from None


def load_tokenizer(config: Config) -> Any:
    """The tokenizer of model.tokenizer, with the ids of sentencepiece where it is one. Raises UserError."""
    path = config.model.tokenizer
    if folder := original.find(path):
        return chatglm_tokenizer(folder / "tokenizer.model")
    kind = LlamaTokenizer if is_bare_llama(Path(path)) else AutoTokenizer
    setting = "model.path" if path == config.model.path else "model.tokenizer"
    tokenizer = _load(kind, path, setting, config.model)
    if isinstance(tokenizer, LlamaTokenizer) and tokenizer.add_prefix_space is not False:
        said = "a space before every segment" if tokenizer.legacy else "no space before later segments, as Llama-2"
        note(f"model.tokenizer={path}: legacy={str(tokenizer.legacy).lower()} ({said}; tokenizer_config.json decides)")
        tokenizer = exact_llama(tokenizer)
    if read_record(path).get("split_special_tokens"):
        tokenizer.split_special_tokens = True
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


def read_record(path: str) -> dict[str, Any]:
    """What our own export noted beside a model; nothing for any other."""
    record = Path(path) / RECORD
    return read_json(record) if record.is_file() else {}


def template_settings(config: Config) -> dict[str, Any]:
    """`template` and `chat_template_kwargs`; template=auto takes what is recorded beside the model, else the preset."""
    recorded = read_record(config.model.path)
    learnt = recorded.get("template", "text") != "text"  # a base is yet to learn a template
    name = config.template
    if name == "auto":
        name = recorded["template"] if learnt else config.model.template
    arguments = {**(recorded.get("chat_template_kwargs") or {}), **config.model.chat_template_kwargs}
    return {"template": name, "chat_template_kwargs": arguments}


def load_template(config: Config) -> Template:
    """The encoder of conversations for this model. Raises UserError."""
    settings, tokenizer = template_settings(config), load_tokenizer(config)
    name = settings["template"]
    if name not in ("chat_template", "text") and tokenizer.chat_template and not read_record(config.model.path):
        also = f"asked with {name}; template=chat_template takes its own"
        note(f"model.path={config.model.path} has a chat template of its own; {also}")
    return Template(name, tokenizer, settings["chat_template_kwargs"])


def _told_config(config: Config) -> Any:
    """The Hugging Face config of model.path as its files tell it, and once a word on whose rotary base will hold."""
    path, theta = config.model.path, config.model.rope.theta
    folder = original.find(path)
    if folder and not read_json(folder / "config.json").get("rope_ratio"):
        if theta is None:
            note(
                f"model.path={path}: config.json tells no rope_ratio, so the rotary base is 10000 as in ChatGLM3-6B; "
                "LongAlign-6B was trained with model.rope.theta=2000000"
            )
        return glm_config(read_json(folder / "config.json"))
    hf = (
        glm_config(read_json(folder / "config.json")) if folder else _load(AutoConfig, path, "model.path", config.model)
    )
    base = (getattr(hf.get_text_config(), "rope_parameters", None) or {}).get("rope_theta")
    if base and theta not in (None, base):
        note(f"model.rope.theta={theta:.12g} replaces the rotary base {base:.12g} of model.path={path}")
    return hf


def load_config(config: Config, shape_only: bool = False) -> Any:
    """The Hugging Face config with model.config and model.rope applied; or only its shape, None if out of reach."""
    try:
        hf = _told_config(config)
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
    """model.dtype; auto is bfloat16 on GPUs that have it, and float32 elsewhere: bfloat16 is emulated slowly there."""
    if config.model.dtype == "auto":
        lacks = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.float32 if device == "cpu" or lacks else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.model.dtype]


def loads_weights(config: Config) -> bool:
    """Whether the weights are read from somewhere, not drawn from the seed."""
    return config.model.init == "pretrained" or config.init_from is not None


def weights_of(config: Config) -> tuple[str, str]:
    """The setting that names the weights, and the folder or hub name that transformers reads them from.

    Weights in ChatGLM's original layout are converted first, once. Raises UserError.
    """
    setting, path = ("init_from", config.init_from) if config.init_from else ("model.path", config.model.path)
    folder = original.find(str(path), weights=True)
    return setting, str(original.converted(folder) if folder else path)


def load_model(config: Config, dtype: torch.dtype) -> Any:
    """The causal language model in `dtype`, with rotary frequencies checked. Raises UserError.

    init_from replaces the weights of model.path; model.init=random draws them from the seed instead. Weights that are
    read stand on the CPU, those that are drawn on the device, which draws 7B a hundred times as fast.
    """
    if not console.is_terminal:
        transformers_logging.disable_progress_bar()
    hf = load_config(config)
    if not loads_weights(config):
        torch.manual_seed(config.seed)
        with torch.device(resolve_device(config)):
            model = AutoModelForCausalLM.from_config(hf, dtype=dtype)
    else:
        setting, path = weights_of(config)
        model, found = _load(
            AutoModelForCausalLM, path, setting, config.model, config=hf, dtype=dtype, output_loading_info=True
        )
        if lost := sorted(found["missing_keys"]) + sorted(str(key[0]) for key in found["mismatched_keys"]):
            raise UserError(f"{setting}={path} lacks {len(lost)} weights of this model, among them {lost[0]}")
    restore_inv_freq(model)
    check_inv_freq(model, config.model.rope.theta)
    return model
