"""ChatGLM3 and LongAlign-6B checkpoints in their original layout, to and from transformers' GlmForCausalLM.

GLM in transformers is the same network under other names: query_key_value holds the rows of q, k and v one below the
other, everything else is a copy, and the logits are equal. So no code from the checkpoint is run. Both directions
keep every bit and dtype and hold one shard at a time.

The original layout does not always tell its rotary base: LongAlign-6B's own code fixes ratio 200 whatever config.json
says. Its presets set model.rope.theta=2000000, which wins over `rope_ratio`; null leaves what config.json says.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from transformers import GenerationConfig, GlmConfig

from longalign.errors import UserError
from longalign.files import read_json, write_json
from longalign.model.shards import Entries, checkpoint_folder, read_shard, stacked, survey
from longalign.model.spm import chatglm_tokenizer, read_sentencepiece

ORIGINAL_CONFIG = "original_config.json"  # what to_original needs beside a converted model
ORIGINAL_INV_FREQ = "original_inv_freq.safetensors"
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"  # always of base 10000: the original computes angles elsewhere
EMBEDDING = "model.embed_tokens.weight"

FIELDS: dict[str, tuple[str, Any]] = {  # field of the original: GLM's name for it, the original's default
    "padded_vocab_size": ("vocab_size", 65024),
    "hidden_size": ("hidden_size", 4096),
    "ffn_hidden_size": ("intermediate_size", 13696),
    "num_layers": ("num_hidden_layers", 28),
    "num_attention_heads": ("num_attention_heads", 32),
    "multi_query_group_num": ("num_key_value_heads", 1),
    "kv_channels": ("head_dim", 128),
    "layernorm_epsilon": ("rms_norm_eps", 1e-5),
    "seq_length": ("max_position_embeddings", 2048),
    "add_qkv_bias": ("attention_bias", False),
    "attention_dropout": ("attention_dropout", 0.0),
    "use_cache": ("use_cache", True),
    "eos_token_id": ("eos_token_id", 2),
    "pad_token_id": ("pad_token_id", 0),
}
FIXED: dict[str, Any] = {  # what GLM can be no other way
    **{"rmsnorm": True, "post_layer_norm": True, "original_rope": True, "add_bias_linear": False},
    **{"apply_residual_connection_post_layernorm": False, "fp32_residual_connection": False},
    **{"hidden_dropout": 0.0, "quantization_bit": 0, "pre_seq_len": None},
}
NEW = {"model_type": "chatglm", "multi_query_attention": True, "tie_word_embeddings": False, **FIXED}


def is_original(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint in ChatGLM's original layout."""
    try:
        return read_json(folder / "config.json").get("model_type") == "chatglm"
    except (OSError, ValueError, AttributeError):
        return False


def glm_config(original: dict[str, Any]) -> GlmConfig:
    """GLM's configuration for ChatGLM3's config.json; rope_ratio multiplies the base 10000.

    Raises UserError naming the field for anything that is not ChatGLM3's architecture.
    """
    for name, value in FIXED.items():
        given = original.get(name)
        if given not in (None, value):
            raise UserError(f"config.json: {name}={json.dumps(given)} is not ChatGLM3, which has {json.dumps(value)}")
    ratio = original.get("rope_ratio") or 1
    if ratio != 1 and "chatglm2" in str(original.get("_name_or_path")).lower():
        raise UserError(f"config.json: rope_ratio={ratio} divides positions in ChatGLM2, and GLM cannot")
    told = {name: value for name, value in original.items() if value is not None}
    settings = {ours: told.get(theirs, default) for theirs, (ours, default) in FIELDS.items()}
    if not original.get("multi_query_attention", False):
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    try:
        return GlmConfig(
            **settings,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0 * ratio, "partial_rotary_factor": 0.5},
            tie_word_embeddings=False,
            hidden_act="silu",
            architectures=["GlmForCausalLM"],
            dtype=original.get("torch_dtype", original.get("dtype")),
        )
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(f"config.json: {error}") from None


def to_glm(
    folder: Path,
    output: Path,
    overwrite: bool = False,
    config: GlmConfig | None = None,
    setting: str = "output_dir",
) -> None:
    """Convert an original checkpoint into `output`, which plain AutoModelForCausalLM and AutoTokenizer load.

    `config` is written instead of what glm_config makes of config.json, say with another rotary base. Memory above the
    start stays near the largest shard; the output has as many shards as the input. Raises UserError for another
    architecture and for missing, surplus or misshapen tensors, before anything is written.
    """
    if not is_original(folder):
        raise UserError(f"{folder} holds no checkpoint in ChatGLM's original layout (config.json: model_type chatglm)")
    original = read_json(folder / "config.json")
    config = config or glm_config(original)
    if (tokenizer := folder / "tokenizer.model").is_file():
        read_sentencepiece(tokenizer)  # refused now, not after the weights
    layout, order = _layout(config), _qkv_order(config, original)
    shards = survey(folder, {name: stacked(parts.values()) for name, parts in layout.items()}, ignore=INV_FREQ)
    inv_freq: dict[str, torch.Tensor] = {}

    def entries(path: Path) -> Entries:
        tensors = read_shard(path)
        inv_freq.update({name: tensors.pop(name).clone() for name in [INV_FREQ] if name in tensors})
        made: Entries = {}
        for name, tensor in tensors.items():
            rows = tensor[order] if order is not None and len(layout[name]) == 3 else tensor
            blocks = rows.split([shape[0] for shape in layout[name].values()])
            made.update({key: [block] for key, block in zip(layout[name], blocks, strict=True)})
        return made

    with checkpoint_folder(folder, output, overwrite, setting, list(shards), entries) as partial:
        save_file(inv_freq, partial / ORIGINAL_INV_FREQ)
        shutil.copyfile(folder / "config.json", partial / ORIGINAL_CONFIG)
        if tokenizer.is_file():
            chatglm_tokenizer(tokenizer).save_pretrained(partial)
        GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id).save_pretrained(partial)
        config.save_pretrained(partial)


def to_original(folder: Path, output: Path, overwrite: bool = False) -> None:
    """The reverse of to_glm: a GLM checkpoint, converted or trained since, in the original layout as safetensors.

    What GLM's configuration does not know comes back from original_config.json where it is there. Raises UserError
    for what the original layout cannot say.
    """
    if not (folder / "config.json").is_file() or read_json(folder / "config.json").get("model_type") != "glm":
        raise UserError(f"{folder} holds no GLM checkpoint (config.json: model_type glm)")
    config: Any = GlmConfig.from_pretrained(folder)
    fields = _original_fields(config, folder)
    if (folder / ORIGINAL_CONFIG).is_file():
        original = read_json(folder / ORIGINAL_CONFIG)
        before = _original_fields(glm_config(original), folder)
        original |= {name: value for name, value in fields.items() if before.get(name) != value}
    else:
        original = {**NEW, **{name: value for name, value in fields.items() if (name, value) != ("rope_ratio", 1)}}
    layout, order = _layout(config), _qkv_order(config, original)
    shards = survey(folder, {key: shape for parts in layout.values() for key, shape in parts.items()})
    file_of = {key: path for path, keys in shards.items() for key in keys}

    def entries(path: Path) -> Entries:
        read = functools.cache(read_shard)  # q, k and v of one layer may lie in different shards
        made: Entries = {}
        for name, parts in layout.items():
            if file_of[next(iter(parts))] == path:
                blocks = [read(file_of[key])[key] for key in parts]
                made[name] = [torch.cat(blocks)[order.argsort()]] if order is not None and len(parts) == 3 else blocks
        if path == next(iter(shards)):
            kept = folder / ORIGINAL_INV_FREQ
            dtype = read(file_of[EMBEDDING])[EMBEDDING].dtype
            buffers = read_shard(kept) if kept.is_file() else {INV_FREQ: _inv_freq(config.head_dim // 2, dtype)}
            made |= {name: [tensor] for name, tensor in buffers.items()}
        return made

    with checkpoint_folder(folder, output, overwrite, "output_dir", list(shards), entries) as partial:
        write_json(partial / "config.json", original)


def _original_fields(config: Any, folder: Path) -> dict[str, Any]:
    """What GLM's configuration says, in the original's words."""
    rope = config.rope_parameters
    if (rope["rope_type"], rope.get("partial_rotary_factor"), config.hidden_act) != ("default", 0.5, "silu"):
        raise UserError(f"{folder}: ChatGLM's original layout cannot say {rope} with hidden_act={config.hidden_act}")
    ratio = rope["rope_theta"] / 10000
    fields = {theirs: getattr(config, ours) for theirs, (ours, _) in FIELDS.items()}
    fields["rope_ratio"] = int(ratio) if ratio == int(ratio) else ratio
    if config.dtype is not None:
        fields["torch_dtype"] = str(config.dtype).removeprefix("torch.")
    return fields


def _layout(config: Any) -> dict[str, dict[str, tuple[int, ...]]]:
    """Each tensor of the original: the GLM tensors, with shapes, whose rows it holds one below the other."""
    d, ffn, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layout: dict[str, dict[str, tuple[int, ...]]] = {
        "transformer.embedding.word_embeddings.weight": {EMBEDDING: (vocab, d)},
        "transformer.encoder.final_layernorm.weight": {"model.norm.weight": (d,)},
        "transformer.output_layer.weight": {"lm_head.weight": (vocab, d)},
    }
    for i in range(config.num_hidden_layers):
        theirs, ours = f"transformer.encoder.layers.{i}", f"model.layers.{i}"
        for kind, width in (("weight", (d,)), ("bias", ()))[: 2 if config.attention_bias else 1]:
            rows = {f"{ours}.self_attn.{name}_proj.{kind}": (n, *width) for name, n in (("q", q), ("k", kv), ("v", kv))}
            layout[f"{theirs}.self_attention.query_key_value.{kind}"] = rows
        for name, our_name, shape in (
            ("input_layernorm", "input_layernorm", (d,)),
            ("self_attention.dense", "self_attn.o_proj", (d, q)),
            ("post_attention_layernorm", "post_attention_layernorm", (d,)),
            ("mlp.dense_h_to_4h", "mlp.gate_up_proj", (2 * ffn, d)),
            ("mlp.dense_4h_to_h", "mlp.down_proj", (d, ffn)),
        ):
            layout[f"{theirs}.{name}.weight"] = {f"{ours}.{our_name}.weight": shape}
    return layout


def _qkv_order(config: Any, original: dict[str, Any]) -> torch.Tensor | None:
    """Without multi_query_attention the original interleaves q, k, v head by head: the rows' order in GLM."""
    if original.get("multi_query_attention", False):
        return None
    rows = torch.arange(3 * config.num_attention_heads * config.head_dim)
    return rows.view(config.num_attention_heads, 3, config.head_dim).transpose(0, 1).flatten()


def _inv_freq(dim: int, dtype: torch.dtype) -> torch.Tensor:
    """The buffer of the original, [dim / 2], which computes it in the checkpoint's own precision."""
    return 1.0 / (10000 ** (torch.arange(0, dim, 2).to(dtype) / dim))
