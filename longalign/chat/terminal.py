"""Lines from the user: edited, remembered and several at a time in a terminal, plain from a pipe or file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longalign.chat.session import NAMES

PROMPT = "> "


def reader(meter: Callable[[], str]) -> Callable[[], str]:
    """A function that returns what the user says next; it raises EOFError at the end and KeyboardInterrupt on Ctrl-C.

    A backslash at the end of a line continues it. meter: what the terminal's last line shows.
    """
    if sys.stdin.isatty() and sys.stdout.isatty():
        return _editor(meter)
    return _plain


def _plain() -> str:
    line = input(PROMPT if sys.stdin.isatty() else "")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input()
    return line


def _editor(meter: Callable[[], str]) -> Callable[[], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import NestedCompleter, PathCompleter
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    paths = PathCompleter(expanduser=True)
    session: PromptSession[str] = PromptSession(
        PROMPT,
        multiline=True,
        prompt_continuation="  ",
        key_bindings=keys,
        history=_history(),
        completer=NestedCompleter({name: paths if name in ("/file", "/save") else None for name in NAMES}),
        complete_while_typing=False,
        bottom_toolbar=meter,
    )
    return session.prompt


def _history() -> Any:
    """What was said before, also in other sessions if the user's state folder can be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    file = Path(state) / "longalign" / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        with open(file, "ab"):
            return FileHistory(str(file))
    except OSError:
        return InMemoryHistory()
