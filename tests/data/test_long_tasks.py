"""Questions built by program: the document alone, read by other code than made it, gives the answer."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from longalign.data.long_tasks import conversation, owners
from tests.conftest import in_process

KINDS = ["fact", "facts", "section", "first_last", "counting", "quoting", "multi_hop"]
PROSE = "\n\n".join(
    f"Paragraph {n} tells of the {n}th harbour and of its {n + 3} ships. It goes on\nwith a second sentence about "
    f"the weather of day {n}, which nobody else has."
    for n in range(60)
)


def read_again(text: str, about: str) -> list[str]:
    """Every value that the text gives of `about`, in order, whatever the sentence's form."""
    forms = rf"(?:The|Note that the) {about} is ([\w ]+)\.|(?:^|[\s.])([\w]+(?: \w+)?) is the {about}\."
    return [(a or b).lower() for a, b in re.findall(forms, text)]


def solve(text: str, question: str) -> str:
    """The bare answer, by reading."""
    question = question.removesuffix(" Reply with the answer alone.")
    if found := re.fullmatch(r"What is the ([\w ]+) of the (\w+) of the (\w+ \w+)\?", question):
        attribute, link, friend = found.groups()
        (owner,) = re.findall(rf"The {link} of the {friend} is the (\w+ \w+)\.", text)
        return read_again(text, f"{attribute} of the {owner}")[0]
    if found := re.search(r"signed the book\?", question):
        (who,) = re.findall(r"that the (\w+ \w+) signed", question)
        return str(text.count(f"The {who} signed the book again."))
    if found := re.match(r"Which section of the text tells the (.+)\?", question):
        parts = re.split(r"(?:^|\n\n)(Section \d+)\n\n", text)
        (section,) = [name for name, part in zip(parts[1::2], parts[2::2], strict=True) if found[1] in part]
        return section
    if found := re.match(r"The text states the (.+) more than once.* stated (first|last)\?", question):
        values = re.findall(rf"The {found[1]} is ([\w ]+)\.", text)
        return values[0 if found[2] == "first" else -1]
    if found := re.match(r'Quote the sentence of the text that begins with "(.+)"\.', question):
        flat = " ".join(text.split())
        return flat[flat.index(found[1]) :].split(".")[0] + "."
    wanted = re.findall(r"the ((?:[a-z]+ ){1,2}of the \w+ \w+)", question)
    return ", ".join(read_again(text, about)[0] for about in wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_document_alone_gives_the_answer(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(40):
        made = conversation(PROSE, [kind], "train", rng)
        asked, answer = (message["content"] for message in made["messages"])
        text, _, question = asked.rpartition("\n\n")
        for wanted in solve(text, question).split(", "):
            assert wanted in answer.lower() or wanted in answer, (question, answer)


def test_several_questions_about_one_document() -> None:
    made = conversation(PROSE, KINDS, "train", random.Random(0))
    assert sorted(made["kinds"]) == sorted(KINDS)
    text = made["messages"][0]["content"].rpartition("\n\n")[0]
    questions = [made["messages"][0]["content"].rpartition("\n\n")[2]]
    questions += [message["content"] for message in made["messages"][2::2]]
    for question, answer in zip(questions, made["messages"][1::2], strict=True):
        for wanted in solve(text, question).split(", "):
            assert wanted in answer["content"].lower() or wanted in answer["content"], question


def test_no_owner_of_training_is_in_the_test() -> None:
    parts = [
        {next(names) for names in [owners(split, random.Random(1))] for _ in range(200)} for split in ("train", "test")
    ]
    assert not parts[0] & parts[1]


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for n in range(3):
        (tmp_path / "docs" / f"{n}.txt").write_text(PROSE.replace("harbour", f"port {n}"))
    words = ["source=long_tasks", "source.documents=docs", "source.samples=7", "output_dir=out"]
    done = in_process("prepare", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/long.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["id"] for row in rows}) == 7
    assert {kind for row in rows for kind in row["kinds"]} == set(KINDS)
    again = in_process("prepare", *words, cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already; overwrite=true replaces it" in again.stderr
    assert "no such folder" in in_process("prepare", *words[:1], "source.documents=nowhere", cwd=tmp_path).stderr
