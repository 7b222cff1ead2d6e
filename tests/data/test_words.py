"""Cut into words or whole: the same ids, or it is not done."""

from __future__ import annotations

import copy
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer

from longalign.data import words as words_module
from longalign.data.template import Template
from longalign.data.words import words_of
from longalign.model.spm import chatglm_tokenizer
from tests.conftest import TINY
from tests.model.test_spm import folder_of, load, texts

GOLDEN = Path(__file__).parent.parent / "golden"


def backend(kind: str, folder: Path) -> Tokenizer:
    if kind == "chatglm":
        return chatglm_tokenizer(GOLDEN / "chatglm_tokenizer" / "tokenizer.model").backend_tokenizer
    return load(folder_of(folder, legacy=kind == "legacy")).backend_tokenizer


@pytest.mark.parametrize("part", [1, 3, words_module.PART])
@pytest.mark.parametrize("kind", ["legacy", "later", "chatglm"])
def test_the_ids_are_those_of_the_whole_text(
    kind: str, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words_module, "PART", part)
    whole = backend(kind, tmp_path / kind)
    words = words_of(whole)
    assert words is not None
    words = pickle.loads(pickle.dumps(words))  # as a worker gets it
    sp = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "tokenize" / "llama_tokenizer.model"))
    rng = random.Random(0)
    marks = [" ", "  ", "▁", " ▁", "\n ", "a", "river", "你好", "\u200b", "12", "<0x0A>", "</s>", "🙂"]
    odd = ("".join(rng.choices(marks, k=rng.randint(0, 40))) for _ in range(500))
    starts = ["", "<s>"] if kind == "later" else [""]
    compared = 0
    for text in (start + text for text in (*texts(sp), *odd) for start in starts):
        whole.encode_special_tokens = False
        if words.can(text, 3 * text.startswith("<s>")):
            compared += 1
            assert words(text).tolist() == whole.encode(text, add_special_tokens=False).ids, repr(text)
            assert text.startswith("<s>") or kind != "legacy" or words(text).tolist() == sp.encode(text), repr(text)
    assert compared > 1000
    assert not words.can("a </s>")
    if part > 3:
        assert len(words) > 1000, "words are remembered"


def changed(state: dict[str, Any], **model: Any) -> Tokenizer:
    return Tokenizer.from_str(json.dumps({**state, "model": {**state["model"], **model}}))


def test_not_where_ids_could_change(tmp_path: Path) -> None:
    state = json.loads(backend("later", tmp_path / "later").to_str())
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    assert words_of(changed(state)) is not None
    over = changed(state, vocab={**vocab, "a▁": len(vocab) + 9}, merges=[["a", "▁"], *merges])
    assert over.encode("a a a").ids != changed(state).encode("a a a").ids, "a piece that reaches over a border"
    others = [over, changed(state, byte_fallback=False, fuse_unk=True), changed(state, ignore_merges=True)]
    others += [Tokenizer.from_str(json.dumps({**state, "pre_tokenizer": None}))]
    others += [Tokenizer.from_str(json.dumps({**state, "normalizer": {"type": "NFKC"}}))]
    others += [Tokenizer.from_file(f"{TINY}/tokenizer.json")]
    assert [words_of(other) for other in others] == [None] * len(others)


@pytest.mark.parametrize("kind", ["legacy", "later", "chatglm"])
def test_conversations_are_the_same(kind: str, tmp_path: Path) -> None:
    """Also with special tokens typed by people, at every place, one after the other through the same tokenizer."""
    if kind == "chatglm":
        made = Template("longalign-chatglm", chatglm_tokenizer(GOLDEN / "chatglm_tokenizer" / "tokenizer.model"))
    else:
        made = Template("longalign-llama", load(folder_of(tmp_path / kind, legacy=kind == "legacy")))
    plain = copy.copy(made)
    plain.words = None
    rng = random.Random(0)
    parts = ["<s>", "</s>", " ", "▁", "\n", "the river", " is", "你好", "[INST]", "sop", "12"]
    for _ in range(300):
        texts = ["".join(rng.choices(parts, k=rng.randint(1, 9))) for _ in range(4)]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        (ours,), (theirs,) = made.rows(messages), plain.rows(messages)
        assert (ours.input_ids, ours.labels) == (theirs.input_ids, theirs.labels), messages
