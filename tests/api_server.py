"""A chat completions API on this machine that counts what it is asked, and misbehaves when told to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(text: str | None, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish_reason,
                "message": {"role": "assistant", "content": text, **message},
            }
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13},
    }


def reader(prompt: str) -> dict[str, Any]:
    """What a well-behaved model says: five questions where they are asked for, else an answer, by the prompt's hash."""
    mark = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    if '"5: "' in prompt or "“5: ”" in prompt:
        return completion("\n".join(f"{n}: What is said of {mark} and {n}?" for n in range(1, 6)))
    return completion(f"It is {mark}.")


class Api(ThreadingHTTPServer):
    """`faults` are served first, one a request: (status, body, headers), "slow", "cut"; then what `say` returns."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, say: Callable[[str], Any] = reader, delay: float = 0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.say, self.delay, self.faults = say, delay, []  # type: ignore[var-annotated]
        self.slow = 1.0  # seconds that "slow" takes
        self.pause = 0.0  # seconds between the words of a streamed reply
        self.models: list[dict[str, Any]] = []  # what GET /models lists
        self.hold_after: int | None = None  # so many requests are answered; those that come later get no reply, ever
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.answered: Counter[str] = Counter()
        self.now = self.peak = 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: Any) -> None:  # clients that were killed
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Api

    def do_GET(self) -> None:
        self._send(200, json.dumps({"object": "list", "data": self.server.models}), {})

    def do_POST(self) -> None:
        api = self.server
        raw = self.rfile.read(int(self.headers["Content-Length"])).decode()
        with api.lock:
            api.requests.append(json.loads(raw))
            api.keys.append(self.headers["Authorization"])
            number = len(api.requests)
            fault = api.faults.pop(0) if api.faults else None
            api.now += 1
            api.peak = max(api.peak, api.now)
        time.sleep(api.delay)
        held = api.hold_after is not None and number > api.hold_after
        while held and api.hold_after is not None:
            time.sleep(0.02)
        with api.lock:
            api.now -= 1
        if held:
            self.close_connection = True
        elif fault == "slow":
            time.sleep(api.slow)
            self.close_connection = True
        elif json.loads(raw).get("stream") and fault in ("cut", None):
            api.answered[raw] += 1
            self._stream(api.say(json.loads(raw)["messages"][-1]["content"]), cut=fault == "cut")
        elif fault == "cut":
            self._send(200, json.dumps(completion("never whole"))[:50], {}, claimed=1000)
            self.close_connection = True
        elif fault is not None:
            self._send(*fault)
        else:
            api.answered[raw] += 1
            said = api.say(json.loads(raw)["messages"][-1]["content"])
            self._send(200, json.dumps(said), {})

    def _stream(self, said: dict[str, Any], cut: bool) -> None:
        """The reply word by word, then why it ended, then its usage; cut: it breaks off in the middle."""
        base = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
        choice = said["choices"][0]
        deltas = [{"content": word} for word in re.findall(r"\s*\S+", choice["message"]["content"])]
        ends = [{"delta": delta, "finish_reason": None} for delta in deltas]
        ends.append({"delta": {}, "finish_reason": choice["finish_reason"]})
        rows = [{**base, "choices": [{"index": 0, **end}]} for end in ends]
        rows.append({**base, "choices": [], "usage": said["usage"]})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", "1000000") if cut else self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        with contextlib.suppress(OSError):  # a client that was stopped
            for row in rows[: len(rows) // 2] if cut else rows:
                self.wfile.write(f"data: {json.dumps(row)}\n\n".encode())
                self.wfile.flush()
                time.sleep(self.server.pause)
            if not cut:
                self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, status: int, text: str, headers: dict[str, str], claimed: int | None = None) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(claimed or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass
