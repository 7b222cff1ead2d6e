"""Prompts of short tasks: the same for a seed on every machine, none twice, none on both sides."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import islice
from typing import get_args

import pytest

from longalign.config import compose_config
from longalign.data import short_words as words
from longalign.data.short_prompts import KINDS, prompts
from longalign.schema import ShortKind


def drawn(seed: int, n: int = 3000, kinds: tuple[str, ...] = tuple(KINDS)) -> list[tuple[str, str]]:
    return list(islice(prompts(list(kinds), seed), n))


def test_every_kind_is_a_setting_and_a_default() -> None:
    assert list(KINDS) == list(get_args(ShortKind)) == compose_config("prepare", ["source=own_answers"]).source.kinds  # type: ignore[union-attr]


def test_kinds_take_turns_and_no_prompt_comes_twice() -> None:
    found = drawn(1)
    assert [kind for kind, _ in found[: 2 * len(KINDS)]] == [*KINDS, *KINDS]
    assert len({prompt for _, prompt in found}) == len(found) == 3000
    assert min(Counter(kind for kind, _ in found).values()) >= 50, "small kinds make room for the others"
    assert not [prompt for _, prompt in found if "{" in prompt or "  " in prompt or "\n" in prompt]


@pytest.mark.parametrize(
    ("kind", "subjects"), [("explain", words.TOPICS), ("code", words.FUNCTIONS), ("facts", words.COUNTRIES)]
)
def test_no_subject_is_on_both_sides(kind: str, subjects: tuple[str, ...]) -> None:
    """Counted in the prompts themselves, all that a seed can give. Longer names first: `the moon`, not `moon`."""
    by_length = sorted(subjects, key=len, reverse=True)
    asked = lambda seed: {next(s for s in by_length if s in prompt) for _, prompt in drawn(seed, 10_000, (kind,))}
    odd, even = asked(1), asked(2)
    assert not odd & even
    assert odd | even == set(subjects)
    assert min(len(odd), len(even)) >= 10
    assert asked(3) == odd, "the parity of a seed decides, and nothing else of it"


def test_no_prompt_is_on_both_sides() -> None:
    odd, even, other = ({prompt for _, prompt in drawn(seed)} for seed in (1, 2, 3))
    assert not odd & even
    assert odd != other


def test_the_same_prompts_in_every_process() -> None:
    code = "from longalign.data.short_prompts import *; from itertools import islice; import zlib"
    code += "; print(zlib.crc32(repr(list(islice(prompts(list(KINDS), 5), 500))).encode()))"
    said = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
