"""ChatGLM3's original layout becomes GLM and comes back: golden logits, golden ids, every bit, and bounded memory."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from longalign.errors import UserError
from longalign.model import chatglm, shards
from longalign.model.chatglm import glm_config, is_original, to_glm, to_original
from longalign.model.rope import check_inv_freq
from longalign.model.spm import SPECIAL, chatglm_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"
FORWARD, TOKENIZER = GOLDEN / "chatglm_forward", GOLDEN / "chatglm_tokenizer" / "tokenizer.model"
IDS = json.loads((GOLDEN / "chatglm_tokenizer" / "golden.json").read_text(encoding="utf-8"))
CONFIG = json.loads((FORWARD / "config_ratio1.json").read_text())
QKV = "transformer.encoder.layers.1.self_attention.query_key_value.weight"


def checkpoint(
    folder: Path, kind: str = "safetensors", n_shards: int = 1, dtype: torch.dtype = torch.float32, **fields: Any
) -> Path:
    """The golden model as an original checkpoint of that layout; a field of None is left out of config.json."""
    folder.mkdir(parents=True)
    config = {**CONFIG, "torch_dtype": str(dtype).removeprefix("torch."), **fields}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    shutil.copyfile(TOKENIZER, folder / "tokenizer.model")
    write(folder, {k: v.to(dtype) for k, v in load_file(FORWARD / "model.safetensors").items()}, kind, n_shards)
    return folder


def write(folder: Path, tensors: dict[str, torch.Tensor], kind: str = "safetensors", n_shards: int = 1) -> None:
    stem = "model" if kind == "safetensors" else "pytorch_model"
    save = save_file if kind == "safetensors" else torch.save
    if n_shards == 1:
        save(tensors, folder / f"{stem}.{kind}")
        return
    weight_map = {}
    for i in range(n_shards):
        name = f"{stem}-{i + 1:05d}-of-{n_shards:05d}.{kind}"
        part = {key: tensors[key] for key in list(tensors)[i::n_shards]}
        save(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    for path in sorted(folder.glob("pytorch_model*.bin")):
        found |= torch.load(path, weights_only=True)
    return found


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert tensor.shape == b[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("glm")
    to_glm(checkpoint(root / "original", "bin", 2), root / "converted")
    return root / "converted"


# -- model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_golden_logits(glm: Path, attention: str) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(glm, attn_implementation=attention, output_loading_info=True)
    assert not any(report.values())
    golden = np.load(FORWARD / "golden.npz")
    for case in ("A", "B"):
        with torch.no_grad():
            got = model(input_ids=torch.from_numpy(golden[f"ids_{case}"]).long()[None]).logits[0].numpy()
        assert np.abs(got - golden[f"logits_ratio1_{case}"]).max() < 2e-5


def test_golden_rotary_angles(glm: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(glm)
    golden = np.load(FORWARD / "golden.npz")
    positions = torch.from_numpy(golden["rope_positions"]).long()[None]
    cos, sin = model.model.rotary_emb(torch.zeros(1), positions)
    got = torch.stack([cos, sin], -1)[0, :, :4].numpy()  # the second half repeats the first
    assert np.abs(got - golden["rope_cos_sin_ratio1"]).max() < 1e-6


def test_rope_ratio_multiplies_the_base(tmp_path: Path) -> None:
    to_glm(checkpoint(tmp_path / "o", rope_ratio=200), tmp_path / "glm")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "glm")
    assert model.config.rope_parameters["rope_theta"] == 2_000_000
    check_inv_freq(model, 2_000_000)


def test_config() -> None:
    config = glm_config(CONFIG)
    assert (config.rms_norm_eps, config.pad_token_id, config.eos_token_id) == (1e-5, 0, 2)
    assert (config.rope_parameters["rope_theta"], config.rope_parameters["partial_rotary_factor"]) == (10_000, 0.5)
    assert (config.dtype, config.num_key_value_heads) == (torch.float32, 2)
    assert glm_config({**CONFIG, "multi_query_attention": False}).num_key_value_heads == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("add_bias_linear", True),
        ("rmsnorm", False),
        ("post_layer_norm", False),
        ("original_rope", False),
        ("apply_residual_connection_post_layernorm", True),
        ("fp32_residual_connection", True),
        ("quantization_bit", 4),
        ("pre_seq_len", 128),
        ("num_layers", "two"),
    ],
)
def test_other_architectures_are_refused_by_name(field: str, value: Any) -> None:
    name = "num_hidden_layers" if field == "num_layers" else field
    with pytest.raises(UserError, match=name):
        glm_config({**CONFIG, field: value})


def test_chatglm2_reads_rope_ratio_another_way() -> None:
    with pytest.raises(UserError, match="rope_ratio"):
        glm_config({**CONFIG, "rope_ratio": 16, "_name_or_path": "THUDM/chatglm2-6b-32k"})


def test_is_original(glm: Path, tmp_path: Path) -> None:
    assert is_original(checkpoint(tmp_path / "o"))
    assert not is_original(glm)
    assert not is_original(tmp_path / "nothing")


# -- tensors --------------------------------------------------------------------------------------


def test_strict(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "o")
    whole = load_file(folder / "model.safetensors")
    changes: dict[str, dict[str, torch.Tensor]] = {
        f"missing: {QKV}": {k: v for k, v in whole.items() if k != QKV},
        "surplus: lm_head.weight": {**whole, "lm_head.weight": torch.zeros(2)},
        r"wrong: .*query_key_value.weight torch.float32 \[127, 64\] instead of \[128, 64\]": {
            **whole,
            QKV: whole[QKV][1:].clone(),
        },
        r"wrong: .*query_key_value.weight torch.int8": {**whole, QKV: whole[QKV].to(torch.int8)},
    }
    for message, tensors in changes.items():
        write(folder, tensors)
        with pytest.raises(UserError, match=message):
            to_glm(folder, tmp_path / "glm")
    (folder / "tokenizer.model").write_text("not a model")
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        to_glm(folder, tmp_path / "glm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o"]  # nothing was begun


def test_broken_shards(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "o", "bin", 2)
    first, second = sorted(folder.glob("*.bin"))
    repeated = {**torch.load(second), QKV: torch.load(first).get(QKV, torch.load(second).get(QKV))}
    torch.save({**torch.load(first), QKV: repeated[QKV]}, first)
    torch.save(repeated, second)
    with pytest.raises(UserError, match=f"twice: {QKV}"):
        to_glm(folder, tmp_path / "glm")
    second.write_bytes(second.read_bytes()[:5000])
    with pytest.raises(UserError, match=f"{second.name} cannot be read"):
        to_glm(folder, tmp_path / "glm")
    second.write_bytes(pickle.dumps({"x": Path}, protocol=2))
    with pytest.raises(UserError, match=f"{second.name} cannot be read"):
        to_glm(folder, tmp_path / "glm")
    second.unlink()
    with pytest.raises(UserError, match=f"{second.name} cannot be read"):
        to_glm(folder, tmp_path / "glm")
    (folder / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(UserError, match="index"):
        to_glm(folder, tmp_path / "glm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "n_shards"), [("safetensors", 1), ("safetensors", 2), ("bin", 1), ("bin", 3)])
def test_round_trip_keeps_every_bit(tmp_path: Path, kind: str, n_shards: int, dtype: torch.dtype) -> None:
    folder = checkpoint(tmp_path / "o", kind, n_shards, dtype, rope_ratio=200, transformers_version="4.30.2")
    to_glm(folder, tmp_path / "glm")
    assert len(list((tmp_path / "glm").glob("model*.safetensors"))) == n_shards
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "glm", dtype="auto").dtype == dtype
    to_original(tmp_path / "glm", tmp_path / "back")
    assert_same(tensors_of(folder), tensors_of(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()
    assert is_original(tmp_path / "back")


def test_old_pickles_are_read_too(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "o", "bin")
    tensors = tensors_of(folder)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    to_glm(folder, tmp_path / "glm")
    to_original(tmp_path / "glm", tmp_path / "back")
    assert_same(tensors, tensors_of(tmp_path / "back"))


def test_trained_model_goes_back(tmp_path: Path, glm: Path) -> None:
    """What save_pretrained wrote, in other shards and with another base, becomes original without our extra files."""
    model = AutoModelForCausalLM.from_pretrained(glm)
    model.config.rope_parameters["rope_theta"] = 2_000_000.0
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 5
    to_original(tmp_path / "saved", tmp_path / "back")
    assert_same(load_file(FORWARD / "model.safetensors"), tensors_of(tmp_path / "back"))  # inv_freq stays that of 10000
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["rope_ratio"] == 200
    assert CONFIG.items() <= {**CONFIG, **config}.items()
    to_glm(tmp_path / "back", tmp_path / "again")
    assert_same(tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "again"))


def test_without_multi_query_attention(tmp_path: Path) -> None:
    """Then the original holds q, k and v of head 0, of head 1, and so on."""
    folder = checkpoint(tmp_path / "o", multi_query_attention=False, multi_query_group_num=1)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "query_key_value" in name]:
        tensors[name] = torch.randn(3 * 64, *tensors[name].shape[1:])
    write(folder, tensors)
    to_glm(folder, tmp_path / "glm")
    made = load_file(tmp_path / "glm" / "model.safetensors")
    per_head = tensors[QKV].view(4, 3, 16, 64)
    for i, kind in enumerate("qkv"):
        assert torch.equal(made[f"model.layers.1.self_attn.{kind}_proj.weight"].view(4, 16, 64), per_head[:, i])
    to_original(tmp_path / "glm", tmp_path / "back")
    assert_same(tensors, tensors_of(tmp_path / "back"))


def test_mixed_dtypes(tmp_path: Path) -> None:
    """Of tensors they are kept; within one tensor the original layout has no place for them."""
    folder = checkpoint(tmp_path / "o", dtype=torch.float16)
    tensors = load_file(folder / "model.safetensors")
    norm = "transformer.encoder.final_layernorm.weight"
    tensors[norm] = tensors[norm].float()
    write(folder, tensors)
    to_glm(folder, tmp_path / "glm")
    to_original(tmp_path / "glm", tmp_path / "back")
    assert_same(tensors, tensors_of(tmp_path / "back"))
    made = load_file(tmp_path / "glm" / "model.safetensors")
    key = "model.layers.0.self_attn.k_proj.weight"
    save_file({**made, key: made[key].float()}, tmp_path / "glm" / "model.safetensors")
    with pytest.raises(UserError, match="several dtypes"):
        to_original(tmp_path / "glm", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_the_original_layout_cannot_say(tmp_path: Path, glm: Path) -> None:
    shutil.copytree(glm, tmp_path / "glm")
    config = json.loads((glm / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 4.0}
    (tmp_path / "glm" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="linear"):
        to_original(tmp_path / "glm", tmp_path / "back")


def test_output_is_not_overwritten_by_chance(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "o")
    with pytest.raises(UserError, match="no GLM checkpoint"):
        to_original(folder, tmp_path / "back")
    with pytest.raises(UserError, match="original layout"):
        to_glm(tmp_path, tmp_path / "glm")
    with pytest.raises(UserError, match="itself"):
        to_glm(folder, folder, overwrite=True)
    to_glm(folder, tmp_path / "glm")
    with pytest.raises(UserError, match="overwrite=true"):
        to_glm(folder, tmp_path / "glm")
    to_glm(folder, tmp_path / "glm", overwrite=True)
    (tmp_path / "glm" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"notes\.txt"):
        to_glm(folder, tmp_path / "glm", overwrite=True)


MEASURE = """
import sys
from pathlib import Path
from longalign.model.chatglm import to_glm, to_original
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
root = Path(sys.argv[1])
before = peak()
for kind in ("bin", "safetensors"):
    to_glm(root / kind, root / f"{kind}-glm")
    to_original(root / f"{kind}-glm", root / f"{kind}-back")
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_stays_near_the_largest_shard(tmp_path: Path) -> None:
    """Three shards of about 70 MB, both ways; a file mapped into memory counts as far as it was touched."""
    shape = {"hidden_size": 1024, "ffn_hidden_size": 3072, "num_layers": 4, "kv_channels": 256}
    for kind in ("bin", "safetensors"):
        folder = checkpoint(tmp_path / kind, **shape, padded_vocab_size=256)
        (folder / "model.safetensors").unlink()
        layout = chatglm._layout(glm_config(json.loads((folder / "config.json").read_text())))
        tensors = {name: torch.ones(shards.stacked(parts.values())) for name, parts in layout.items()}
        write(folder, tensors, kind, 3)
    largest = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert largest > 60e6
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    peaks = [int(line) for line in done.stdout.split()]
    shutil.rmtree(tmp_path)
    assert max(peaks) < 1.3 * largest, [peak / largest for peak in peaks]


# -- tokenizer ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(glm: Path) -> Any:
    return AutoTokenizer.from_pretrained(glm)


@pytest.mark.parametrize("case", IDS["cases"], ids=lambda case: case["name"])
def test_golden_ids(tokenizer: Any, case: dict[str, Any]) -> None:
    for made in (tokenizer, chatglm_tokenizer(TOKENIZER)):
        assert made(case["text"])["input_ids"] == case["hf_ids"]
        assert made.encode(case["text"], add_special_tokens=False) == case["hf_ids"][2:]
        assert made.decode(case["hf_ids"]) == case["hf_decoded"]


def test_special_tokens(tokenizer: Any) -> None:
    assert len(tokenizer) == IDS["n_words"]
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL} == IDS["special_ids"]
    assert tokenizer.decode(list(IDS["special_ids"].values())) == "".join(SPECIAL)
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id) == (2, 0, 0)
    assert tokenizer.bos_token is None
    assert tokenizer.decode([2001, 2003, *tokenizer.encode("a b", add_special_tokens=False), 2, 2006], True) == "a b"


def test_lookalikes_stay_text(tokenizer: Any) -> None:
    """But for the pieces `sop` and `eop`, to which the original gives the special ids."""
    for made in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        for token in [*SPECIAL, "</s>", "<s>", "<unk>", "<0x0A>", "<piece:sop>"]:
            text = f"{token} {token}"
            ids = made.encode(text, add_special_tokens=False)
            allowed = {2003, 2004} if "op" in token else set()
            assert not set(ids) & ({0, 1, 2, 13, *range(2000, 2009)} - allowed), token
            assert made.decode(ids) == text
    assert tokenizer.decode([273, 270]) == "sopeop"  # the pieces' own ids, which no text has


def test_ids_are_sentencepiece_s(tokenizer: Any) -> None:
    """Random text, full of merges, spaces, bytes, look-alikes and characters outside the vocabulary."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    shadowed = {sp.piece_to_id(t): i for t, i in IDS["special_ids"].items() if sp.piece_to_id(t) != sp.unk_id()}
    pieces = [sp.id_to_piece(i).replace("▁", " ") for i in range(len(sp))]
    rng = random.Random(0)

    def some() -> str:
        kind = rng.randrange(6)
        if kind < 3:
            return [rng.choice(pieces), rng.choice(SPECIAL), rng.choice("aeno01 ▁\n") * rng.randint(1, 9)][kind]
        code = rng.randrange([0x80, 0x3000, 0x110000][kind - 3])
        return chr(code) if not 0xD800 <= code < 0xE000 else "\0"

    for _ in range(5000):
        text = "".join(some() for _ in range(rng.randint(0, 40)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == [shadowed.get(i, i) for i in sp.encode(text)], repr(text)
        assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_other_sentencepiece_models_are_refused(tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(TOKENIZER.read_bytes())
    proto.trainer_spec.model_type = 1
    (tmp_path / "unigram.model").write_bytes(proto.SerializeToString())
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(UserError, match="BPE"):
        chatglm_tokenizer(tmp_path / "unigram.model")
    with pytest.raises(UserError, match="no sentencepiece model"):
        chatglm_tokenizer(tmp_path / "text.model")
