"""The trained weights as a Hugging Face folder that plain transformers, or a server, loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from longalign.data.jinja import EXPORTED
from longalign.data.plan import read_data
from longalign.files import disk_errors, fresh_folder, write_json
from longalign.model.load import RECORD, load_tokenizer
from longalign.schema import Config


def gather(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and saved buffer, on the CPU of rank 0 (empty elsewhere); called by every rank."""
    first, state = dist.get_rank() == 0, {}
    for name, parameter in model.named_parameters():
        # One parameter at a time: ZeRO-3 never holds the whole model on a GPU for this.
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if first:
                state[name] = parameter.detach().cpu().clone()
    persistent = model.state_dict(keep_vars=True).keys() if first else ()
    state.update({n: b.detach().cpu() for n, b in model.named_buffers() if n in persistent})
    return state


def export(engine: Any, config: Config, folder: Path, step: int) -> None:
    """Write safetensors, config, tokenizer, chat template and the record of how to prompt it; by every rank.

    step: the last one trained.
    """
    model = engine.module.model
    state = gather(model)
    if dist.get_rank() == 0:
        with disk_errors(folder, "output_dir"), fresh_folder(folder, ("*",), overwrite=True) as partial:
            model.save_pretrained(partial, state_dict=state)
            tokenizer = load_tokenizer(config)
            data = read_data(config.data_dir)[1]  # what was trained on tells how to ask, whatever the presets say now
            template = {"template": data["template"], "chat_template_kwargs": data.get("chat_template_kwargs")}
            record = {
                **template,
                "step": step,
                "max_length": config.max_length,
                "base": config.init_from or config.model.path,
                "split_special_tokens": tokenizer.split_special_tokens,
            }
            if jinja := EXPORTED.get(template["template"]):
                tokenizer.chat_template = jinja
                tokenizer.split_special_tokens = False  # other programs read the special tokens of a rendered text
            tokenizer.save_pretrained(partial)
            write_json(partial / RECORD, record)
    dist.barrier()
