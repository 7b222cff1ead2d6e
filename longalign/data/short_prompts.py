"""Prompts of short tasks, built by program: a subject, put into one of several wordings of its kind.

    "explain", "photosynthesis"  ->  "Explain photosynthesis in two sentences."

A subject belongs to the odd seeds or to the even ones, by its hash: prompts of seed 1 (to train on) and of seed 2 (to
test with) share no subject, whatever the wording. The small words that sentences are made of stand on both sides.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from longalign.data import short_words as words

Rng = random.Random
TRIES = 2000  # draws that find no new prompt before a kind counts as used up


# -- subjects ------------------------------------------------------------------------------------------------


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _sentence(rng: Rng) -> str:
    where, when = rng.choice(words.PLACES), rng.choice(words.TIMES)
    return _capital(f"{rng.choice(words.PEOPLE)} {rng.choice(words.DEEDS)} {where} {when}.")


def _passage(rng: Rng) -> str:
    name, (first, second) = rng.choice(words.NAMES), rng.sample(words.DEEDS, 2)
    when, where, other = rng.choice(words.TIMES), rng.choice(words.PLACES), rng.choice(words.PEOPLE)
    return (
        f"{name} had always wanted to {rng.choice(words.GOALS)}. {_capital(when)}, {name} {first} {where}, and {other} "
        f"{second}. It took much longer than planned, but in the end both of them were glad that they had tried."
    )


def _exercise(rng: Rng) -> str:
    name, item, price = rng.choice(words.NAMES), rng.choice(words.ITEMS), rng.randint(2, 12)
    a, b = rng.randint(6, 60), rng.randint(2, 40)
    low, high = sorted((a, b))
    return rng.choice(
        [
            f"What is {a} + {b}?",
            f"What is {high} - {low}?",
            f"What is {price} x {b}?",
            f"{name} has {high} {item} and gives {low} of them away. How many {item} are left?",
            f"{name} has {a} {item} and buys {b} more. How many {item} are there now?",
            f"A box holds {price} {item}. How many {item} are in {b} boxes?",
        ]
    )


def _review(rng: Rng) -> str:
    return f'"The {rng.choice(words.GOODS)} {rng.choice([*words.PRAISE, *words.BLAME])}. {_sentence(rng)}"'


def _message(rng: Rng) -> str:
    (to, sender), where, bring = rng.sample(words.NAMES, 2), rng.choice(words.PLACES), rng.choice(words.ITEMS)
    day, hour = f"{rng.randint(1, 28)} {rng.choice(words.MONTHS)}", f"{rng.randint(8, 20)}:{rng.randint(1, 5)}0"
    return f'"Hello {to}, let us meet {where} on {day} at {hour}. Bring {bring}! {sender}"'


def _words(rng: Rng) -> str:
    return ", ".join(rng.sample(words.WORDS, rng.randint(4, 6)))


def _one_of(subjects: tuple[str, ...]) -> Callable[[Rng], str]:
    return lambda rng: rng.choice(subjects)


# -- kinds ---------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    subject: Callable[[Rng], str]
    wordings: list[str]


def _wordings(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


KINDS: dict[str, Kind] = {
    "rewrite": Kind(
        _sentence,
        _wordings("""
            Rewrite this sentence in a more formal way: {}
            Make this sentence shorter: {}
            Rewrite this sentence in the future tense: {}
            Turn this sentence into a question: {}
            Say this in other words: {}
            Rewrite this sentence so that a child understands it: {}
            Rewrite this sentence in the passive voice: {}
        """),
    ),
    "summarise": Kind(
        _passage,
        _wordings("""
            Summarize this text in one sentence: {}
            What is the main point of this text? {}
            Give this text a title: {}
            {} What happened? Answer in one short sentence.
            Sum this up in at most ten words: {}
        """),
    ),
    "list": Kind(
        _one_of(words.THINGS),
        _wordings("""
            List three {}.
            Name five {}.
            Give me four examples of {}.
            Make a short list of {}.
            Name two {} and say one sentence about each.
            List three {}, separated by commas.
            I need a numbered list of five {}.
        """),
    ),
    "explain": Kind(
        _one_of(words.TOPICS),
        _wordings("""
            Explain {} in one sentence.
            Explain {} to a ten-year-old.
            Explain {} briefly.
            Tell me about {} in two sentences.
            Give a short definition of {}.
            Why does {} matter? Answer in one or two sentences.
            Give one example that has to do with {}, in a sentence.
        """),
    ),
    "arithmetic": Kind(
        _exercise,
        _wordings("""
            {}
            {} Show your work.
            {} Answer with the number alone.
            Solve this: {}
        """),
    ),
    "translate": Kind(
        _sentence,
        _wordings("""
            Translate this sentence to French: {}
            Translate this sentence to Spanish: {}
            Translate to German: {}
            How do you say this in Italian? {}
            Translate to Portuguese: {}
        """),
    ),
    "classify": Kind(
        _review,
        _wordings("""
            Is this review positive or negative? {}
            Classify the sentiment of this review as positive or negative, in one word: {}
            {} Did the customer like it? Answer yes or no.
            {} Which feeling does this express?
        """),
    ),
    "code": Kind(
        _one_of(words.FUNCTIONS),
        _wordings("""
            Write a Python function that {}.
            Write a short JavaScript function that {}.
            Show me a one-line Python function that {}.
            Write a Python function that {}, with a docstring.
            Give me a code snippet that {}.
        """),
    ),
    "compare": Kind(
        _one_of(words.PAIRS),
        _wordings("""
            What is the difference between {}?
            Compare {} in two sentences.
            What do {} have in common? Answer briefly.
            Name one difference between {}.
        """),
    ),
    "extract": Kind(
        _message,
        _wordings("""
            When is the meeting? {}
            Extract the date, the time and the place: {}
            Who wrote this message, and to whom? {}
            {} Write the date and the time on two lines.
        """),
    ),
    "write": Kind(
        lambda rng: f"{rng.choice(words.RECIPIENTS)} {rng.choice(words.OCCASIONS)}",
        _wordings("""
            Write a short email to {}.
            Write a message of one sentence to {}.
            Write a friendly note to {}, in two sentences.
            Draft a brief text message to {}.
        """),
    ),
    "story": Kind(
        lambda rng: f"{rng.choice(words.HEROES)} {rng.choice(words.QUESTS)}",
        _wordings("""
            Write a story of three sentences about {}.
            Write a two-line poem about {}.
            Give me a title for a story about {}.
            Write the first sentence of a story about {}.
        """),
    ),
    "sort": Kind(
        _words,
        _wordings("""
            Sort these words alphabetically: {}
            Write these words in reverse order: {}
            Which of these words is the longest? {}
            How many words are in this list? {}
            Write these words in capital letters: {}
        """),
    ),
    "advice": Kind(
        _one_of(words.GOALS),
        _wordings("""
            How can I {}? Give one tip.
            I want to {}. What should I do first?
            Give me three short tips to {}.
            Is it hard to {}? Answer in one sentence.
            Why should I {}? Answer briefly.
        """),
    ),
    "facts": Kind(
        _one_of(words.COUNTRIES),
        _wordings("""
            What is the capital of {}?
            On which continent is {}?
            Which language is spoken in {}?
            Name a famous dish from {}.
            Tell me one fact about {}.
            Name a city in {} that is not the capital.
        """),
    ),
}


def prompts(kinds: list[str], seed: int) -> Iterator[tuple[str, str]]:
    """(kind, prompt), none twice. Kinds take turns; one whose prompts are used up leaves the others their turns."""
    rng, seen, left = random.Random(f"short prompts {seed}"), set[str](), list(kinds)
    while left:
        for kind in list(left):
            prompt = next((p for p in _draws(kind, seed, rng) if p not in seen), None)
            if prompt is None:
                left.remove(kind)
                continue
            seen.add(prompt)
            yield kind, prompt


def side_of(subject: str) -> int:
    """0: of the even seeds; 1: of the odd ones. The same on every machine."""
    return zlib.crc32(subject.encode()) % 2


def _draws(kind: str, seed: int, rng: Rng) -> Iterator[str]:
    """TRIES prompts of the seed's own subjects, or fewer."""
    subject_of, wordings = KINDS[kind]
    for _ in range(TRIES):
        subject, wording = subject_of(rng), rng.choice(wordings)
        if side_of(subject) == seed % 2:
            yield wording.format(subject)
