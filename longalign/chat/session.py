"""A conversation: its turns, the documents that wait for a question, and what the user may command."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from longalign.chat.answer import Answer, Write
from longalign.data.documents import Unreadable, read_document
from longalign.data.messages import Messages
from longalign.errors import UserError
from longalign.files import write_text

COMMANDS = {
    "/file PATH": "put a document (text, HTML, PDF) before the next question",
    "/undo": "take back the last document or turn",
    "/clear": "forget the conversation and its documents",
    "/save [PATH]": "write the conversation as one line of JSONL, as tokenize reads it",
    "/help": "this list",
    "/exit": "leave, as Ctrl-D does",
}
NAMES = [command.split()[0] for command in COMMANDS]


class Model(Protocol):
    """LocalModel or Endpoint."""

    context: int | None

    def count(self, messages: Messages) -> int | None: ...
    def answer(self, messages: Messages, write: Write) -> Answer: ...


@dataclass(frozen=True)
class Turn:
    documents: tuple[str, ...]
    question: str
    answer: str
    used: int | None  # tokens of the context up to here
    cut: bool  # it ends at max_new_tokens, or where Ctrl-C stopped it

    @property
    def messages(self) -> Messages:
        asked = question_with(self.documents, self.question)
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": self.answer}]


def document_at(setting: str, path: Path) -> str:
    """The text of a document. Raises UserError, naming the setting that asked for it, if there is none."""
    try:
        text = read_document(path.expanduser())
    except Unreadable as error:
        raise UserError(f"{setting} cannot be read as text: {error}") from None
    if not text:
        raise UserError(f"{setting} is empty")
    return text


def question_with(documents: tuple[str, ...], question: str) -> str:
    """Documents come first, as in training."""
    return "\n\n".join([*documents, question])


@dataclass
class Session:
    """write: where answers go as they come; say: where everything else goes."""

    model: Model
    write: Write
    say: Callable[[str], object]
    documents: tuple[str, ...] = ()  # they wait for the next question
    turns: list[Turn] = field(default_factory=list)
    used: int | None = 0  # tokens of the context; None where they are not known
    saved: set[Path] = field(default_factory=set)  # files of this session, which it may write again

    @property
    def messages(self) -> Messages:
        return [message for turn in self.turns for message in turn.messages]

    def take(self, text: str) -> bool:
        """Do what the user says; False ends the session. Raises UserError, and then nothing has changed."""
        name, _, rest = text.strip().partition(" ")
        rest = rest.strip()
        if not text.strip():
            return True
        if not text.startswith("/"):  # after a space it is text
            self.ask(text.strip())
        elif name == "/exit":
            return False
        elif name == "/file":
            self.add(rest)
        elif name == "/undo":
            self.undo()
        elif name == "/clear":
            self.turns, self.documents, self.used = [], (), 0
            self.say(self.meter())
        elif name == "/save":
            self.save(Path(rest or time.strftime("chat-%Y%m%d-%H%M%S.jsonl")).expanduser())
        elif name == "/help":
            for command, what in COMMANDS.items():
                self.say(f"{command:<14}{what}")
        else:
            raise UserError(f"{name} is no command; one of {' '.join(NAMES)} (text that begins so: put a space first)")
        return True

    def ask(self, question: str) -> None:
        """Answer a question; Ctrl-C keeps what was said until then."""
        asked = {"role": "user", "content": question_with(self.documents, question)}
        pieces: list[str] = []
        start = first = time.monotonic()

        def write(piece: str) -> None:
            nonlocal first
            first = first if pieces or not piece else time.monotonic()
            pieces.extend([piece] if piece else [])
            self.write(piece)

        told: Answer | None = None
        try:
            told = self.model.answer([*self.messages, asked], write)
        except KeyboardInterrupt:
            pass
        finally:
            if pieces:
                self.write("\n")
        text = "".join(pieces)
        if told is None and not text.strip():
            self.say("stopped before the answer began; the question is taken back")
            return
        self.used = told.used if told else self.model.count([*self.messages, asked])
        self.turns.append(Turn(self.documents, question, text, self.used, cut=told is None or told.cut))
        self.documents = ()
        self.say(f"{_figures(told, first - start, time.monotonic() - first)}; {self.meter()}")

    def add(self, path: str) -> None:
        if not path:
            raise UserError("/file needs a path: /file paper.pdf")
        text = document_at(f"/file {path}", Path(path))
        self.wait_with((*self.documents, text))
        self.say(f"{len(text):,} characters wait for your question; {self.meter()}")

    def wait_with(self, documents: tuple[str, ...]) -> None:
        """Let documents wait for the next question, and count tokens. Raises UserError over the context."""
        used = self.turns[-1].used if self.turns else 0
        if documents:
            asked = {"role": "user", "content": question_with(documents, "")}
            used = self.model.count([*self.messages, asked])
        self.documents, self.used = documents, used

    def undo(self) -> None:
        """The last thing that was added goes: a document that waits, or else a turn, whose documents wait again."""
        if self.documents:
            self.wait_with(self.documents[:-1])
            self.say(f"a document taken back; {self.meter()}")
        elif self.turns:
            turn = self.turns.pop()
            self.wait_with(turn.documents)
            again = f", {len(turn.documents)} of its documents still there" if turn.documents else ""
            self.say(f"a turn taken back{again}; {self.meter()}")
        else:
            raise UserError("there is nothing to take back")

    def save(self, path: Path) -> None:
        if not self.turns:
            raise UserError("there is nothing to save yet")
        path = path.absolute()
        if path.exists() and path not in self.saved:
            raise UserError(f"{path} exists; give /save another name")
        try:
            write_text(path, json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None
        self.saved.add(path)
        cut = sum(turn.cut for turn in self.turns)
        warned = f"; {cut} of {len(self.turns)} answers do not come to their end, and training on them would teach that"
        self.say(f"saved to {path}{warned if cut else ''}")

    def meter(self) -> str:
        """Tokens of the context that are taken, of its limit."""
        if self.used is None:
            return "tokens unknown until the server tells them"
        limit = self.model.context
        return (
            f"{self.used:,} tokens" if limit is None else f"{self.used:,} of {limit:,} tokens ({self.used / limit:.0%})"
        )


def _figures(told: Answer | None, waited: float, wrote: float) -> str:
    """What an answer cost, e.g. "read 12 tokens (3,064 kept) in 0.1 s, wrote 40 in 0.9 s"."""
    if told is None:
        return "stopped"
    end = " (cut at max_new_tokens)" if told.cut else ""
    if told.prompt is None:
        return f"{waited:.1f} s to the first word, {wrote:.1f} s of answer{end}"
    kept = f" ({told.kept:,} kept)" if told.kept else ""
    read = f"read {told.prompt - (told.kept or 0):,} tokens{kept} in {waited:.2f} s"
    return f"{read}, wrote {told.new or 0:,} in {wrote:.1f} s{end}"
