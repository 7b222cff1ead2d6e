"""Questions about long documents of your own, built by program, whose answers are known: `prepare source=long_tasks`.

Sentences with invented facts are hidden in a document, at depths drawn evenly, and the conversation asks for some of
them. Facts of split=train and split=test have no owner in common (data/synthetic.py).

    fact        one fact of several
    facts       two to four of them, in the order asked
    section     the document gets headings; in which section stands the fact?
    first_last  a fact is stated several times, with other values; the first or the last of them
    counting    how often a person is said to have signed the book
    quoting     the document's own sentence that begins with certain words
    multi_hop   the fact of an owner who is only named in another sentence
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longalign.data.documents import Unreadable, find_documents, read_document
from longalign.data.synthetic import ADJECTIVES, MATERIALS, NOUNS, OBJECTS, Split, split_of
from longalign.errors import UserError
from longalign.files import disk_errors, versions, whole_file, write_json
from longalign.progress import Bar
from longalign.schema import Config, LongTasks

WORDS = ("password", "nickname", "motto", "signal", "symbol", "secret", "favourite thing", "hiding place")
NUMBERS = ("access code", "ticket number", "serial number", "room number", "lucky number", "phone number")
FORMS = ("The {about} is {value}.", "{value} is the {about}.", "Note that the {about} is {value}.")
OTHERS = 4  # facts in a document that no question asks for
HEADINGS = (5, 12)  # at least and at most
TIMES = (2, 5)  # that a fact or an event is stated
QUOTED = re.compile(r"(?:^|(?<=[.!?]\s))[A-Z][^.!?\"`]{50,220}[.!?](?=\s|$)")  # a sentence of a paragraph
MARKUP = re.compile(r"[-=~*|#]{2}|::|<\w")

Hidden = list[str]  # sentences in the order in which they stand


class Task(NamedTuple):
    """Sentences to hide, in order, and what to ask about them."""

    hidden: Hidden
    question: str
    answer: str
    short: str  # the bare answer


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


def value_of(attribute: str, rng: random.Random) -> str:
    if attribute in NUMBERS:
        digits = rng.randint(3, 8)
        return str(rng.randrange(10 ** (digits - 1), 10**digits))
    return f"{rng.choice(MATERIALS)} {rng.choice(OBJECTS)}"


def facts(n: int, names: Iterator[str], rng: random.Random) -> list[Fact]:
    """All about the same attribute or about mixed ones; distinct values."""
    attributes = rng.choice([[rng.choice(WORDS)], [rng.choice(NUMBERS)], [*WORDS, *NUMBERS]])
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


# -- the kinds -----------------------------------------------------------------------------------------------


def one_fact(names: Iterator[str], rng: random.Random) -> Task:
    wanted, *others = facts(1 + OTHERS, names, rng)
    hidden = [said(fact, rng) for fact in (wanted, *others)]
    rng.shuffle(hidden)
    asked = rng.choice(["What is the {}?", "Tell me the {}.", "According to the text, what is the {}?"])
    return Task(hidden, asked.format(wanted.about), str(wanted), wanted.value)


def several_facts(names: Iterator[str], rng: random.Random) -> Task:
    found = facts(rng.randint(2, 4) + OTHERS, names, rng)
    wanted = found[:-OTHERS]
    hidden = [said(fact, rng) for fact in found]
    rng.shuffle(hidden)
    asked = listed([f"the {fact.about}" for fact in wanted])
    answer = " ".join(str(fact) for fact in wanted)
    return Task(hidden, f"What are {asked}?", answer, ", ".join(fact.value for fact in wanted))


def first_or_last(names: Iterator[str], rng: random.Random) -> Task:
    wanted, *others = facts(1 + OTHERS, names, rng)
    attribute = wanted.about.partition(" of the ")[0]
    values, times = [wanted.value], rng.randint(*TIMES)
    while len(values) < times:
        if (value := value_of(attribute, rng)) not in values:
            values.append(value)
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
    found = facts(1 + OTHERS, names, rng)
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
    "first_last": first_or_last,
    "counting": count_events,
    "multi_hop": two_hops,
}


# -- in a document -------------------------------------------------------------------------------------------


def borders(text: str) -> list[int]:
    """Where something may be put in: behind paragraphs, or sentences where there are few; never within a sentence."""
    for border in (r"\n\n", r"(?<=[.!?])\s"):
        if len(found := [match.start() for match in re.finditer(border, text)]) >= 50:
            return found
    return [0, len(text)]


def put_in(text: str, sentences: Hidden, rng: random.Random) -> str:
    """The sentences, in their order, at depths drawn evenly; as paragraphs of their own or behind another."""
    at = sorted(rng.random() for _ in sentences)
    places = borders(text)
    done, parts = 0, []
    for depth, sentence in zip(at, sentences, strict=True):
        place = places[min(int(depth * len(places)), len(places) - 1)]
        parts += [text[done:place], rng.choice(["\n\n", " "]), sentence]
        done = place
    return "".join([*parts, text[done:]])


def with_headings(text: str, names: Iterator[str], rng: random.Random) -> tuple[str, Task]:
    wanted, *others = facts(1 + OTHERS, names, rng)
    hidden = [said(fact, rng) for fact in (wanted, *others)]
    rng.shuffle(hidden)
    text = put_in(text, hidden, rng)
    places, sections = borders(text), rng.randint(*HEADINGS)
    cuts = [0, *(places[n * len(places) // sections] for n in range(1, sections))]
    parts = [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
    number = next(n for n, part in enumerate(parts, start=1) if wanted.about in part)
    text = "\n\n".join(f"Section {n}\n\n{part.strip()}" for n, part in enumerate(parts, start=1))
    question = f"Which section of the text tells the {wanted.about}?"
    return text, Task([], question, f"Section {number} tells the {wanted.about}.", f"Section {number}")


def a_quotation(text: str, rng: random.Random) -> Task | None:
    """None if the document has no sentence whose first six words are its alone."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]  # lines are joined
    flat = " ".join(paragraphs)
    found = [sentence for part in paragraphs for sentence in QUOTED.findall(part)]
    rng.shuffle(found)
    for sentence in found:
        start = " ".join(sentence.split()[:6])
        if flat.count(start) == 1 and len(sentence.split()) > 9 and not MARKUP.search(sentence):
            return Task([], f'Quote the sentence of the text that begins with "{start}".', sentence, sentence)
    return None


def conversation(text: str, kinds: Sequence[str], split: Split, rng: random.Random) -> dict[str, Any]:
    """Questions of these kinds about the document, one after the other, and their answers.

    Kinds that it does not allow are left out. Raises Unreadable if it allows none.
    """
    names = owners(split, rng)
    tasks: list[tuple[str, Task]] = []
    for kind in sorted(kinds, key=lambda kind: kind != "quoting"):  # quoted is what stood there before
        task: Task | None
        if kind == "section":
            text, task = with_headings(text, names, rng)
        elif kind == "quoting":
            task = a_quotation(text, rng)
        else:
            task = HIDING[kind](names, rng)
        if task:
            text = put_in(text, task.hidden, rng)
            tasks.append((kind, task))
    if not tasks:
        raise Unreadable("no sentence to quote")
    rng.shuffle(tasks)
    before = rng.choice(["", "", "Read the following text; you will be asked about it.\n\n"])
    messages: list[dict[str, str]] = []
    for kind, task in tasks:
        question, answer = task.question, task.answer
        if kind != "quoting" and rng.random() < 0.5:
            question, answer = f"{question} Reply with the answer alone.", task.short
        asked = question if messages else f"{before}{text}\n\n{question}"
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "kinds": [kind for kind, _ in tasks]}


# -- the source ----------------------------------------------------------------------------------------------


def documents_of(folder: str) -> list[Path]:
    """Raises UserError if there is none."""
    root = Path(folder)
    files = find_documents(root) if root.exists() else []
    if not files:
        raise UserError(f"source.documents={root}: {'no file in it' if root.exists() else 'no such folder or file'}")
    return files


def outputs(config: Config) -> Path:
    """Raises UserError if it is there already."""
    path = Path(config.output_dir or "") / "long.jsonl"
    if path.exists() and not config.overwrite:
        raise UserError(f"{path} exists already; overwrite=true replaces it")
    return path


def describe(config: Config, source: LongTasks) -> list[str]:
    files = documents_of(source.documents)
    return [f"read {len(files):,} documents of {source.documents}", f"write {outputs(config)}"]


def prepare(config: Config, source: LongTasks) -> list[str]:
    """Write long.jsonl and long.json; returns what to tell. Documents and kinds take turns. Raises UserError.

    Documents that cannot be read, or have no sentence to quote where only that is asked, are left out and named.
    """
    files, path = documents_of(source.documents), outputs(config)
    rng = random.Random(f"long_tasks {source.split} {config.seed}")
    rng.shuffle(files)
    kinds, left_out, number = Counter[str](), dict[str, str](), 0
    with disk_errors(path, "output_dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as out, Bar("prepare", source.samples, "conversations") as bar:
            while number < source.samples:
                file = files[number % len(files)]
                wanted = [source.kinds[(number + turn) % len(source.kinds)] for turn in range(source.turns)]
                try:
                    sample = conversation(read_document(file), wanted, source.split, rng)
                except Unreadable as error:
                    left_out[str(file)] = str(error)
                    files.remove(file)
                    if not files:
                        first, reason = next(iter(left_out.items()))
                        raise UserError(
                            f"source.documents={source.documents}: none is of use; {first}: {reason}"
                        ) from None
                    continue
                kinds.update(sample["kinds"])
                sample |= {"id": f"{source.split}-{config.seed}-{number:05d}", "document": file.name}
                out.write(json.dumps(sample, ensure_ascii=False) + "\n")
                number += 1
                bar.advance(1)
        about = {"source": source.model_dump(), "seed": config.seed, "kinds": dict(kinds), "left_out": left_out}
        write_json(path.with_suffix(".json"), {**about, "versions": versions()})
    told = [f"{path}: {source.samples:,} conversations about {len(files):,} documents"]
    return told + [f"left out: {file}: {reason}" for file, reason in left_out.items()]
