"""The invented facts of source=long_tasks: sentences to hide in a document, a question about them and its answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from longalign.data.synthetic import ADJECTIVES, MATERIALS, NOUNS, OBJECTS, THINGS, Split, split_of

WORDS = ("password", "nickname", "motto", "signal", "symbol", "secret", "favourite thing", "hiding place")
NUMBERS = ("access code", "ticket number", "serial number", "secret number", "lucky number", "phone number")
FORMS = ("The {about} is {value}.", "{value} is the {about}.", "Note that the {about} is {value}.")
OTHERS = 4  # facts in a document that no question asks for, at least
MANY = 56  # at most, where few and many take turns: the owners of all kinds differ, and the test split has 271
TIMES = (2, 5)  # that a fact or an event is stated

Hidden = list[str]  # sentences in the order in which they stand


class Task(NamedTuple):
    """Sentences to hide, in order, and what to ask about them."""

    hidden: Hidden
    question: str
    answer: str
    short: str  # the bare answer
    alone: str = "Reply with the answer alone."  # how it is asked for


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


def one_fact(names: Iterator[str], rng: random.Random) -> Task:
    wanted, *others = facts(1 + few_or_many(rng), names, rng)
    hidden = [said(fact, rng) for fact in (wanted, *others)]
    rng.shuffle(hidden)
    asked = rng.choice(["What is the {}?", "Tell me the {}.", "According to the text, what is the {}?"])
    return Task(hidden, asked.format(wanted.about), str(wanted), wanted.value)


def several_facts(names: Iterator[str], rng: random.Random) -> Task:
    n, others = rng.randint(2, 4), few_or_many(rng)
    found = facts(n + others, names, rng)
    wanted = found[:n]
    hidden = [said(fact, rng) for fact in found]
    rng.shuffle(hidden)
    asked = listed([f"the {fact.about}" for fact in wanted])
    answer = " ".join(str(fact) for fact in wanted)
    return Task(hidden, f"What are {asked}?", answer, ", ".join(fact.value for fact in wanted))


def values_of(attribute: str, n: int, rng: random.Random) -> list[str]:
    """Distinct ones."""
    found: dict[str, None] = {}
    while len(found) < n:
        found[value_of(attribute, rng)] = None
    return list(found)


def all_values(names: Iterator[str], rng: random.Random) -> Task:
    attribute, wanted = rng.choice([*WORDS, *NUMBERS]), next(names)
    people = [wanted, *(next(names) for _ in range(OTHERS))]
    told = [(who, value) for who in people for value in values_of(attribute, rng.randint(*TIMES), rng)]
    rng.shuffle(told)
    hidden = [one_of(attribute, *one) for one in told]
    values = [value for who, value in told if who == wanted]
    question = f"What are all the {attribute}s of the {wanted}, in the order of the text?"
    return Task(hidden, question, f"The {attribute}s of the {wanted} are {listed(values)}.", ", ".join(values))


def one_of(attribute: str, who: str, value: str) -> str:
    return f"One of the {attribute}s of the {who} is {value}."


def one_number(names: Iterator[str], rng: random.Random) -> Task:
    attribute, who = rng.choice(NUMBERS), long_names(names, rng)
    values = values_of(attribute, 1 + few_or_many(rng), rng)
    told = [(next(who), value) for value in values]
    wanted, value = told[0]
    rng.shuffle(told)
    hidden = [one_of(attribute, *one) for one in told]
    answer = f"The {attribute} of the {wanted} is {value}."
    return Task(hidden, f"What is the {attribute} of the {wanted}?", answer, value, "Reply with the number alone.")


def several_numbers(names: Iterator[str], rng: random.Random) -> Task:
    """Of several owners in the order asked, or all of one in the order of the text."""
    attribute, who, n = rng.choice(NUMBERS), long_names(names, rng), rng.randint(*TIMES)
    of_one = rng.random() < 0.5
    wanted = [next(who)] * n if of_one else [next(who) for _ in range(n)]
    people = [*wanted, *(next(who) for _ in range(few_or_many(rng)))]
    told = list(zip(people, values_of(attribute, len(people), rng), strict=True))
    values = [value for _, value in told[:n]]
    rng.shuffle(told)
    if of_one:
        values = [value for owner, value in told if owner == wanted[0]]
        question, order = f"Which are all the {attribute}s of the {wanted[0]}?", ""
    else:
        question, order = (
            f"Which are the {attribute}s of {', '.join(f'the {one}' for one in wanted)}?",
            "in that order, ",
        )
    alone = f"Reply with the numbers alone, {order}separated by commas."
    answer = f"The {attribute}s are {listed(values)}."
    return Task([one_of(attribute, *one) for one in told], question, answer, ", ".join(values), alone)


def first_or_last(names: Iterator[str], rng: random.Random) -> Task:
    wanted, *others = facts(1 + OTHERS, names, rng)
    values = values_of(wanted.about.partition(" of the ")[0], rng.randint(*TIMES), rng)
    hidden = [str(wanted._replace(value=value)) for value in values]
    for fact in others:
        hidden.insert(rng.randint(0, len(hidden)), said(fact, rng))
    which = rng.choice(["first", "last"])
    value = values[0 if which == "first" else -1]
    question = f"The text states the {wanted.about} more than once. What is it where it is stated {which}?"
    return Task(hidden, question, f"Where it is stated {which}, the {wanted.about} is {value}.", value)


def count_events(names: Iterator[str], rng: random.Random) -> Task:
    people = [next(names) for _ in range(3)]
    often = [rng.randint(*TIMES) for _ in people]
    hidden = [f"The {who} signed the book again." for who, n in zip(people, often, strict=True) for _ in range(n)]
    rng.shuffle(hidden)
    question = f"How many times does the text say that the {people[0]} signed the book?"
    return Task(hidden, question, f"The text says it {often[0]} times.", str(often[0]))


def two_hops(names: Iterator[str], rng: random.Random) -> Task:
    found = facts(1 + OTHERS, names, rng, mixed=False)  # or a rare attribute would tell the fact without its owner
    friends = [next(names) for _ in found]
    link = rng.choice(["neighbour", "cousin", "employer", "landlord"])
    hidden = [said(fact, rng) for fact in found]
    hidden += [f"The {link} of the {friend} is the {f.owner}." for friend, f in zip(friends, found, strict=True)]
    rng.shuffle(hidden)
    wanted, attribute = found[0], found[0].about.partition(" of the ")[0]
    question = f"What is the {attribute} of the {link} of the {friends[0]}?"
    answer = f"The {link} of the {friends[0]} is the {wanted.owner}, and the {wanted.about} is {wanted.value}."
    return Task(hidden, question, answer, wanted.value)


HIDING: dict[str, Callable[[Iterator[str], random.Random], Task]] = {
    "fact": one_fact,
    "facts": several_facts,
    "values": all_values,
    "number": one_number,
    "numbers": several_numbers,
    "first_last": first_or_last,
    "counting": count_events,
    "multi_hop": two_hops,
}
