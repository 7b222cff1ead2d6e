"""Prompts in files: conf/prompts/TASK, or the user's own in their place."""

from __future__ import annotations

import re
from pathlib import Path

from longalign.config import conf_dir
from longalign.data.documents import Unreadable, read_document
from longalign.errors import UserError


def load_prompt(setting: str, shipped: str, own: str | Path | None, places: tuple[str, ...]) -> str:
    """The text of conf/prompts/`shipped`, or of the file `own`. Raises UserError if it lacks one of {places}."""
    file = Path(own) if own else conf_dir() / "prompts" / shipped
    try:
        text = read_document(file)
    except Unreadable as error:
        raise UserError(f"{setting}={file} cannot be read as text: {error}") from None
    for place in places:
        if f"{{{place}}}" not in text:
            raise UserError(f"{setting}={file} must hold {{{place}}}")
    return text


def fill(prompt: str, **values: str) -> str:
    """Each {name} of the prompt replaced, once: what documents and answers hold in braces is left alone."""
    names = "|".join(values)
    return re.sub(rf"\{{({names})\}}", lambda found: values[found[1]], prompt)
