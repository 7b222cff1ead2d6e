"""One answer to standard output, or a session that remembers, forgets and ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import longalign


@pytest.fixture(scope="module")
def words(model_dir: Path) -> list[str]:
    return [f"model.path={model_dir}", "template=longalign-llama", "cluster=cpu", "max_new_tokens=6"]


def test_one_shot_writes_the_answer_alone(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "My Docs (1).txt").write_text("the quiet river")
    first = longalign("chat", *words, "prompt=what is, (near)?", "file=My Docs (1).txt", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip()
    assert (
        first.stdout
        == longalign("chat", *words, "prompt=what is, (near)?", "file=My Docs (1).txt", cwd=tmp_path).stdout
    )
    assert first.stdout != longalign("chat", *words, "prompt=what is, (near)?", cwd=tmp_path).stdout, (
        "the document matters"
    )


def test_session(tmp_path: Path, words: list[str]) -> None:
    talk = lambda *lines: longalign("chat", *words, cwd=tmp_path, input="\n".join(lines) + "\n")
    done = talk("what", "", "/clear", "what", "/exit", "never read")
    assert done.returncode == 0
    answers = [
        line.removeprefix("> ").strip() for line in done.stdout.replace("> > ", "> ").split("> ") if line.strip()
    ]
    assert len(answers) == 2
    assert answers[0] == answers[1], "/clear forgets: the same first question gets the same answer"
    remembered = talk("what", "what")
    assert remembered.returncode == 0, "the end of input ends the session"
    assert answers[0] + "\n" + "> " + answers[0] not in remembered.stdout


def test_prompt_over_the_context(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "long.txt").write_text("river " * 600)
    done = longalign("chat", *words, "prompt=x", "file=long.txt", cwd=tmp_path)
    assert done.returncode == 2
    assert "the model's context is 512" in done.stderr
