"""The chat command: one answer with prompt=, else a session."""

from __future__ import annotations

import sys
from pathlib import Path

from longalign.chat.session import Model, Session, document_at, question_with
from longalign.errors import UserError
from longalign.progress import console
from longalign.schema import Config

HELP = "Alt-Enter or a backslash begins a new line, Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands."


def chat(config: Config, dry_run: bool) -> int:
    """Run the command; returns its exit code. Raises UserError."""
    documents = _documents(config, dry_run)
    if dry_run:
        what = "one answer" if config.prompt is not None else "a session"
        where = f" at {config.model.endpoint}" if config.model.endpoint else ""
        console.print(f"{what} from {config.model.path}{where}, document of {sum(map(len, documents)):,} characters")
        return 0
    model = _model(config)
    if config.prompt is not None:
        model.answer([{"role": "user", "content": question_with(documents, config.prompt)}], _write)
        _write("\n")
        return 0
    session = Session(model, _write, lambda text: console.print(text, style="dim", soft_wrap=True))
    session.wait_with(documents)
    return _talk(session, config.model.path)


def _documents(config: Config, dry_run: bool) -> tuple[str, ...]:
    """file=, else what is piped in beside a prompt."""
    if config.file:
        return (document_at(f"file={config.file}", Path(config.file)),)
    if config.prompt is None or dry_run or sys.stdin is None or sys.stdin.isatty():
        return ()
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8 text; give HTML and PDF documents as file=PATH") from None
    return (text,) if text else ()


def _model(config: Config) -> Model:
    if config.model.endpoint:
        from longalign.chat.endpoint import Endpoint

        return Endpoint(config)
    from longalign.chat.local import LocalModel

    return LocalModel(config)


def _talk(session: Session, name: str) -> int:
    from longalign.chat.terminal import reader

    read = reader(session.meter)
    session.say(f"{name}. {HELP}")
    while True:
        try:
            if not session.take(read()):
                return 0
        except EOFError:
            return 0
        except KeyboardInterrupt:
            session.say("(Ctrl-D leaves)")
        except UserError as error:
            if not sys.stdin.isatty():  # what comes next was written without knowing of this
                raise
            console.print(f"error: {error}", style="red", soft_wrap=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
