"""One answer to standard output, or a session that remembers, forgets and ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from longalign.chat import chat
from longalign.config import compose_config
from longalign.errors import UserError
from tests.conftest import longalign
from tests.data.test_documents import pdf


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


def test_documents_of_any_kind(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The same text as a page, a PDF and plain gives the same answer."""
    (tmp_path / "a.txt").write_text("the quiet river\nkeeps amber")
    (tmp_path / "a.html").write_text("<title>x</title><p>the <b>quiet</b> river<br>keeps amber</p><script>1</script>")
    (tmp_path / "a.pdf").write_bytes(pdf("the quiet river\nkeeps amber"))
    answers = []
    for name in ("a.txt", "a.html", "a.pdf"):
        assert chat(compose_config("chat", [*words, "prompt=what is", f"file={tmp_path}/{name}"]), False) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0].strip()
    assert answers == answers[:1] * 3


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.txt", b"d\xe9j\xe0", "cannot be read as text: not utf-8 text; save it as UTF-8"),
        ("a.pdf", b"%PDF-1.4", "cannot be read as text: PDF"),
        ("a.html", b"<script>x</script>", "is empty"),
        ("absent.txt", None, "cannot be read as text: No such file"),
    ],
)
def test_a_document_that_cannot_be_read(name: str, data: bytes | None, told: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"file={tmp_path}/{name} {told}"):
        chat(compose_config("chat", ["model=tiny", f"file={tmp_path}/{name}"]), dry_run=True)


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
