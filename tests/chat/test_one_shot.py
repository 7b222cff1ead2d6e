"""One answer to standard output, for pipes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from longalign.chat.run import chat
from longalign.config import compose_config
from longalign.errors import UserError
from longalign.evaluate.generate import Generator
from tests.conftest import longalign
from tests.data.test_documents import pdf


@pytest.fixture(scope="module")
def words(model_dir: Path) -> list[str]:
    return [f"model.path={model_dir}", "template=longalign-llama", "cluster=cpu", "max_new_tokens=6"]


@pytest.fixture
def ask(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """ask("key=value", ..., piped=b"") -> what is written to standard output."""

    def run(*more: str, piped: bytes = b"") -> str:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(piped)))
        assert chat(compose_config("chat", [*words, *more]), False) == 0
        return capsys.readouterr().out

    return run


def test_a_document_beside_the_prompt(tmp_path: Path, words: list[str], ask: Callable[..., str]) -> None:
    """From a pipe or a file it is the same, and the process writes the answer alone."""
    (tmp_path / "My Docs (1).txt").write_text("the quiet river keeps ä")
    piped = longalign("chat", *words, "prompt=what is, (near)?", cwd=tmp_path, input="the quiet river keeps ä\n")
    assert piped.returncode == 0, piped.stderr
    generator = Generator(compose_config("chat", words))
    asked = [{"role": "user", "content": "the quiet river keeps ä\n\nwhat is, (near)?"}]
    answer = generator.decode(generator.generate([generator.prompt_ids(asked)], 6)[0])
    assert answer.strip()
    assert piped.stdout == answer + "\n"
    file = f"file={tmp_path}/My Docs (1).txt"
    assert ask("prompt=what is, (near)?", file, piped=b"not read, since file= names the document") == answer + "\n"
    assert ask("prompt=what is, (near)?") != answer + "\n", "the document matters"


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


def test_a_pipe_that_is_no_text(ask: Callable[..., str]) -> None:
    with pytest.raises(UserError, match="standard input is not UTF-8 text; give HTML and PDF documents as file=PATH"):
        ask("prompt=x", piped=b"%PDF-1.4 \xff\xfe")


@pytest.mark.parametrize("words_more", [["prompt=x"], []], ids=["one answer", "session"])
def test_a_document_over_the_context(words_more: list[str], tmp_path: Path, ask: Callable[..., str]) -> None:
    (tmp_path / "long.txt").write_text("river " * 600)
    with pytest.raises(UserError, match=r"tokens and max_new_tokens=6, but the model's context is 512; shorten"):
        ask(*words_more, f"file={tmp_path}/long.txt")


def test_the_bundled_model(ask: Callable[..., str]) -> None:
    assert ask("model=tiny", "model.path=${bundled:tiny}", "max_new_tokens=8", "prompt=hello").strip()
