"""Prompts are files that can be replaced; replies are understood in any usual shape, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from longalign.data.self_instruct.prompts import fill, load_prompts, parse_questions, refuses
from longalign.errors import UserError

FIVE = ["What is a?", "Why **2.5**", "Who: b or c?", "How (many)?", "When?"]


def test_shipped_prompts() -> None:
    prompts = load_prompts(None)
    kinds = ("general", "summary", "reasoning", "extraction", "answer")
    assert set(prompts) == {f"{kind}.{language}" for kind in kinds for language in ("en", "zh")}
    assert len(set(prompts.values())) == 10
    for name, text in prompts.items():
        assert text.count("{document}") == 1
        assert text.count("{question}") == (name[:6] == "answer")
        assert ("中文" in text) == name.endswith("zh")


def test_own_prompts_replace_shipped_ones(tmp_path: Path) -> None:
    (tmp_path / "summary.en.txt").write_text("Five things on {document}, please.")
    prompts = load_prompts(str(tmp_path))
    assert prompts["summary.en"] == "Five things on {document}, please."
    assert {name for name, text in load_prompts(None).items() if prompts[name] != text} == {"summary.en"}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("sumary.en.txt", "{document}", r"sumary.en.txt is not used.*summary.en"),
        ("summary.en.txt", "no place", r"summary.en.txt must hold \{document\} once"),
        ("summary.en.txt", "{document} {document}", r"must hold \{document\} once"),
        ("answer.zh.txt", "{document}", r"answer.zh.txt must hold \{question\} once"),
        ("readme.md", "x", r"no .txt file there"),
    ],
)
def test_prompts_that_cannot_work(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        load_prompts(str(tmp_path))


def test_braces_of_documents_are_left_alone() -> None:
    said = fill("{document} | {question} {x}", document="{question} {0} \\1 {", question="{document}?")
    assert said == [{"role": "user", "content": "{question} {0} \\1 { | {document}? {x}"}]


@pytest.mark.parametrize(
    "line",
    [
        "{n}: {q}",
        "{n}. {q}",
        "{n}) {q}",
        "**{n}:** {q}",
        "Question {n}: {q}",
        "问题{n}：{q}",
        "{n}、{q}",
        "- {n}: **{q}**",
        "**{n}. {q}**",
    ],
)
@pytest.mark.parametrize("between", ["\n", "\n\n"])
@pytest.mark.parametrize("preamble", ["", "Here are five questions:\n\n"])
def test_questions_in_any_usual_shape(line: str, between: str, preamble: str) -> None:
    assert parse_questions(preamble + between.join(line.format(n=n, q=q) for n, q in enumerate(FIVE, 1))) == FIVE


def test_questions_of_several_lines() -> None:
    reply = "1: What is\n   a?\n" + "\n".join(f"{n}: {q}" for n, q in enumerate(FIVE[1:], 2))
    assert parse_questions(reply) == FIVE


@pytest.mark.parametrize("numbers", [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [2, 1, 3, 4, 5], [1, 1, 2, 3, 4, 5], []])
def test_other_than_five_in_order(numbers: list[int]) -> None:
    assert parse_questions("\n".join(f"{n}: what?" for n in numbers)) is None


@pytest.mark.parametrize(
    "reply", ["What is a?\nWhy?\nWho?\nHow?\nWhen?", "", "1:\n2: a\n3: b\n4: c\n5: d", "1 2 3 4 5"]
)
def test_no_questions(reply: str) -> None:
    assert parse_questions(reply) is None


@pytest.mark.parametrize(
    "reply",
    [
        "I'm sorry, but I cannot help with that.",
        "  Sorry, no.",
        "I can’t assist with this.",
        "Unfortunately, I am unable to read it.",
        "As an AI language model, I have no view.",
        "I apologize, but this is copyrighted.",
        "很抱歉，我无法回答。",
        "对不起，不行。",
        "我无法提供。",
        "作为一个人工智能，我没有看法。",
    ],
)
def test_refusals(reply: str) -> None:
    assert refuses(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "The author is sorry.",
        "Sorrow is its theme.",
        "It cannot be said.",
        "I canvassed them.",
        "As an aim, peace.",
        "他说抱歉。",
    ],
)
def test_answers(reply: str) -> None:
    assert not refuses(reply)
