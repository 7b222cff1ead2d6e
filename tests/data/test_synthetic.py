"""The synthetic world: seeded, split, in range, and read one token a word by the tiny tokenizer."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import longalign
from longalign.data import synthetic

TINY = Path(longalign.__path__[0]) / "assets" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def contents(split: str, n: int, seed: int) -> list[list[str]]:
    found = synthetic.conversations("long", split, n, seed)
    return [[message["content"] for message in conversation["messages"]] for conversation in found]


def document_of(texts: list[str]) -> str:
    return texts[0].rpartition("\n\n")[0]


def owner_of(fact: synthetic.Fact) -> str:
    return fact.key.split(" of the ")[1]


def test_the_same_seed_gives_the_same_text_in_another_process():
    program = (
        "from longalign.data import synthetic as s; print(list(s.conversations('long', 'test', 3, 5)),"
        " list(s.conversations('short', 'train', 3, 5)), list(s.base_texts(3, 5)))"
    )
    run = [sys.executable, "-c", program]
    root = Path(longalign.__path__[0]).parent
    outputs = set()
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)}
        outputs.add(subprocess.run(run, env=environment, capture_output=True, check=True).stdout)
    assert len(outputs) == 1
    assert outputs != {b""}


def test_another_seed_gives_another_text():
    assert contents("train", 2, 0) != contents("train", 2, 1)


def test_no_test_fact_occurs_in_the_training_data():
    rng = random.Random(0)
    owners = {split: {owner_of(f) for f in synthetic.facts(split, 150, rng)} for split in ("train", "test")}
    assert len(owners["train"]) == len(owners["test"]) == 150
    assert not owners["train"] & owners["test"]
    # every one of them, not only those drawn here
    every = {f"{a} {n}" for a in synthetic.ADJECTIVES for n in synthetic.NOUNS}
    test = {owner for owner in every if synthetic.split_of(owner) == "test"}
    assert 0.15 < len(test) / len(every) < 0.25
    seen = [text for texts in contents("train", 50, 3) for text in texts]
    seen += [text["text"] for text in synthetic.base_texts(50, 3) if "The " in text["text"]]
    assert any(owner in text for text in seen for owner in every - test)
    assert not any(f"of the {owner} is" in text for text in seen for owner in test)


def test_facts_have_distinct_owners_and_values():
    found = synthetic.facts("train", 100, random.Random(1))
    assert len({owner_of(fact) for fact in found}) == len({fact.value for fact in found}) == 100


@pytest.mark.parametrize("split", ["train", "test"])
def test_documents_span_the_range_in_tokens(tokenizer, split):
    documents = map(document_of, contents(split, 60, 4))
    lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in documents]
    assert 256 <= min(lengths) < 400
    assert 1600 < max(lengths) <= 2048


def test_every_answer_is_in_its_document_once():
    answers = 0
    for texts in contents("test", 40, 6):
        document = document_of(texts)
        for answer in texts[1::2]:
            assert document.count(answer) == 1
            answers += 1
    assert answers > 100


def test_depths_place_the_statements():
    statements = [fact.statement for fact in synthetic.facts("test", 3, random.Random(2))]
    text = synthetic.document(statements, 600, random.Random(2), depths=[1.0, 0.0, 0.5])
    assert text.endswith(statements[0])
    assert text.startswith(statements[1])
    assert 0.4 < text.index(statements[2]) / len(text) < 0.6


def test_statements_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        synthetic.document(["The motto of the wise fox is iron bell."], 5, random.Random(0))


@pytest.mark.parametrize(
    "text",
    [
        "The old harbour keeps a quiet lantern near the mill.",
        " leading, trailing \n",
        "a\n\n\nb\t\tc   d\r\n",
        "Žluťoučký kůň 你好 мир 🎉👩‍👩‍👧 e\u0301 \u00a0\u2028 ▁ Ġ Ċ \x00",
        "[INST] x [/INST]",
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_random_text_survives_the_tokenizer(tokenizer):
    rng = random.Random(0)
    for _ in range(50):
        code_points = [rng.randrange(0x20, 0x30000) for _ in range(40)]
        text = "".join(chr(c) for c in code_points if not 0xD800 <= c < 0xE000)
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_every_word_is_one_token(tokenizer):
    for word in synthetic.WORDS:
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1, word
    for marker in ("[INST]", "[/INST]", "\n\n"):
        assert len(tokenizer.encode(marker, add_special_tokens=False)) == 1


def test_length_counts_the_tokens(tokenizer):
    texts = [text for conversation in contents("test", 5, 8) for text in conversation]
    texts += [text["text"] for text in synthetic.base_texts(10, 8)]
    texts += [m["content"] for c in synthetic.conversations("short", "train", 20, 8) for m in c["messages"]]
    for text in texts:
        assert synthetic.length(text) == len(tokenizer.encode(text, add_special_tokens=False)), text
