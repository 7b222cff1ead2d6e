"""The invented facts of source=long_tasks: sentences to hide in a document, a question about them and its answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from longalign.data.synthetic import ADJECTIVES, MATERIALS, NOUNS, OBJECTS, THINGS, Split, split_of

WORDS = ("password", "nickname", "motto", "signal", "symbol", "secret", "favourite thing", "hiding place")
NUMBERS = ("access code", "ticket number", "serial number", "secret number", "lucky number", "phone number")
FORMS = ("The {about} is {value}.", "{value} is the {about}.", "Note that the {about} is {value}.")
OTHERS = 4  # facts beside the one asked for, at least
MANY = 56  # at most, where few and many take turns: the owners of all kinds differ, and the test split has 271
TIMES = (2, 5)  # that a fact or an event is stated

Hidden = list[str]  # sentences in the order in which they stand


class Asked(NamedTuple):
    question: str
    answer: str
    short: str  # the bare answer
    alone: str = "Reply with the answer alone."  # how it is asked for


class Task(NamedTuple):
    """Sentences to hide, in order, and what to ask about them: n questions, or as many as they allow."""

    hidden: Hidden
    asked: list[Asked]


class Fact(NamedTuple):
    owner: str
    about: str  # "motto of the brave weaver"
    value: str

    def __str__(self) -> str:
        return f"The {self.about} is {self.value}."


def owners(split: Split, rng: random.Random) -> Iterator[str]:
    """Without end, none twice."""
    seen = set[str]()
    while True:
        owner = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
        if owner not in seen and split_of(owner) == split:
            seen.add(owner)
            yield owner


def long_names(names: Iterator[str], rng: random.Random) -> Iterator[str]:
    """Of three words; none is a key of task=retrieval, whose second words are materials."""
    for name in names:
        adjective, noun = name.split()
        yield f"{adjective} {rng.choice(THINGS)} {noun}"


def value_of(attribute: str, rng: random.Random) -> str:
    if attribute in NUMBERS:
        digits = rng.randint(3, 8)
        return str(rng.randrange(10 ** (digits - 1), 10**digits))
    return f"{rng.choice(MATERIALS)} {rng.choice(OBJECTS)}"


def few_or_many(rng: random.Random) -> int:
    """OTHERS to MANY, every doubling as often."""
    return round(OTHERS * (MANY / OTHERS) ** rng.random())


def facts(n: int, names: Iterator[str], rng: random.Random, mixed: bool = True) -> list[Fact]:
    """All about the same attribute, or some about mixed ones; distinct values."""
    same = [[rng.choice(WORDS)], [rng.choice(NUMBERS)]]
    attributes = rng.choice([*same, [*WORDS, *NUMBERS]] if mixed else same)
    found: dict[str, Fact] = {}
    while len(found) < n:
        owner, attribute = next(names), rng.choice(attributes)
        fact = Fact(owner, f"{attribute} of the {owner}", value_of(attribute, rng))
        found.setdefault(fact.value, fact)
    return list(found.values())


def said(fact: Fact, rng: random.Random) -> str:
    form = rng.choice(FORMS)
    value = fact.value[0].upper() + fact.value[1:] if form.startswith("{value}") else fact.value
    return form.format(about=fact.about, value=value)


def listed(words: list[str]) -> str:
    return ", ".join(words[:-1]) + f" and {words[-1]}" if len(words) > 1 else words[0]


def one_fact(names: Iterator[str], rng: random.Random, n: int) -> Task:
    found = facts(1 + few_or_many(rng), names, rng)
    hidden = [said(fact, rng) for fact in found]
    rng.shuffle(hidden)
    asked = ("What is the {}?", "Tell me the {}.", "According to the text, what is the {}?")
    questions = [Asked(rng.choice(asked).format(fact.about), str(fact), fact.value) for fact in found[:n]]
    return Task(hidden, questions)


def drawn(items: list[Any], sizes: list[int], rng: random.Random) -> Iterator[list[Any]]:
    """So many items for every size; none again while others are left: an earlier answer would tell it."""
    left: list[Any] = []
    for size in sizes:
        if len(left) < size:
            left = rng.sample(items, len(items))
        yield left[:size]
        left = left[size:]


def several_facts(names: Iterator[str], rng: random.Random, n: int) -> Task:
    found = facts(4 + few_or_many(rng), names, rng)
    hidden = [said(fact, rng) for fact in found]
    rng.shuffle(hidden)
    questions = []
    for wanted in drawn(found, [rng.randint(2, 4) for _ in range(n)], rng):
        question = f"What are {listed([f'the {fact.about}' for fact in wanted])}?"
        questions.append(Asked(question, " ".join(map(str, wanted)), ", ".join(fact.value for fact in wanted)))
    return Task(hidden, questions)


def values_of(attribute: str, n: int, rng: random.Random) -> list[str]:
    """Distinct ones."""
    found: dict[str, None] = {}
    while len(found) < n:
        found[value_of(attribute, rng)] = None
    return list(found)


def all_values(names: Iterator[str], rng: random.Random, n: int) -> Task:
    attribute, people = rng.choice([*WORDS, *NUMBERS]), [next(names) for _ in range(1 + OTHERS)]
    told = [(who, value) for who in people for value in values_of(attribute, rng.randint(*TIMES), rng)]
    rng.shuffle(told)
    questions = []
    for wanted in people[:n]:
        values = [value for who, value in told if who == wanted]
        question = f"What are all the {attribute}s of the {wanted}, in the order of the text?"
        answer = f"The {attribute}s of the {wanted} are {listed(values)}."
        questions.append(Asked(question, answer, ", ".join(values)))
    return Task([one_of(attribute, *pair) for pair in told], questions)


def one_of(attribute: str, who: str, value: str) -> str:
    return f"One of the {attribute}s of the {who} is {value}."


def one_number(names: Iterator[str], rng: random.Random, n: int) -> Task:
    attribute, who = rng.choice(NUMBERS), long_names(names, rng)
    told = [(next(who), value) for value in values_of(attribute, 1 + few_or_many(rng), rng)]
    questions = []
    for wanted, value in told[:n]:
        question, answer = f"What is the {attribute} of the {wanted}?", f"The {attribute} of the {wanted} is {value}."
        questions.append(Asked(question, answer, value, "Reply with the number alone."))
    rng.shuffle(told)
    return Task([one_of(attribute, *pair) for pair in told], questions)


def several_numbers(names: Iterator[str], rng: random.Random, n: int) -> Task:
    """Of several owners in the order asked, or all of one, in the order of the text."""
    attribute, who = rng.choice(NUMBERS), long_names(names, rng)
    of_one = [next(who) if rng.random() < 0.5 else None for _ in range(n)]  # who has several; None: of several owners
    others = [next(who) for _ in range(max(TIMES[1] + OTHERS, few_or_many(rng)))]
    people = [owner for owner in of_one if owner for _ in range(rng.randint(*TIMES))] + others
    told = list(zip(people, values_of(attribute, len(people), rng), strict=True))
    rng.shuffle(told)
    number_of = dict(told)
    several = drawn(others, [rng.randint(*TIMES) for one in of_one if not one], rng)
    questions = []
    for one in of_one:
        if one:
            question, order = f"Which are all the {attribute}s of the {one}?", ""
            values = [value for owner, value in told if owner == one]
        else:
            wanted, order = next(several), "in that order, "
            question = f"Which are the {attribute}s of {', '.join(f'the {owner}' for owner in wanted)}?"
            values = [number_of[owner] for owner in wanted]
        alone = f"Reply with the numbers alone, {order}separated by commas."
        questions.append(Asked(question, f"The {attribute}s are {listed(values)}.", ", ".join(values), alone))
    return Task([one_of(attribute, *pair) for pair in told], questions)


def first_or_last(names: Iterator[str], rng: random.Random, n: int) -> Task:
    wanted, *others = facts(1 + OTHERS, names, rng)
    values = values_of(wanted.about.partition(" of the ")[0], rng.randint(*TIMES), rng)
    hidden = [str(wanted._replace(value=value)) for value in values]
    for fact in others:
        hidden.insert(rng.randint(0, len(hidden)), said(fact, rng))
    questions = []
    for which in rng.sample(["first", "last"], min(n, 2)):
        value = values[0 if which == "first" else -1]
        question = f"The text states the {wanted.about} more than once. What is it where it is stated {which}?"
        questions.append(Asked(question, f"Where it is stated {which}, the {wanted.about} is {value}.", value))
    return Task(hidden, questions)


def count_events(names: Iterator[str], rng: random.Random, n: int) -> Task:
    often = {next(names): rng.randint(*TIMES) for _ in range(3)}
    hidden = [f"The {who} signed the book again." for who, times in often.items() for _ in range(times)]
    rng.shuffle(hidden)
    questions = []
    for who, times in list(often.items())[:n]:
        question = f"How many times does the text say that the {who} signed the book?"
        questions.append(Asked(question, f"The text says it {times} times.", str(times)))
    return Task(hidden, questions)


def two_hops(names: Iterator[str], rng: random.Random, n: int) -> Task:
    found = facts(1 + OTHERS, names, rng, mixed=False)  # or a rare attribute would tell the fact without its owner
    friends = [next(names) for _ in found]
    link = rng.choice(["neighbour", "cousin", "employer", "landlord"])
    hidden = [said(fact, rng) for fact in found]
    hidden += [f"The {link} of the {friend} is the {f.owner}." for friend, f in zip(friends, found, strict=True)]
    rng.shuffle(hidden)
    attribute = found[0].about.partition(" of the ")[0]
    questions = []
    for friend, fact in zip(friends[:n], found, strict=False):
        question = f"What is the {attribute} of the {link} of the {friend}?"
        answer = f"The {link} of the {friend} is the {fact.owner}, and the {fact.about} is {fact.value}."
        questions.append(Asked(question, answer, fact.value))
    return Task(hidden, questions)


HIDING: dict[str, Callable[[Iterator[str], random.Random, int], Task]] = {
    "fact": one_fact,
    "facts": several_facts,
    "values": all_values,
    "number": one_number,
    "numbers": several_numbers,
    "first_last": first_or_last,
    "counting": count_events,
    "multi_hop": two_hops,
}
