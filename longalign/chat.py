"""Talk to a model: one answer with prompt=, else a session in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path

from longalign.data.documents import Unreadable, read_document
from longalign.data.messages import Messages
from longalign.errors import UserError
from longalign.evaluate.generate import Generator, Stream
from longalign.progress import console
from longalign.schema import Config

HELP = "Ctrl-C stops an answer, /clear forgets the conversation, /exit or Ctrl-D ends the session."


def document_of(file: str) -> str:
    """Raises UserError for a file without text."""
    try:
        text = read_document(Path(file).expanduser())
    except Unreadable as error:
        raise UserError(f"file={file} cannot be read as text: {error}") from None
    if not text:
        raise UserError(f"file={file} is empty")
    return text


def answer(generator: Generator, messages: Messages, max_new_tokens: int, stoppable: bool) -> str:
    """Write the answer to standard output as it comes, and return it. Raises UserError over the context.

    stoppable: Ctrl-C ends the answer, not the program.
    """
    prompt = generator.prompt_ids(messages)
    generator.check_fits(prompt, max_new_tokens)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    stream = Stream(generator.decode, generator.stops, write)
    try:
        generator.generate([prompt], max_new_tokens, stream)
    except KeyboardInterrupt:
        if not stoppable:
            raise
    print()
    return generator.decode(stream.ids)


def chat(config: Config, dry_run: bool) -> int:
    """Run the command; returns its exit code. Raises UserError."""
    document = document_of(config.file) if config.file else ""
    if dry_run:
        what = "one answer" if config.prompt is not None else "a session"
        console.print(f"{what} from {config.model.path}, document of {len(document):,} characters")
        return 0
    generator = Generator(config)
    with_document = lambda text: f"{document}\n\n{text}" if document else text
    if config.prompt is not None:
        answer(generator, [{"role": "user", "content": with_document(config.prompt)}], config.max_new_tokens, False)
        return 0
    console.print(f"{config.model.path}. {HELP}")
    messages: Messages = []
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print()
            continue
        if text == "/exit":
            return 0
        if text == "/clear":
            messages = []
        elif text:
            messages.append({"role": "user", "content": text if messages else with_document(text)})
            try:
                messages.append(
                    {"role": "assistant", "content": answer(generator, messages, config.max_new_tokens, True)}
                )
            except UserError as error:
                messages.pop()
                console.print(f"error: {error}", style="red")
