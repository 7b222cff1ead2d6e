"""Cutting loses no turn; languages are told apart where the detector is sure."""

from __future__ import annotations

import random

import pytest

from longalign.data.messages import BadSample
from longalign.data.sources.sharegpt import Languages, split
from longalign.errors import UserError

SYSTEM = {"role": "system", "content": "be kind"}


def words(messages: list[dict[str, str]]) -> int:
    return sum(len(m["content"].split()) for m in messages)


@pytest.mark.parametrize("seed", range(200))
def test_parts_put_together_are_the_conversation(seed: int) -> None:
    rng = random.Random(seed)
    talk = [
        {"role": role, "content": f"{i}{role} " + "w " * rng.randrange(12)}
        for i in range(rng.randint(1, 15))
        for role in ("user", "assistant")
    ]
    system = [SYSTEM] if rng.random() < 0.5 else []
    limit = rng.randint(3, 60)
    parts = split([*system, *talk], limit, words)
    bare = [part[len(system) :] for part in parts]
    assert [m for part in bare for m in part] == talk
    for part, messages in zip(parts, bare, strict=True):
        assert part[: len(system)] == system
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert words(part) <= limit or len(messages) == 2, "only a round longer than the limit by itself goes beyond"
    for part, after in zip(parts, bare[1:], strict=False):
        assert words([*part, *after[:2]]) > limit, "no part could have held the next round"


def test_what_fits_stays_whole() -> None:
    talk = [SYSTEM, {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    assert split(talk, 5, words) == [talk]
    assert split(talk, 1, words) == [talk]


ENGLISH = "Could you please help me to write a short letter to my landlord about the broken heating?"
FRENCH = "Pourrais-tu m'aider à écrire une courte lettre à mon propriétaire au sujet du chauffage ?"
CHINESE = "请帮我给房东写一封关于暖气坏了的简短的信，谢谢你的帮助。"
TRADITIONAL = "請幫我給房東寫一封關於暖氣壞了的簡短的信，謝謝你的幫助。"
JAPANESE = "暖房が壊れたことについて、大家さんに短い手紙を書くのを手伝ってください。"


@pytest.mark.parametrize(
    ("wanted", "text", "kept"),
    [
        (["en"], ENGLISH, True),
        (["en"], FRENCH, False),
        (["fr", "en"], FRENCH, True),
        (["en"], CHINESE, False),
        (["en", "zh"], CHINESE, True),
        (["zh"], TRADITIONAL, True),
        (["zh"], JAPANESE, False),
        (["zh"], ENGLISH, False),
        (["zh"], "ok", True),
        (["en"], "1 + 1 = 2", True),
        (["en"], "```\n" + FRENCH * 20 + "\n```\n" + ENGLISH, True),
        (["fr"], "```\n" + FRENCH * 20 + "\n", True),
    ],
)
def test_languages(wanted: list[str], text: str, kept: bool) -> None:
    check = Languages(wanted).check
    talk = [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]
    if kept:
        check(talk)
    else:
        with pytest.raises(BadSample, match="language "):
            check(talk)


def test_an_unknown_language_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="unknown language 'english'"):
        Languages(["en", "english"])
