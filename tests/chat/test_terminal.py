"""A session in a terminal: a process at the other end of a pseudo-terminal, driven key by key."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from longalign.chat.terminal import _history
from longalign.config import compose_config
from longalign.evaluate.generate import Generator
from tests.conftest import in_process, make_model

CTRL_C, CTRL_D, ALT_ENTER, UP = "\x03", "\x04", "\x1b\r", "\x1b[A"
ASKED_WHERE = "\x1b[6n"  # terminals answer with the cursor's place
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")


class Terminal:
    def __init__(self, words: list[str], folder: Path):
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (40, 200))
        env = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(folder / "state")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "longalign.cli", "chat", *words],
            **dict.fromkeys(("stdin", "stdout", "stderr"), slave),
            cwd=folder,
            env=env,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.text = ""

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait(self, wanted: str, seconds: float = 90) -> None:
        """Read until `wanted` is shown; what comes before it is done with."""
        end = time.monotonic() + seconds
        while wanted not in self.text:
            assert time.monotonic() < end, f"no {wanted!r} in {self.text!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    shown = os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the process has ended
                    raise AssertionError(f"ended with {self.text!r}") from None
                if ASKED_WHERE in shown:
                    self.press("\x1b[1;1R")
                self.text += CONTROL.sub("", shown)
        self.text = self.text.partition(wanted)[2]

    def prompt(self) -> None:
        """Wait until the next line is asked for."""
        self.wait(">")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A model whose answers take some ten seconds."""
    folder = make_model(tmp_path / "model", max_position_embeddings=65536)
    return [f"model.path={folder}", "model=hf", "template=longalign-llama", "cluster=cpu", "max_new_tokens=8000"]


@pytest.fixture
def terminal(words: list[str], tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(words, tmp_path)
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.master)


@pytest.mark.slow
def test_a_session(terminal: Terminal, words: list[str], tmp_path: Path) -> None:
    generator = Generator(compose_config("chat", words))
    begins = lambda text: generator.decode(
        generator.generate([generator.prompt_ids([{"role": "user", "content": text}])], 12)[0]
    ).split()[0]
    (tmp_path / "doc.txt").write_text("amber falcon")

    terminal.wait("/help lists the commands")
    terminal.wait("0 of 65,536 tokens")  # the terminal's last line, below the prompt
    terminal.press(CTRL_C)
    terminal.wait("(Ctrl-D leaves)")
    terminal.prompt()
    terminal.press("what is\\\rthe" + ALT_ENTER + "river\r")
    terminal.wait("river")
    terminal.wait(begins("what is\nthe\nriver"))
    terminal.press(CTRL_C)
    terminal.wait("stopped; ")
    terminal.wait("of 65,536 tokens")
    terminal.prompt()
    assert terminal.process.poll() is None

    terminal.press("/file nope.txt\r")
    terminal.wait("error: /file nope.txt cannot be read as text: No such file")
    terminal.prompt()
    terminal.press("/save chat.jsonl\r")
    terminal.wait("saved to")
    terminal.prompt()
    terminal.press("/undo\r")
    terminal.wait("a turn taken back; 0 of 65,536 tokens")
    terminal.prompt()
    terminal.press("/file doc.txt\r")
    terminal.wait("12 characters wait for your question")
    terminal.prompt()
    terminal.press("what\r")
    terminal.wait(begins("amber falcon\n\nwhat"))
    terminal.press(CTRL_C)
    terminal.wait("stopped; ")
    terminal.prompt()
    terminal.press("/clear\r")
    terminal.wait("0 of 65,536 tokens (0%)")
    terminal.prompt()
    terminal.press(UP + UP)  # /clear, what
    time.sleep(0.3)
    terminal.press("\r")
    terminal.wait(begins("what"))
    terminal.press(CTRL_C)
    terminal.wait("stopped; ")
    terminal.prompt()
    terminal.press(CTRL_D)
    assert terminal.process.wait(20) == 0

    saved = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    assert [message["role"] for message in saved] == ["user", "assistant"]
    assert saved[0]["content"] == "what is\nthe\nriver"
    prompt = generator.prompt_ids(saved[:1])
    n = len(generator.tokenizer(saved[1]["content"])["input_ids"])
    assert generator.decode(generator.generate([prompt], n)[0]).startswith(saved[1]["content"])
    history = tmp_path / "state" / "longalign" / "chat_history"
    assert "+/file doc.txt" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


def test_lines_from_a_pipe(model_dir: Path, tmp_path: Path) -> None:
    """Answers alone go to standard output; the first mistake ends the session: what follows may rest on it."""
    words = [f"model.path={model_dir}", "model=hf", "template=longalign-llama", "cluster=cpu", "max_new_tokens=6"]
    lines = [
        "what",
        "/clear",
        "what",
        "is\\",
        "it",
        "/save chat.jsonl",
        "/file nope",
        "what is in it",
        "/save more.jsonl",
    ]
    done = in_process("chat", *words, cwd=tmp_path, input="\n".join(lines))
    assert done.returncode == 2
    messages = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    first, second = messages[1]["content"], messages[3]["content"]
    assert done.stdout == f"{first}\n{first}\n{second}\n", "/clear forgets: the same question gets the same answer"
    assert messages[2]["content"] == "is\nit"
    assert "2 of 2 answers do not come to their end" in done.stderr.replace("\n", " ")
    assert done.stderr.endswith("error: /file nope cannot be read as text: No such file or directory\n")
    assert not (tmp_path / "more.jsonl").exists()
    whole = in_process("chat", *words, cwd=tmp_path, input="what\n")
    assert whole.returncode == 0, "the end of input ends the session"
    long = in_process("chat", *words, cwd=tmp_path, input="river " * 600)
    assert long.returncode == 2
    assert "the model's context is 512; shorten the document" in long.stderr


def test_history_needs_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    history = _history()
    history.append_string("said")
    assert history.get_strings() == ["said"]
