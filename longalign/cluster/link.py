"""Messages between the launcher and the agent of a host: one JSON object a line, over the remote shell's pipes."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from typing import IO, Any

BEAT_S = 5.0  # seconds between signs of life, both ways
SILENCE_S = 30.0  # without any, the other side is taken for lost
MARK = "longalign"  # a key of every message: what a login script prints is none

Message = dict[str, Any]


def send(stream: IO[bytes], **message: Any) -> None:
    """Write one message. That the other side is gone is learned by reading, so a broken pipe is no error here."""
    with contextlib.suppress(OSError, ValueError):
        stream.write(json.dumps({MARK: 1, **message}).encode() + b"\n")
        stream.flush()


def listen(stream: IO[bytes], heard: Callable[[Message | None], None], other: Callable[[str], None]) -> None:
    """Read in a thread of its own: `heard` gets every message and None at the end, `other` every other line."""

    def read() -> None:
        for line in stream:
            text = line.decode(errors="replace").rstrip("\n")
            try:
                message = json.loads(text)
            except ValueError:
                message = None
            if isinstance(message, dict) and MARK in message:
                heard(message)
            else:
                other(text)
        heard(None)

    threading.Thread(target=read, daemon=True).start()
