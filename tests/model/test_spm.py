"""Llama's tokenizers from `tokenizer.model` give sentencepiece's ids, legacy or not, also after being saved."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer

from longalign.config import compose_config
from longalign.model.load import load_tokenizer, tokenizer_hash

MODEL = Path(__file__).parent.parent / "golden" / "tokenize" / "llama_tokenizer.model"


def folder_of(folder: Path, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    shutil.copy(MODEL, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **settings}))
    return folder


def load(folder: Path) -> Any:
    return load_tokenizer(compose_config("tokenize", [f"model.tokenizer={folder}"]))


@pytest.fixture(scope="module")
def sp() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL))


@pytest.fixture(scope="module")
def continued() -> Callable[[str], list[int]]:
    """Text within a text, as transformers 4's slow tokenizer without `legacy` encodes it.

    Without a dummy prefix, and behind an `<unk>` typed out, which is then taken off: sentencepiece drops no space there.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(MODEL.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = False
    bare = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    return lambda text: bare.encode("<unk>" + text)[len(bare.encode("<unk>")) :]


def texts(sp: sentencepiece.SentencePieceProcessor) -> Iterator[str]:
    """Random text full of merges, spaces at edges, bytes, look-alikes and characters outside the vocabulary."""
    pieces = [sp.id_to_piece(i).replace("▁", " ") for i in range(3, len(sp))]
    odd = ["<0x0A>", "[INST]", "[/INST]", "<un", "k>", "▁", "\n\n"]
    rng = random.Random(0)
    for _ in range(2000):
        some = []
        for _ in range(rng.randint(1, 40)):
            code = rng.randrange(rng.choice([0x80, 0x3000, 0x110000]))
            character = chr(code) if not 0xD800 <= code < 0xE000 else "\0"
            some.append(rng.choice([rng.choice(pieces), rng.choice(odd), " " * rng.randint(1, 4), character]))
        text = rng.choice(["", " ", "  "]) + "".join(some)
        if not any(token in text for token in ("<s>", "</s>", "<unk>")):
            yield text


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_are_sentencepiece_s(tmp_path: Path, sp: Any, continued: Callable[[str], list[int]], legacy: bool) -> None:
    made = load(folder_of(tmp_path / "a", legacy=legacy))
    made.save_pretrained(tmp_path / "saved")
    saved = load(tmp_path / "saved")
    assert tokenizer_hash(made) == tokenizer_hash(saved)
    count = 0
    for text in texts(sp):
        first = sp.encode(text) if legacy else continued("▁" + text)
        later = sp.encode(text) if legacy else continued(text)
        for tokenizer in (made, saved):
            assert tokenizer(text)["input_ids"] == [1, *first], repr(text)
            assert tokenizer("<s>" + text, add_special_tokens=False)["input_ids"] == [1, *later], repr(text)
            assert tokenizer.decode(first) == text.replace("▁", " ")
        count += 1
    assert count > 1800


def test_the_kinds_differ_where_they_should(tmp_path: Path) -> None:
    legacy, new, untold = (
        load(folder_of(tmp_path / name, **settings))
        for name, settings in (("a", {"legacy": True}), ("b", {"legacy": False}), ("c", {}))
    )
    assert tokenizer_hash(new) == tokenizer_hash(untold), "absent means Llama-2's false"
    assert legacy("<s>a")["input_ids"] != new("<s>a")["input_ids"]
    assert legacy("a b")["input_ids"] == new("a b")["input_ids"]


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("config", [{"model_type": "llama"}, {}, None])
def test_the_class_need_not_be_named(tmp_path: Path, config: dict[str, str] | None, legacy: bool | None) -> None:
    folder, named = tmp_path / "bare", load(folder_of(tmp_path / "named", legacy=bool(legacy)))
    folder.mkdir()
    shutil.copy(MODEL, folder / "tokenizer.model")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if legacy is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    assert tokenizer_hash(load(folder)) == tokenizer_hash(named)
    assert load(folder)(" a")["input_ids"] == named(" a")["input_ids"]


def test_which_kind_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path / "a", legacy=True)
    load(folder)
    load(folder)
    assert capfd.readouterr().err.count("legacy=true") == 1


def test_settings_are_kept(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "pad_token": "<pad>",
        "added_tokens_decoder": {"1200": {"content": "<pad>", "special": True}},
        "additional_special_tokens": ["<|im_end|>"],
        "chat_template": "{{ 1 }}",
        "model_max_length": 4096,
    }
    made = load(folder_of(tmp_path / "a", **settings))
    made.save_pretrained(tmp_path / "saved")
    for tokenizer in (made, load(tmp_path / "saved")):
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 1200)
        assert 1201 in tokenizer.all_special_ids
        assert tokenizer("a<pad><|im_end|>")["input_ids"][-2:] == [1200, 1201]
        assert (tokenizer.chat_template, tokenizer.padding_side) == ("{{ 1 }}", "left")
        assert tokenizer.model_max_length == 4096


@pytest.mark.parametrize(("bos", "eos"), [(None, None), (True, True), (False, False), (None, True), (False, True)])
def test_bos_and_eos_around_a_text(tmp_path: Path, sp: Any, bos: bool | None, eos: bool | None) -> None:
    told = {"add_bos_token": bos, "add_eos_token": eos}
    made = load(folder_of(tmp_path / "a", **{key: value for key, value in told.items() if value is not None}))
    assert made("ab")["input_ids"] == [1] * (bos is not False) + sp.encode("ab") + [2] * bool(eos)


@pytest.mark.parametrize("legacy", [True, False])
def test_tokenizer_json_of_transformers_4(tmp_path: Path, sp: Any, legacy: bool) -> None:
    """It puts a space before every segment. transformers 5 keeps its vocabulary and lets `legacy` decide instead."""
    old = Tokenizer.from_str(AutoTokenizer.from_pretrained(folder_of(tmp_path / "a")).backend_tokenizer.to_str())
    old.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    old.pre_tokenizer = None  # type: ignore[assignment]
    folder = folder_of(tmp_path / "b", legacy=legacy)
    old.save(str(folder / "tokenizer.json"))
    theirs, ours = AutoTokenizer.from_pretrained(folder), load(folder)
    later = lambda tokenizer: tokenizer("<s>ab", add_special_tokens=False)["input_ids"][1:]
    assert old.encode("ab", add_special_tokens=False).ids == sp.encode("ab")
    assert (later(theirs) == sp.encode("ab")) is legacy
    assert later(ours) == later(theirs)
    assert ours(" ab")["input_ids"][1:] == sp.encode(" ab")
    assert theirs(" ab", add_special_tokens=False)["input_ids"] == sp.encode("ab"), "why exact_llama is needed"
    assert tokenizer_hash(ours) == tokenizer_hash(load(folder_of(tmp_path / "c", legacy=legacy)))
