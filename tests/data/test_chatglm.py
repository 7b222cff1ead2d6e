"""ChatGLM's templates on its own tokenizer, and what other programs make of their exported Jinja forms."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer

from longalign.data import jinja
from longalign.data.messages import BadSample, Messages
from longalign.data.template import IGNORE, Template
from longalign.errors import UserError
from longalign.evaluate.generate import Generator, Stream
from longalign.model.spm import chatglm_tokenizer
from tests.conftest import TINY

GOLDEN = Path(__file__).parent.parent / "golden" / "chatglm_tokenizer"
ID = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))["special_ids"]
START = [ID["[gMASK]"], ID["sop"]]
SYSTEM, USER, ASSISTANT, OBSERVATION = (ID[f"<|{role}|>"] for role in ("system", "user", "assistant", "observation"))
EOS = 2


@pytest.fixture(scope="module")
def sp() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "tokenizer.model"))


@pytest.fixture
def tokenizer() -> Any:
    return chatglm_tokenizer(GOLDEN / "tokenizer.model")


def chat(*contents: str, system: str | None = None) -> Messages:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


# -- chatglm3: what the model was trained with, per its tokenizer's build_chat_input ----------------------


def original_chat(sp: Any, messages: Messages) -> list[int]:
    """A role's id, the metadata's line and the content, each encoded by sentencepiece on its own; then <|assistant|>."""
    ids = list(START)
    for message in messages:
        ids += [ID[f"<|{message['role']}|>"], *sp.encode("\n"), *sp.encode(message["content"])]
    return [*ids, ASSISTANT]


CONVERSATIONS = [
    chat("你好"),
    chat("What is <|user|>? [gMASK] </s>"),
    chat("  two spaces\n\n", "a ", " b", "\n c", ""),
    chat("one", "", "two", system="You are a helper."),
    chat("one", "two", "three", system=""),
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_chatglm3_asks_as_the_original(sp: Any, tokenizer: Any, messages: Messages) -> None:
    asked = messages if messages[-1]["role"] == "user" else messages[:-1]
    assert Template("chatglm3", tokenizer).prompt_ids(asked) == original_chat(sp, asked)


def test_chatglm3_row_spelled_out(sp: Any, tokenizer: Any) -> None:
    line, template = sp.encode("\n"), Template("chatglm3", tokenizer)
    (row,) = template.rows(chat("ask", "<|user|> says", "more", "yes", system="be kind"))
    head = [*START, SYSTEM, *line, *sp.encode("be kind"), USER, *line, *sp.encode("ask"), ASSISTANT]
    first, second = [*line, *sp.encode("<|user|> says")], [*line, *sp.encode("yes")]
    between = [USER, *line, *sp.encode("more"), ASSISTANT]
    assert row.input_ids == [*head, *first, *between, *second, EOS]
    skip = lambda ids: [IGNORE] * len(ids)
    assert row.labels == [*skip(head), *first, EOS, *skip(between[1:]), *second, EOS]
    assert template.stop_ids == sorted([EOS, USER, OBSERVATION])


def test_chatglm3_empty_answers_are_no_targets(tokenizer: Any) -> None:
    template = Template("chatglm3", tokenizer)
    with pytest.raises(BadSample, match="no target"):
        template.rows(chat("a", ""))
    (row,) = template.rows(chat("a", "", "b", "c"))
    asked = template.prompt_ids(chat("a", "", "b"))
    assert row.input_ids[: len(asked)] == asked
    assert set(row.labels[: len(asked)]) == {IGNORE}


def test_chatglm3_answers_come_without_their_line(sp: Any, tokenizer: Any) -> None:
    generator = object.__new__(Generator)  # without a model
    generator.template, generator.tokenizer = Template("chatglm3", tokenizer), tokenizer
    ids, written = [*sp.encode("\n"), *sp.encode("你好 there\n x")], []
    assert generator.decode(ids) == "你好 there\n x"
    stream = Stream(generator.decode, generator.template.stop_ids, written.append)
    stream.put(torch.tensor([0]))
    for token in [*ids, USER]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(written) == "你好 there\n x"


def test_chatglm3_needs_its_tokenizer() -> None:
    with pytest.raises(UserError, match="role tokens"):
        Template("chatglm3", AutoTokenizer.from_pretrained(TINY))


# -- exported: rendered and tokenised in other programs ---------------------------------------------------


def exported(name: str, folder: Path, tokenizer: Any) -> Any:
    """As train/export.py writes it, loaded by plain transformers."""
    tokenizer.chat_template = jinja.EXPORTED[name]
    tokenizer.split_special_tokens = False
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


WORDS = [
    "what",
    "sophist",
    "nonsop",
    "eop_",
    "new\nline",
    "你好",
    "\n\n",
    "  two",
    "é",
    "[Round 2]",
    "答：",
    "12 34",
    "\U0001f600",
]


@pytest.mark.parametrize("name", ["longalign-chatglm", "chatglm3"])
def test_exported_jinja_gives_the_ids_of_training(tmp_path: Path, name: str) -> None:
    exact = Template(name, chatglm_tokenizer(GOLDEN / "tokenizer.model"))
    theirs = exported(name, tmp_path, chatglm_tokenizer(GOLDEN / "tokenizer.model"))
    ids = lambda messages, ask: theirs.apply_chat_template(messages, add_generation_prompt=ask)["input_ids"]
    rng = random.Random(0)
    for number in range(300):
        text = lambda: " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))
        answers = [rng.choice([text(), text(), " " + text(), ""]) for _ in range(rng.randint(1, 4))]
        contents = [content for answer in answers for content in (rng.choice(["", " "]) + text(), answer)]
        system = text() if number % 3 == 0 else None
        messages = chat(*contents, "x", system=system)
        for place, message in enumerate(messages):
            if message["role"] == "user":
                asked = messages[: place + 1]
                assert ids(asked, True) == exact.prompt_ids(asked), asked
        answered = chat(*contents[:-1], "yes", system=system)
        (row,) = exact.rows(answered)
        assert ids(answered, False) == row.input_ids


def test_where_a_joined_text_differs(tmp_path: Path) -> None:
    """The two exceptions that longalign/data/jinja.py names."""
    name = "longalign-chatglm"
    exact = Template(name, chatglm_tokenizer(GOLDEN / "tokenizer.model"))
    theirs = exported(name, tmp_path, chatglm_tokenizer(GOLDEN / "tokenizer.model"))
    ids = lambda messages: theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    typed = chat("<|user|>")
    assert USER in ids(typed)
    assert USER not in exact.prompt_ids(typed)
    spaced = chat("a", "b ", "c")
    assert ids(spaced) != exact.prompt_ids(spaced)
    assert theirs.decode(ids(spaced)) == theirs.decode(exact.prompt_ids(spaced)), "the same text all the same"
