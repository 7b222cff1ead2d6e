"""The API client, against a server on this machine: paid once, retried, never more at once than allowed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longalign.errors import UserError
from longalign.llm import GIVE_UP_AFTER, Client, NoReply
from tests.api_server import Api, completion


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api(say=lambda prompt: completion(f"reply to {prompt}"))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def make(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Client]:
    monkeypatch.setenv("TEST_KEY", "sesame")

    def make(**changes: Any) -> Client:
        settings: dict[str, Any] = {
            "section": "judge",
            "base_url": api.url,
            "model": "m",
            "api_key_env": "TEST_KEY",
            "temperature": 0.5,
            "max_tokens": 100,
            "extra_body": {},
            "timeout_s": 5,
            "retries": 2,
            "concurrency": 4,
            "cache": tmp_path / "cache",
        }
        return Client(**{**settings, **changes})

    return make


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def run(client: Client, act: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with client:
            return await act()

    return asyncio.run(main())


def ask(client: Client, text: str = "hello") -> str:
    return run(client, lambda: client.ask(user(text)))


def test_a_request_says_what_was_configured(api: Api, make: Callable[..., Client]) -> None:
    client = make(extra_body={"top_k": 3})
    assert ask(client) == "reply to hello"
    assert api.requests == [
        {"model": "m", "messages": user("hello"), "temperature": 0.5, "max_tokens": 100, "top_k": 3}
    ]
    assert api.keys == ["Bearer sesame"]
    assert (client.usage.replies, client.usage.paid) == (1, 1)
    assert (client.usage.input_tokens, client.usage.output_tokens) == (10, 3)
    ask(make(temperature=None, max_tokens=None))
    assert api.requests[1] == {"model": "m", "messages": user("hello")}


@pytest.mark.parametrize(
    "fault",
    [
        (429, "{}", {}),
        (500, "no JSON at all", {}),
        (503, "{}", {}),
        (200, '{"id": "1", "choices": [{"ind', {}),
        (200, "<html>busy</html>", {"Content-Type": "text/html"}),
        (200, "null", {}),
        (200, json.dumps({**completion(""), "choices": []}), {}),
        (200, json.dumps({"error": {"message": "overloaded"}}), {}),
        "slow",
        "cut",
    ],
    ids=["429", "500", "503", "broken JSON", "HTML", "null", "no choices", "error in 200", "time-out", "cut"],
)
def test_what_a_retry_can_mend(fault: Any, api: Api, make: Callable[..., Client]) -> None:
    api.faults = [fault]
    assert ask(make(timeout_s=0.4)) == "reply to hello"
    assert len(api.requests) == 2


def test_retry_after_is_respected(api: Api, make: Callable[..., Client]) -> None:
    api.faults = [(429, "{}", {"Retry-After": "2"})]
    start = time.monotonic()
    assert ask(make()) == "reply to hello"
    assert 2 <= time.monotonic() - start < 4


def test_replies_are_kept_and_told_apart(api: Api, make: Callable[..., Client]) -> None:
    ask(make())
    second = make()
    assert ask(second) == "reply to hello"
    assert len(api.requests) == 1
    assert (second.usage.replies, second.usage.paid, second.usage.input_tokens) == (1, 0, 10)
    for n, other in enumerate([{"temperature": 0.6}, {"model": "n"}, {"max_tokens": 99}, {"extra_body": {"k": 1}}], 2):
        ask(make(**other))
        assert len(api.requests) == n


def test_a_damaged_reply_on_disk_is_asked_for_again(api: Api, make: Callable[..., Client], tmp_path: Path) -> None:
    ask(make())
    (file,) = (tmp_path / "cache").glob("*/*.json")
    file.write_text(file.read_text()[:20])
    assert ask(make()) == "reply to hello"
    assert len(api.requests) == 2


def test_the_same_question_twice_at_once_is_asked_once(api: Api, make: Callable[..., Client]) -> None:
    client = make()
    assert run(client, lambda: asyncio.gather(*[client.ask(user("x")) for _ in range(5)])) == ["reply to x"] * 5
    assert len(api.requests) == 1


def test_no_more_requests_at_once_than_allowed(api: Api, make: Callable[..., Client]) -> None:
    api.delay = 0.1
    client = make(concurrency=3)
    texts = [str(n) for n in range(12)]
    asked = run(client, lambda: asyncio.gather(*[client.ask(user(text)) for text in texts]))
    assert asked == [f"reply to {text}" for text in texts]
    assert api.peak == 3


def test_map_keeps_order_and_stops_at_an_error(api: Api, make: Callable[..., Client]) -> None:
    client = make(concurrency=2)
    started: list[int] = []

    async def work(n: int) -> str:
        started.append(n)
        if n == 4:
            raise UserError("stop")
        return await client.ask(user(str(n)))

    assert run(client, lambda: client.map(work, range(4))) == [f"reply to {n}" for n in range(4)]
    with pytest.raises(UserError, match="stop"):
        run(client, lambda: client.map(work, [*range(4), *range(4, 50)]))
    assert max(started) <= 5


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (completion("half an ans", "length"), "reply cut at max_tokens"),
        (completion(None, "content_filter"), "content filter"),
        (completion(None, refusal="I will not"), "refusal"),
        (completion(" \n"), "empty reply"),
        (completion(None), "empty reply"),
    ],
)
def test_replies_that_are_none_are_paid_for_once(
    reply: dict[str, Any], reason: str, api: Api, make: Callable[..., Client]
) -> None:
    api.say = lambda _: reply
    for _ in range(2):
        with pytest.raises(NoReply) as error:
            ask(make())
        assert error.value.reason == reason
    assert len(api.requests) == 1


def test_half_an_emoji_can_be_kept(api: Api, make: Callable[..., Client]) -> None:
    api.say = lambda _: completion("well \ud83d")
    assert ask(make()) == "well ?" == ask(make())


def test_a_bad_request_costs_itself_and_many_in_a_row_the_run(api: Api, make: Callable[..., Client]) -> None:
    bad = (400, json.dumps({"error": {"message": "context_length_exceeded"}}), {})
    client = make()

    async def one() -> None:
        api.faults = [bad] * (GIVE_UP_AFTER - 1)
        for n in range(GIVE_UP_AFTER - 1):
            with pytest.raises(NoReply) as error:
                await client.ask(user(str(n)))
            assert error.value.reason == "request failed: HTTP 400"
            assert "context_length_exceeded" in error.value.detail
        await client.ask(user("good"))  # the count begins anew
        api.faults = [bad] * GIVE_UP_AFTER
        for n in range(GIVE_UP_AFTER - 1):
            with pytest.raises(NoReply):
                await client.ask(user(str(n)))
        await client.ask(user("last"))

    with pytest.raises(UserError, match=f"{GIVE_UP_AFTER} requests in a row failed") as error:
        run(client, one)
    assert "context_length_exceeded" in str(error.value)
    assert len(api.requests) == 2 * GIVE_UP_AFTER


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ((401, '{"error": {"message": "bad key"}}', {}), "judge.api_key_env=TEST_KEY: the key was refused"),
        ((403, '{"error": {"message": "not yours"}}', {}), "judge.api_key_env=TEST_KEY: the key was refused"),
        ((404, '{"error": {"message": "no such model"}}', {}), "judge.model=m: no such model or address"),
        ((429, '{"error": {"message": "pay", "code": "insufficient_quota"}}', {}), "quota is used up"),
    ],
)
def test_what_no_retry_can_mend_stops(fault: Any, said: str, api: Api, make: Callable[..., Client]) -> None:
    api.faults = [fault]
    with pytest.raises(UserError) as error:
        ask(make(retries=0 if fault[0] == 429 else 2))
    assert said in str(error.value)
    assert f"judge.base_url={api.url}" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(api.requests) == 1


def test_a_server_that_is_not_there(make: Callable[..., Client]) -> None:
    with pytest.raises(NoReply) as error:
        ask(make(base_url="http://127.0.0.1:9/v1", retries=0))
    assert error.value.reason == "request failed: no connection"
    assert "attempts failed" in error.value.detail or "refused" in error.value.detail.lower()


def test_a_missing_key_is_told_before_anything_is_asked(
    api: Api, make: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", " ")
    with pytest.raises(UserError, match=r"judge\.api_key_env=TEST_KEY: this environment variable holds no key"):
        ask(make())
    assert api.requests == []
    assert ask(make(api_key_env=None)) == "reply to hello"


def test_two_runs_do_not_share_a_cache(make: Callable[..., Client]) -> None:
    first = make()
    with pytest.raises(UserError, match=r"judge\.cache=.*in use by another run"):
        run(first, lambda: asyncio.to_thread(ask, make()))
    assert ask(make()) == "reply to hello"
