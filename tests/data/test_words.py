"""Cut into words or whole: the same ids, or it is not done."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer

from longalign.data.words import word_by_word
from longalign.model.spm import chatglm_tokenizer
from tests.conftest import TINY
from tests.model.test_spm import folder_of, load, texts

GOLDEN = Path(__file__).parent.parent / "golden"


def backend(kind: str, folder: Path) -> Tokenizer:
    if kind == "chatglm":
        return chatglm_tokenizer(GOLDEN / "chatglm_tokenizer" / "tokenizer.model").backend_tokenizer
    return load(folder_of(folder, legacy=kind == "legacy")).backend_tokenizer


@pytest.mark.parametrize("kind", ["legacy", "later", "chatglm"])
def test_the_ids_are_those_of_the_whole_text(kind: str, tmp_path: Path) -> None:
    whole = backend(kind, tmp_path / kind)
    cut = word_by_word(whole)
    assert cut.to_str() != whole.to_str(), "or there is nothing to compare"
    sp = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "tokenize" / "llama_tokenizer.model"))
    rng = random.Random(0)
    marks = [" ", "  ", "▁", " ▁", "\n ", "a", "river", "你好", "\u200b", "12", "<0x0A>", "</s>", "🙂"]
    odd = ("".join(rng.choices(marks, k=rng.randint(0, 40))) for _ in range(500))
    for text in (*texts(sp), *odd):
        for literal in (False, True):
            whole.encode_special_tokens = cut.encode_special_tokens = literal
            assert whole.encode(text).ids == cut.encode(text).ids, repr(text)


def changed(state: dict[str, Any], **model: Any) -> Tokenizer:
    return Tokenizer.from_str(json.dumps({**state, "model": {**state["model"], **model}}))


def test_left_alone_where_ids_could_change(tmp_path: Path) -> None:
    state = json.loads(backend("later", tmp_path / "later").to_str())
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    assert "a▁" not in vocab
    assert [*"a▁"] not in merges
    over = changed(state, vocab={**vocab, "a▁": len(vocab) + 9}, merges=[["a", "▁"], *merges])
    text = "a a a"
    assert word_by_word(over).encode(text).ids == over.encode(text).ids != changed(state).encode(text).ids
    fusing = changed(state, byte_fallback=False, fuse_unk=True)
    assert word_by_word(fusing).to_str() == fusing.to_str()
    tiny = Tokenizer.from_file(f"{TINY}/tokenizer.json")
    assert word_by_word(tiny).to_str() == tiny.to_str(), "byte-level tokenizers cut text themselves"
