"""Asking a model behind an OpenAI-compatible API: several requests at once, retried, and each paid for once.

Every reply is kept on disk under the hash of its whole request, so a run that was killed asks only for what it lacks.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import openai

from longalign.data.messages import Messages
from longalign.errors import UserError
from longalign.files import disk_errors, read_json, write_json

GIVE_UP_AFTER = 5  # failures in a row, each after its retries: it is not the single request any more

Item = TypeVar("Item")
Result = TypeVar("Result")


class NoReply(Exception):
    """This request has no usable reply; others may have. `reason` can be counted, `detail` is what the API said."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class _Malformed(Exception):
    """HTTP 200 with something that is no chat completion."""


@dataclass
class Usage:
    """What the replies cost, those from the cache included: a run that was interrupted counts as one that was not."""

    replies: int = 0
    paid: int = 0  # of them, asked for in this run
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(kw_only=True)
class Client:
    """`async with Client(...) as client: await client.ask(messages)`.

    `section` is where these settings stand in the configuration ("source"), for messages.
    """

    section: str
    base_url: str
    model: str
    api_key_env: str | None
    temperature: float | None
    max_tokens: int | None
    extra_body: dict[str, Any]
    timeout_s: float
    retries: int
    concurrency: int
    cache: Path
    usage: Usage = field(default_factory=Usage)

    async def __aenter__(self) -> Client:
        """Raises UserError if there is no key."""
        key = os.environ.get(self.api_key_env, "") if self.api_key_env else "none"
        if not key.strip():
            raise UserError(
                f"{self.section}.api_key_env={self.api_key_env}: this environment variable holds no key for "
                f"{self.base_url}; export it, or {self.section}.api_key_env=null for a server that asks for none"
            )
        self._key = key.strip()
        # The library itself retries 408, 409, 429 (as late as Retry-After says), 5xx, time-outs and lost connections.
        self._api = openai.AsyncOpenAI(
            base_url=self.base_url, api_key=self._key, timeout=self.timeout_s, max_retries=self.retries
        )
        self._slots = asyncio.Semaphore(self.concurrency)
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._failures = 0
        with disk_errors(self.cache, f"{self.section}.cache"):
            self.cache.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.cache / ".lock", "w")  # closed with the process, also when that is killed
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.section}.cache={self.cache} is in use by another run, which would pay twice"
            ) from None
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._lock.close()
        await self._api.close()

    async def ask(self, messages: Messages, again: int = 0) -> str:
        """The text of the model's reply. Raises NoReply, also where it is cut, refused or empty, and UserError."""
        return _text(await self.reply(messages, again))

    async def reply(self, messages: Messages, again: int = 0, max_tokens: int | None = None) -> dict[str, Any]:
        """The model's reply, from the cache if it was given before: text, refusal, finish_reason and tokens.

        again: the same request once more, whose reply is kept apart. max_tokens: instead of the client's own.
        Raises NoReply if the request fails, or UserError if none can succeed.
        """
        body: dict[str, Any] = {"model": self.model, "messages": messages}
        body |= {"temperature": self.temperature} if self.temperature is not None else {}
        max_tokens = max_tokens or self.max_tokens
        body |= {"max_tokens": max_tokens} if max_tokens is not None else {}
        told = [self.base_url, body, self.extra_body, *([again] if again else [])]
        key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        file = self.cache / key[:2] / f"{key}.json"
        reply: dict[str, Any] | None = None
        async with self._locks[key]:  # the same question twice at once is asked once
            with suppress(FileNotFoundError, ValueError):
                reply = read_json(file)
            if reply is None:
                async with self._slots:
                    reply = await self._request(body)
                with disk_errors(file, f"{self.section}.cache"):
                    file.parent.mkdir(exist_ok=True)
                    write_json(file, reply)
                self.usage.paid += 1
        self.usage.replies += 1
        self.usage.input_tokens += reply["input_tokens"]
        self.usage.output_tokens += reply["output_tokens"]
        return reply

    async def map(self, function: Callable[[Item], Awaitable[Result]], items: Sequence[Item]) -> list[Result]:
        """function(item) of every item, in order. As many run at a time as requests may, so that memory holds few."""
        results: dict[int, Result] = {}
        todo = iter(enumerate(items))

        async def work() -> None:
            for n, item in todo:  # which all workers share
                results[n] = await function(item)

        workers = [asyncio.create_task(work()) for _ in range(self.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:  # one failed, or Ctrl-C: the others need not go on
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return [results[n] for n in range(len(items))]

    async def _request(self, body: dict[str, Any]) -> dict[str, Any]:
        """Ask over the network. Raises NoReply or UserError."""
        at = f"{self.section}.base_url={self.base_url}, {self.section}.model={self.model}"
        try:
            reply = await self._whole_reply(body)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            what = f"{self.section}.api_key_env={self.api_key_env}: the key"
            raise UserError(f"{what} was refused ({self._said(error)}) by {at}") from None
        except openai.NotFoundError as error:
            raise UserError(f"{at}: no such model or address ({self._said(error)})") from None
        except (openai.APIError, _Malformed) as error:
            if getattr(error, "code", None) == "insufficient_quota":
                raise UserError(f"{at}: the account's quota is used up ({self._said(error)})") from None
            self._failures += 1
            if self._failures >= GIVE_UP_AFTER:
                raise UserError(
                    f"{at}: {self._failures} requests in a row failed, the last one with: {self._said(error)}. "
                    f"Replies so far are kept in {self.cache}; run again to go on"
                ) from None
            raise NoReply(f"request failed: {_kind(error)}", self._said(error)) from error
        self._failures = 0
        return reply

    def _said(self, error: Exception) -> str:
        """The first words of an error, and of what caused it where the library says as little as "Connection error.".

        Servers quote keys that they refuse: it is taken out.
        """
        said = " ".join(str(error).split())
        if isinstance(error, openai.APIConnectionError) and error.__cause__:
            said = f"{said} {error.__cause__}"
        return (said.replace(self._key, "(the key)") if self.api_key_env else said)[:300]

    async def _whole_reply(self, body: dict[str, Any]) -> dict[str, Any]:
        """The parts of a completion that matter. What is none is asked for again, which the library leaves to us."""
        for attempt in range(self.retries + 1):
            if attempt:
                await asyncio.sleep(min(0.5 * 2 ** (attempt - 1), 8))
            with suppress(json.JSONDecodeError, _Malformed):
                return _parts(await self._api.chat.completions.create(**body, extra_body=self.extra_body))
        raise _Malformed("the reply is no chat completion")


def _parts(completion: Any) -> dict[str, Any]:
    """Nothing is sure to be there: the library does not check what a server sends. Raises _Malformed."""
    choices = getattr(completion, "choices", None)
    if not choices or getattr(choices[0], "message", None) is None:
        raise _Malformed
    message = choices[0].message
    text = getattr(message, "content", None)
    if not isinstance(text, str | None):
        raise _Malformed
    usage = getattr(completion, "usage", None)
    return {
        "text": (text or "").encode(errors="replace").decode(),  # half of an emoji cannot be written to a file
        "refusal": getattr(message, "refusal", None),
        "finish_reason": getattr(choices[0], "finish_reason", None),
        "input_tokens": getattr(usage, "prompt_tokens", None) or 0,
        "output_tokens": getattr(usage, "completion_tokens", None) or 0,
    }


def _kind(error: Exception) -> str:
    if isinstance(error, openai.APIStatusError):
        return f"HTTP {error.status_code}"
    if isinstance(error, openai.APITimeoutError):
        return "time-out"
    return "no connection" if isinstance(error, openai.APIConnectionError) else "malformed reply"


def _text(reply: dict[str, Any]) -> str:
    """Raises NoReply where a model answered without an answer."""
    if reply["finish_reason"] == "length":
        raise NoReply("reply cut at max_tokens")
    if reply["finish_reason"] == "content_filter":
        raise NoReply("content filter")
    if reply["refusal"]:
        raise NoReply("refusal", reply["refusal"])
    if not reply["text"].strip():
        raise NoReply("empty reply")
    return reply["text"].strip()
