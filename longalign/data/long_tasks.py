"""Questions about long documents of your own, built by program, whose answers are known: `prepare source=long_tasks`.

Sentences with invented facts are hidden in a document, at depths drawn evenly, and the conversation asks for some of
them. Facts of split=train and split=test have no owner in common (data/synthetic.py).

    fact        one fact of a few or many
    facts       two to four of them, in the order asked
    values      all of the two to five values that a fact is said to have, among those of others
    number      the number of one owner, among those of a few or many, who have names of three words
    numbers     the numbers of two to five of them in the order asked, or all of one in the order of the text
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
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from longalign.data.documents import Unreadable, find_documents, read_document
from longalign.data.long_facts import HIDING, OTHERS, Asked, Hidden, Task, facts, owners, said
from longalign.data.synthetic import Split
from longalign.errors import UserError
from longalign.files import disk_errors, versions, whole_file, write_json
from longalign.progress import Bar
from longalign.schema import Config, LongTasks

BEFORE = (  # a document
    "Read the following text; you will be asked about it.\n\n",
    "Facts are hidden in the following text. Remember them; you will be asked for them.\n\n",
)
BEHIND = "\n\nAnswer:"  # a question, at times
HEADINGS = (5, 12)  # at least and at most
QUOTED = re.compile(r"(?:^|(?<=[.!?]\s))[A-Z][^.!?\"`]{50,220}[.!?](?=\s|$)")  # a sentence of a paragraph
MARKUP = re.compile(r"[-=~*|#]{2}|::|<\w|[][{}]|^\w+:")
NUMBERED = re.compile(r"^\W*section \d", re.IGNORECASE | re.MULTILINE)  # headings of a document's own
ENDS = ".!?。！？"


# -- in a document -------------------------------------------------------------------------------------------


def borders(text: str) -> list[int]:
    """Where something may be put in: behind paragraphs, sentences where those are few, or else behind lines."""
    enough = min(50, len(text) // 500 + 1)
    found: list[int] = []
    for border in (r"\n\n", r"(?<=[.!?])\s|(?<=[。！？])", r"\n"):
        found = max(found, [match.start() for match in re.finditer(border, text)], key=len)
        if len(found) >= enough:
            return found
    return found or [len(text)]


def put_in(text: str, sentences: Hidden, rng: random.Random) -> str:
    """The sentences, in their order, at depths drawn evenly; as paragraphs of their own or behind another sentence."""
    at = sorted(rng.random() for _ in sentences)
    places = borders(text)
    done, parts = 0, []
    for depth, sentence in zip(at, sentences, strict=True):
        place = places[min(int(depth * len(places)), len(places) - 1)]
        behind = text[max(place - 1, 0) : place] in ENDS and rng.random() < 0.5  # not behind a heading or code
        parts += [text[done:place], " " if behind else "\n\n", sentence]
        done = place
    return "".join([*parts, text[done:]])


def with_headings(text: str, names: Iterator[str], rng: random.Random, n: int) -> tuple[str, Task | None]:
    """No task if the document has numbered sections of its own, or is too short for some."""
    found = facts(1 + OTHERS, names, rng)
    hidden = [said(fact, rng) for fact in found]
    rng.shuffle(hidden)
    filled = put_in(text, hidden, rng)
    places, sections = borders(filled), rng.randint(*HEADINGS)
    if NUMBERED.search(text) or len(places) < sections:
        return text, None
    cuts = [0, *(places[n * len(places) // sections] for n in range(1, sections)), len(filled)]
    parts = [part for a, b in pairwise(cuts) if (part := filled[a:b].strip())]
    questions = []
    for fact in found[:n]:
        number = next(number for number, part in enumerate(parts, start=1) if fact.about in part)
        question, answer = f"Which section of the text tells the {fact.about}?", f"Section {number}"
        questions.append(Asked(question, f"{answer} tells the {fact.about}.", answer))
    text = "\n\n".join(f"Section {number}\n\n{part}" for number, part in enumerate(parts, start=1))
    return text, Task([], questions)


def quotations(text: str, rng: random.Random, n: int) -> Task | None:
    """Of sentences whose first six words are theirs alone; None if the document has none."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]  # lines are joined
    flat = " ".join(paragraphs)
    found = [sentence for part in paragraphs for sentence in QUOTED.findall(part)]
    rng.shuffle(found)
    questions: list[Asked] = []
    for sentence in found:
        start = " ".join(sentence.split()[:6])
        if flat.count(start) == 1 and len(sentence.split()) > 9 and not MARKUP.search(sentence):
            question = f'Quote the sentence of the text that begins with "{start}".'
            questions.append(Asked(question, sentence, sentence))
        if len(questions) == n:
            break
    return Task([], questions) if questions else None


def conversation(text: str, kinds: Sequence[str], split: Split, rng: random.Random, n: int = 1) -> dict[str, Any]:
    """Questions of these kinds about the document, n of each, one after the other, and their answers.

    Kinds that it does not allow are left out. Raises Unreadable if it allows none.
    """
    if not text:
        raise Unreadable("empty")
    names = owners(split, rng)
    tasks: list[tuple[str, Task]] = []
    # Quoted is what stood there before; nothing comes between a heading and its section.
    for kind in sorted(kinds, key=["quoting", *HIDING, "section"].index):
        task: Task | None
        if kind == "section":
            text, task = with_headings(text, names, rng, n)
        elif kind == "quoting":
            task = quotations(text, rng, n)
        else:
            task = HIDING[kind](names, rng, n)
        if task:
            text = put_in(text, task.hidden, rng)
            tasks.append((kind, task))
    flat = " ".join(text.split())
    questions = [(kind, asked) for kind, task in tasks for asked in task.asked]
    questions = [(kind, asked) for kind, asked in questions if kind != "quoting" or asked.answer in flat]  # not parted
    if not questions:
        raise Unreadable(f"it allows no question of {', '.join(kinds)}")
    rng.shuffle(questions)
    before = rng.choice(["", *BEFORE])
    messages: list[dict[str, str]] = []
    for kind, (question, answer, short, alone) in questions:
        if kind != "quoting" and rng.random() < 0.5:
            question, answer = f"{question} {alone}", short
        if rng.random() < 0.25:
            question += BEHIND
        asked = question if messages else f"{before}{text}\n\n{question}"
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "kinds": [kind for kind, _ in questions]}


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
    kinds, not_asked, left_out, number = Counter[str](), Counter[str](), dict[str, str](), 0
    with disk_errors(path, "output_dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as out, Bar("prepare", source.samples, "conversations") as bar:
            while number < source.samples:
                file = files[number % len(files)]
                first = number + number // len(files)  # a document is not asked the same again
                wanted = [source.kinds[(first + turn) % len(source.kinds)] for turn in range(source.turns)]
                try:
                    sample = conversation(read_document(file), wanted, source.split, rng, source.questions)
                except Unreadable as error:
                    left_out[str(file)] = str(error)
                    files.remove(file)
                    if not files:
                        which, reason = next(iter(left_out.items()))
                        raise UserError(
                            f"source.documents={source.documents}: none is of use; {which}: {reason}"
                        ) from None
                    continue
                kinds.update(sample["kinds"])
                not_asked.update(set(wanted) - set(sample["kinds"]))
                sample |= {"id": f"{source.split}-{config.seed}-{number:05d}", "document": file.name}
                out.write(json.dumps(sample, ensure_ascii=False) + "\n")
                number += 1
                bar.advance(1)
        about = {"source": source.model_dump(), "seed": config.seed, "kinds": dict(kinds), "not_asked": dict(not_asked)}
        write_json(path.with_suffix(".json"), {**about, "left_out": left_out, "versions": versions()})
    told = [f"{path}: {source.samples:,} conversations about {len(files):,} documents"]
    told += [f"not asked, as the document does not allow it: {n:,} of {kind}" for kind, n in not_asked.most_common()]
    return told + [f"left out: {file}: {reason}" for file, reason in left_out.items()]
