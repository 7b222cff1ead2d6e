"""The commands of a session, on a model that says what it was asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longalign.chat.answer import Answer, Write
from longalign.chat.session import Session
from longalign.data.messages import Messages
from longalign.errors import UserError

LIMIT = 40


class Words:
    """Counts words as tokens; its answer is the last word of the question, and a question of "stop" stops it."""

    context = LIMIT

    def count(self, messages: Messages) -> int:
        n = sum(len(message["content"].split()) for message in messages)
        if n > LIMIT:
            raise UserError(f"{n} over {LIMIT}")
        return n

    def answer(self, messages: Messages, write: Write) -> Answer:
        n = self.count(messages)
        word = messages[-1]["content"].split()[-1]
        if word == "stop":
            raise KeyboardInterrupt
        write(word)
        if word == "halfway":
            raise KeyboardInterrupt
        return Answer(n, None, 1, cut=False)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def session(told: list[str]) -> Session:
    return Session(Words(), lambda piece: None, told.append)


def contents(session: Session) -> list[str]:
    return [message["content"] for message in session.messages]


def test_a_document_stands_before_the_next_question_alone(session: Session, told: list[str], tmp_path: Path) -> None:
    (tmp_path / "my doc.txt").write_text("a b c")
    session.take(f"/file {tmp_path}/my doc.txt")
    assert told == ["5 characters wait for your question; 3 of 40 tokens (8%)"]
    session.take("what is")
    session.take("and then")
    assert contents(session) == ["a b c\n\nwhat is", "is", "and then", "then"]
    assert told[-1].endswith("9 of 40 tokens (22%)")


def test_undo_goes_back_step_by_step(session: Session, told: list[str], tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(f"{name} {name}")
    start = [session.messages, session.documents, session.used]
    steps = [f"/file {tmp_path}/a", "one", "two", f"/file {tmp_path}/b", "three"]
    session.take(steps[0])
    session.take(steps[1])
    after_one = [session.messages, session.documents, session.used]
    session.take(steps[2])
    after_two = [session.messages, session.documents, session.used]
    session.take(steps[3])
    after_file = [session.messages, session.documents, session.used]
    session.take(steps[4])
    for expected in (after_file, after_two, after_one):
        session.take("/undo")
        assert [session.messages, session.documents, session.used] == expected
    session.take("/undo")
    assert session.documents == ("a a",), "the document of a question that is taken back waits again"
    session.take("/undo")
    assert [session.messages, session.documents, session.used] == start
    with pytest.raises(UserError, match="nothing to take back"):
        session.take("/undo")


def test_clear_forgets_documents_too(session: Session, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    session.take("one")
    session.take(f"/file {tmp_path}/a")
    session.take("/clear")
    assert (session.messages, session.documents, session.used) == ([], (), 0)


def test_stopped(session: Session, told: list[str]) -> None:
    session.take("halfway")
    assert contents(session) == ["halfway", "halfway"]
    session.take("stop")
    assert contents(session) == ["halfway", "halfway"]
    assert told[-1] == "stopped before the answer began; the question is taken back"


def test_over_the_context(session: Session, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a " * 41)
    session.take("one")
    for line in (f"/file {tmp_path}/a", "b " * 41):
        with pytest.raises(UserError, match="over 40"):
            session.take(line)
        assert (contents(session), session.documents, session.used) == (["one", "one"], (), 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/file", "needs a path"),
        ("/file nope.txt", "/file nope.txt cannot be read as text: No such file"),
        ("/save", "nothing to save"),
        ("/fiel a", "/fiel is no command; one of /file /undo"),
    ],
)
def test_mistakes(line: str, message: str, session: Session) -> None:
    with pytest.raises(UserError, match=message):
        session.take(line)


def test_text_that_looks_like_a_command(session: Session) -> None:
    session.take(" /etc/hosts")
    assert contents(session) == ["/etc/hosts", "/etc/hosts"]


def test_saving_warns_of_answers_without_an_end(session: Session, told: list[str], tmp_path: Path) -> None:
    session.take("one")
    session.take(f"/save {tmp_path}/whole.jsonl")
    assert told[-1] == f"saved to {tmp_path}/whole.jsonl"
    session.take("halfway")
    session.take(f"/save {tmp_path}/cut.jsonl")
    assert told[-1].startswith(f"saved to {tmp_path}/cut.jsonl; 1 of 2 answers do not come to their end")


def test_saved_as_data_for_training(session: Session, tmp_path: Path) -> None:
    session.take("wie heißt\ndu")
    file = tmp_path / "chat.jsonl"
    session.take(f"/save {file}")
    session.take("two")
    session.take(f"/save {file}")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [{"messages": session.messages}]
    assert contents(session)[0] == "wie heißt\ndu"
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    with pytest.raises(UserError, match="exists; give /save another name"):
        session.take(f"/save {other}")
    assert other.read_text() == "mine"
    with pytest.raises(UserError, match=r"cannot write .*: "):
        session.take(f"/save {tmp_path}/no/such/folder.jsonl")


def test_exit(session: Session) -> None:
    assert session.take("")
    assert session.take("/help")
    assert not session.take("/exit")
