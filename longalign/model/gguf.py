"""GGUF files, as llama.cpp and its like use them, to the folders that transformers, and so longalign, trains from.

transformers reads the tensors, dequantised, and the tokenizer. What it gets wrong or leaves out is taken from the
file's own fields: which tokens begin, end and pad (transformers 5.17 takes the end of a sequence for its beginning).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longalign.errors import UserError
from longalign.files import disk_errors, fresh_folder, require_disk, write_json
from longalign.model.load import RECORD
from longalign.progress import console

SUFFIX = ".gguf"
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' word -> GGUF's


def to_folder(file: Path, output: Path, dtype: torch.dtype, overwrite: bool) -> None:
    """Write safetensors in `dtype`, config, tokenizer and chat template. Raises UserError.

    In float32 the weights are exactly what the file's blocks stand for.
    """
    fields = read_fields(file)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not console.is_terminal:
        logging.disable_progress_bar()

    where = {"pretrained_model_name_or_path": str(file.absolute().parent), "gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise UserError(f"model.path={file}: transformers cannot read it: {first}") from None
    name_tokens(tokenizer, fields)
    config = type(model.config).from_dict(
        {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    plain: Any = type(model)(config)  # a model that was read from GGUF refuses to be saved
    plain.to(dtype).load_state_dict(model.state_dict())
    require_disk(output, sum(p.numel() * p.element_size() for p in plain.parameters()), "output_dir")
    with disk_errors(output, "output_dir"), fresh_folder(output, ("*",), overwrite) as folder:
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if tokenizer.chat_template:  # whatever preset model.path= is given to
            write_json(folder / RECORD, {"template": "chat_template", "chat_template_kwargs": {}})


def read_fields(file: Path) -> dict[str, Any]:
    """The fields of the file's header. Raises UserError if it is no GGUF, or without the package that reads them."""
    if not file.is_file():
        raise UserError(f"model.path={file}: no such file")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"model.path={file}: GGUF files need the package gguf; pip install 'longalign[gguf]'") from None
    try:
        return {name: field.contents() for name, field in GGUFReader(file).fields.items()}
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"model.path={file} is no whole GGUF file: {error}") from None


def name_tokens(tokenizer: Any, fields: dict[str, Any]) -> None:
    """Special tokens and the chat template as the file tells them; and decoding that gives back what was encoded."""
    tokenizer.clean_up_tokenization_spaces = False
    tokens = fields.get("tokenizer.ggml.tokens") or []
    for ours, theirs in SPECIAL.items():
        number = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if number is not None and number < len(tokens):
            setattr(tokenizer, f"{ours}_token", tokens[number])
    if template := fields.get("tokenizer.chat_template"):
        tokenizer.chat_template = template
