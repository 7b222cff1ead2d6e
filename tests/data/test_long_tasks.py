"""Questions built by program: the document alone, read by other code than made it, gives the answer."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from longalign.data.long_facts import MANY, OTHERS, drawn, owners
from longalign.data.long_tasks import BEFORE, conversation
from longalign.data.synthetic import ADJECTIVES, MATERIALS, NOUNS, THINGS, Split, split_of
from longalign.evaluate.tasks.retrieval import KEYS
from longalign.schema import LongTasks
from tests.conftest import in_process

KINDS = ["fact", "facts", "values", "number", "numbers", "section", "first_last", "counting", "quoting", "multi_hop"]
PROSE = "\n\n".join(
    f"Paragraph {n} tells of the {n}th harbour and of its {n + 3} ships. It goes on\nwith a second sentence about "
    f"the weather of day {n}, which nobody else has."
    for n in range(60)
)

SHAPES = {  # documents that have few paragraphs, sentences or lines, or headings of their own
    "prose": PROSE,
    "chinese": "今天天气很好。我们去了港口，看见了很多船。" * 300,
    "lines": "\n".join(f"entry {n} of a log that goes\non behind a line" for n in range(400)),
    "no full stops": "\n\n".join(f"Heading {n}\n\n    code(of={n})" for n in range(200)),
    "sections": "\n\n".join(f"Section {n}\n\nThis is what the document says in its part {n}." for n in range(60)),
    "short": "Hello there.",
}


def read_again(text: str, about: str) -> list[str]:
    """Every value that the text gives of `about`, in order, whatever the sentence's form."""
    forms = rf"(?:The|Note that the) {about} is ([\w ]+)\.|(?:^|[\s.])([\w]+(?: \w+)?) is the {about}\."
    return [(a or b).lower() for a, b in re.findall(forms, text)]


def solve(text: str, question: str) -> str:
    """The only answer, bare, by reading."""
    question = re.sub(r" Reply with the \w+ alone.*", "", question)
    if found := re.fullmatch(r"What is the ([\w ]+) of the (\w+ \w+ \w+)\?", question):
        (value,) = re.findall(rf"One of the {found[1]}s of the {found[2]} is (\d+)\.", text)
        return value
    if found := re.fullmatch(r"Which are all the ([\w ]+)s of the (\w+ \w+ \w+)\?", question):
        return ", ".join(re.findall(rf"One of the {found[1]}s of the {found[2]} is (\d+)\.", text))
    if found := re.fullmatch(r"Which are the ([\w ]+?)s of (the .+)\?", question):
        (*values,) = (re.findall(rf"One of the {found[1]}s of {who} is (\d+)\.", text) for who in found[2].split(", "))
        assert all(len(value) == 1 for value in values)
        return ", ".join(value for (value,) in values)
    if found := re.fullmatch(r"What is the ([\w ]+) of the (\w+) of the (\w+ \w+)\?", question):
        attribute, link, friend = found.groups()
        (owner,) = re.findall(rf"The {link} of the {friend} is the (\w+ \w+)\.", text)
        (value,) = read_again(text, f"{attribute} of the {owner}")
        return value
    if found := re.search(r"signed the book\?", question):
        (who,) = re.findall(r"that the (\w+ \w+) signed", question)
        return str(text.count(f"The {who} signed the book again."))
    if found := re.match(r"Which section of the text tells the (.+)\?", question):
        parts = re.split(r"(?:^|\n\n)(Section \d+)\n\n", text)
        (section,) = [name for name, part in zip(parts[1::2], parts[2::2], strict=True) if found[1] in part]
        return section
    if found := re.match(r"The text states the (.+) more than once.* stated (first|last)\?", question):
        values = read_again(text, found[1])
        assert len(set(values)) == len(values) > 1
        return values[0 if found[2] == "first" else -1]
    if found := re.match(r'Quote the sentence of the text that begins with "(.+)"\.', question):
        flat = " ".join(text.split())
        assert flat.count(found[1]) == 1
        return flat[flat.index(found[1]) :].split(".")[0] + "."
    if found := re.match(r"What are all the ([\w ]+)s of the (\w+ \w+), in the order of the text\?", question):
        values = re.findall(rf"One of the {found[1]}s of the {found[2]} is ([\w ]+)\.", text)
        assert len(set(values)) == len(values) > 1
        return ", ".join(values)
    wanted = re.findall(r"the ((?:[a-z]+ ){1,2}of the \w+ \w+)", question)
    values = [read_again(text, about) for about in wanted]
    assert all(len(value) == 1 for value in values), (question, values)
    return ", ".join(value for (value,) in values)


def check(text: str, questions: list[str], answers: list[str]) -> None:
    """Every answer is the document's only one, and its question does not tell it."""
    for question, answer in zip(questions, answers, strict=True):
        wanted = solve(text, question)
        if " alone" in question or question.startswith("Quote"):
            assert answer.lower() == wanted.lower(), question
        else:
            assert re.search(".*".join(rf"\b{value}\b" for value in wanted.split(", ")), answer, re.IGNORECASE), (
                question
            )
        assert not re.search(rf"\b{re.escape(wanted)}\b", question, re.IGNORECASE)


def turns_of(made: dict[str, Any]) -> tuple[str, list[str], list[str]]:
    """The document, the questions and the answers of a conversation."""
    first, *later = (message["content"].removesuffix("\n\nAnswer:") for message in made["messages"])
    text, _, question = first.rpartition("\n\n")
    for before in BEFORE:
        text = text.removeprefix(before)
    return text, [question, *later[1::2]], later[::2]


@pytest.mark.parametrize("kind", KINDS)
def test_the_document_alone_gives_the_answer(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(40):
        check(*turns_of(conversation(PROSE, [kind], "train", rng)))


@pytest.mark.parametrize("kind", KINDS)
def test_several_questions_about_the_same_facts(kind: str) -> None:
    rng, of_one = random.Random(kind), 0
    for _ in range(40):
        made = conversation(PROSE, [kind], "train", rng, 3)
        text, questions, answers = turns_of(made)
        check(text, questions, answers)
        assert len({re.sub(r" Reply with.*", "", question) for question in questions}) == len(made["kinds"])
        assert len(made["kinds"]) == (2 if kind == "first_last" else 3)
        of_one += sum("Which are all" in question for question in questions)
    assert 30 < of_one < 90 or kind != "numbers"


def test_nothing_is_asked_again_while_others_are_left() -> None:
    rng = random.Random(0)
    first, second, third, fourth = drawn(list(range(10)), [3, 4, 3, 2], rng)
    assert sorted(first + second + third) == list(range(10))
    assert len(set(fourth)) == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_questions_about_one_document_go_together(shape: str) -> None:
    rng = random.Random(shape)
    missing = {"prose": set(), "sections": {"section"}}.get(shape, {"quoting"})
    for _ in range(20):
        made = conversation(SHAPES[shape], KINDS, "train", rng)
        assert set(KINDS) - set(made["kinds"]) == missing | ({"quoting"} if shape == "sections" else set())
        assert len(set(made["kinds"])) == len(made["kinds"])
        check(*turns_of(made))


def test_a_quotation_that_a_fact_parts_is_not_asked() -> None:
    lines = [f"Entry {n} has no end and no full stop" for n in range(40)]
    text = "\n".join(
        [*lines, "", "This sentence goes on", "over line", "after line", "after line until", "it ends.", ""]
    )
    rng, parted = random.Random(0), 0
    for _ in range(100):
        made = conversation(text, ["counting", "quoting"], "train", rng)
        check(*turns_of(made))
        parted += "quoting" not in made["kinds"]
    assert 0 < parted < 100


@pytest.mark.parametrize("shape", ["prose", "chinese", "lines", "no full stops"])
def test_facts_stand_everywhere_and_nothing_is_lost(shape: str) -> None:
    rng = random.Random(shape)
    depths: list[float] = []
    for _ in range(40):
        text, _, _ = turns_of(conversation(SHAPES[shape], ["counting"], "train", rng))
        signed = list(re.finditer(r"The \w+ \w+ signed the book again\.", text))
        depths += [match.start() / len(text) for match in signed]
        if shape == "no full stops":  # nothing is put behind a heading or code
            assert all(text[match.start() - 2 : match.start()] in ("\n\n", ". ") for match in signed)
        rest = re.sub(r"\s*The \w+ \w+ signed the book again\.", "", text)
        assert "".join(rest.split()) == "".join(SHAPES[shape].split())
    tenths = [sum(n / 10 <= depth < (n + 1) / 10 for depth in depths) for n in range(10)]
    assert min(tenths) > len(depths) / 25


def test_the_attribute_alone_does_not_tell_the_second_hop() -> None:
    rng = random.Random(0)
    for _ in range(40):
        text, (question,), _ = turns_of(conversation(PROSE, ["multi_hop"], "train", rng))
        attribute = re.findall(r"What is the ([\w ]+?) of the", question)[0]
        assert text.count(f"{attribute} of the") == 5


def test_no_owner_of_a_number_is_a_key_of_the_retrieval_evaluation() -> None:
    rng, keys = random.Random(0), set(KEYS)
    for split in ("train", "test"):
        _, questions, _ = turns_of(conversation(PROSE, ["number", "numbers"], split, rng))
        names = [
            name for question in questions for name in re.findall(r"of the (\w+ \w+ \w+)|, the (\w+ \w+ \w+)", question)
        ]
        assert names
        assert not {a or b for a, b in names} & keys
    assert set(THINGS).isdisjoint(MATERIALS)


@pytest.mark.parametrize("split", ["train", "test"])
def test_there_are_owners_for_all_kinds_at_once(split: Split) -> None:
    """fact, facts, number and numbers take MANY others each; the rest of all kinds' needs are small numbers.

    With as many questions about each as there may be.
    """
    (bounds,) = (meta for meta in LongTasks.model_fields["questions"].metadata if hasattr(meta, "le"))
    there_are = sum(split_of(f"{adjective} {noun}") == split for adjective in ADJECTIVES for noun in NOUNS)
    wanted = 1 + 4 + 1 + bounds.le  # of fact, facts, number; in numbers, those who have several
    few = wanted + (1 + OTHERS) * 3 + 3 + 2 * (1 + OTHERS)  # values, section, first_last; counting; multi_hop
    assert 4 * MANY + few <= there_are


def test_no_owner_of_training_is_in_the_test() -> None:
    parts = [
        {next(names) for names in [owners(split, random.Random(1))] for _ in range(200)} for split in ("train", "test")
    ]
    assert not parts[0] & parts[1]


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for n in range(3):
        (tmp_path / "docs" / f"{n}.txt").write_text(PROSE.replace("harbour", f"port {n}"))
    words = ["source=long_tasks", "source.documents=docs", "source.samples=7", "source.questions=2", "output_dir=out"]
    done = in_process("prepare", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/long.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["id"] for row in rows}) == 7
    assert {kind for row in rows for kind in row["kinds"]} == set(KINDS)
    assert all(set(Counter(row["kinds"]).values()) == {2} and len(row["messages"]) == 16 for row in rows)
    again = in_process("prepare", *words, cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already; overwrite=true replaces it" in again.stderr
    assert "no such folder" in in_process("prepare", *words[:1], "source.documents=nowhere", cwd=tmp_path).stderr
    many = in_process("prepare", *words, "source.questions=11", cwd=tmp_path)
    assert many.returncode == 2
    assert "source.questions=11" in many.stderr


def test_what_is_not_asked_is_said(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/prose.txt").write_text(PROSE)
    (tmp_path / "docs/no_quote.txt").write_text(SHAPES["lines"])
    (tmp_path / "docs/empty.txt").write_text("\n")
    (tmp_path / "docs/binary.txt").write_bytes(b"a\0b")
    words = ["prepare", "source=long_tasks", "source.documents=docs", "source.samples=6", "output_dir=out"]
    done = in_process(*words, "source.turns=8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "out/long.json").read_text())
    assert {Path(file).name for file in about["left_out"]} == {"empty.txt", "binary.txt"}
    rows = [json.loads(line) for line in (tmp_path / "out/long.jsonl").read_text().splitlines()]
    assert about["not_asked"] == {"quoting": sum(row["document"] == "no_quote.txt" for row in rows)}
    assert f"not asked, as the document does not allow it: {about['not_asked']['quoting']} of quoting" in done.stderr
    assert (
        sum(about["kinds"].values()) == sum(len(row["kinds"]) for row in rows) == 6 * 8 - about["not_asked"]["quoting"]
    )


def test_a_document_is_asked_no_kind_twice_at_once_and_others_later(tmp_path: Path) -> None:
    (tmp_path / "doc.txt").write_text(PROSE)
    words = ["prepare", "source=long_tasks", "source.documents=doc.txt", "output_dir=out"]
    for wrong in (["source.turns=11"], ["source.kinds=[fact,section,fact]", "source.turns=3"]):
        done = in_process(*words, *wrong, cwd=tmp_path)
        assert done.returncode == 2
        assert "source.kinds without repeats, and source.turns of at most their" in done.stderr
    done = in_process(*words, "source.turns=1", "source.samples=7", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/long.jsonl").read_text().splitlines()]
    assert len({row["kinds"][0] for row in rows}) > 3
