"""Chat with a server: streamed, stopped, and its troubles told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from longalign.chat.endpoint import Endpoint
from longalign.chat.session import Session
from longalign.config import compose_config
from longalign.errors import UserError
from tests.api_server import Api, completion


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api(lambda prompt: completion("one two three four"))
    yield server
    server.shutdown()
    server.server_close()


def endpoint(api: Api, *words: str) -> Endpoint:
    return Endpoint(
        compose_config("chat", ["model=hf", "model.path=m", f"model.endpoint={api.url}", "endpoint.retries=1", *words])
    )


def session(model: Endpoint) -> tuple[Session, list[str], list[str]]:
    pieces: list[str] = []
    told: list[str] = []
    return Session(model, pieces.append, told.append), pieces, told


def test_a_session_is_streamed_with_its_history(api: Api) -> None:
    api.models = [{"id": "m", "object": "model", "created": 0, "owned_by": "x", "max_model_len": 1000}]
    talk, pieces, told = session(
        endpoint(api, "temperature=0.5", "max_new_tokens=7", "endpoint.extra_body={top_p: 0.9}")
    )
    talk.take("hello")
    assert pieces == ["one", " two", " three", " four", "\n"], "as it comes"
    assert told[-1].startswith("read 10 tokens in ")
    assert told[-1].endswith("; 13 of 1,000 tokens (1%)")
    talk.take("and then?")
    sent = api.requests[-1]
    assert [(m["role"], m["content"]) for m in sent["messages"]] == [
        ("user", "hello"),
        ("assistant", "one two three four"),
        ("user", "and then?"),
    ]
    assert (sent["model"], sent["temperature"], sent["max_tokens"], sent["stream"]) == ("m", 0.5, 7, True)
    assert sent["top_p"] == 0.9


def test_an_answer_cut_by_the_limit_is_told(api: Api) -> None:
    api.say = lambda prompt: completion("one two", finish_reason="length")
    talk, _, told = session(endpoint(api))
    talk.take("hello")
    assert "(cut at max_new_tokens)" in told[-1]
    assert told[-1].endswith("; 13 tokens"), "this server tells no limit"


def test_ctrl_c_keeps_what_was_said(api: Api) -> None:
    api.pause = 0.2
    talk, pieces, told = session(endpoint(api))

    def write(piece: str) -> None:
        pieces.append(piece)
        if piece == " two":
            os.kill(os.getpid(), signal.SIGINT)

    talk.write = write
    talk.take("hello")
    assert [m["content"] for m in talk.messages] == ["hello", "one two"]
    assert told[-1].startswith("stopped")
    api.pause, talk.write = 0.0, pieces.append
    talk.take("go on")
    assert [m["content"] for m in api.requests[-1]["messages"]] == ["hello", "one two", "go on"]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ((400, '{"error": {"message": "maximum context length is 8 tokens"}}', {}), "maximum context length is 8"),
        ((401, '{"error": {"message": "bad key"}}', {}), "bad key"),
        ((404, '{"error": {"message": "no model m"}}', {}), "no model m"),
        ((200, "<html>not an API</html>", {}), "broke off"),
        ("cut", "no answer from the server"),
    ],
)
def test_faults_are_told_and_change_nothing(fault: object, told: str, api: Api) -> None:
    talk, _, _ = session(endpoint(api))
    talk.take("hello")
    before = talk.messages
    api.faults = [fault]
    with pytest.raises(UserError, match=f"model.endpoint={api.url}, endpoint.model=m: .*{told}"):
        talk.take("again")
    assert talk.messages == before
    talk.take("again")
    assert len(talk.messages) == 4


def test_a_server_that_is_down(api: Api) -> None:
    api.shutdown()
    api.server_close()
    model = endpoint(api)
    with pytest.raises(UserError, match=r"no answer from the server .*refused.*is it running"):
        model.answer([{"role": "user", "content": "x"}], print)


def test_the_key(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHAT_KEY", raising=False)
    with pytest.raises(UserError, match=r"endpoint.api_key_env=CHAT_KEY: this environment variable holds no key"):
        endpoint(api, "endpoint.api_key_env=CHAT_KEY")
    monkeypatch.setenv("CHAT_KEY", "k1")
    endpoint(api, "endpoint.api_key_env=CHAT_KEY").answer([{"role": "user", "content": "x"}], lambda _: None)
    assert api.keys == ["Bearer k1"]


def test_a_pipe_needs_neither_torch_nor_a_terminal_library(api: Api, tmp_path: Path) -> None:
    code = "import sys; sys.modules.update(torch=None, transformers=None, prompt_toolkit=None)\n"
    code += "from longalign.cli import main; main()"
    words = ["chat", "model=hf", "model.path=m", f"model.endpoint={api.url}", "prompt=Summarise"]
    document = "Läuft die Mühle?\n"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, input=document.encode(), timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"one two three four\n", b"")
    assert api.requests[0]["messages"] == [{"role": "user", "content": "Läuft die Mühle?\n\nSummarise"}]
