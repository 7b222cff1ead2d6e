"""What the model is asked, and what its replies say."""

from __future__ import annotations

import re
from pathlib import Path

from longalign.config import conf_dir, nearest
from longalign.data.documents import Unreadable, read_document
from longalign.data.messages import Messages
from longalign.errors import UserError

QUESTIONS = 5
REFUSAL = re.compile(
    r"(i'm|i am) (very |truly )?sorry|sorry,|i apologi[sz]e|(unfortunately, )?i (cannot|can't|am unable|am not able)|"
    r"(unfortunately, )?i'm (unable|not able)|as an ai\b|(很|非常)?抱歉|对不起|我(无法|不能)|作为(一个)?(ai|人工智能)",
    re.IGNORECASE,
)

Prompts = dict[str, str]  # "summary.en" -> its text


def load_prompts(folder: str | None) -> Prompts:
    """The shipped prompts, replaced by those of the user's folder. Raises UserError for one that cannot work."""
    files = {file.stem: file for file in sorted((conf_dir() / "prompts" / "self_instruct").glob("*.txt"))}
    if folder is not None:
        own = sorted(Path(folder).glob("*.txt"))
        if not own:
            raise UserError(f"source.prompts={folder}: no .txt file there; its files are named {', '.join(files)}")
        for file in own:
            if file.stem not in files:
                raise UserError(f"source.prompts: {file} is not used{nearest(file.stem, files)} ({', '.join(files)})")
            files[file.stem] = file
    prompts = {}
    for name, file in files.items():
        try:
            prompts[name] = read_document(file)
        except Unreadable as error:
            raise UserError(f"source.prompts: {file}: {error}") from None
        for place in ["{document}", "{question}"] if name.startswith("answer.") else ["{document}"]:
            if prompts[name].count(place) != 1:
                raise UserError(f"source.prompts: {file} must hold {place} once")
    return prompts


def fill(prompt: str, **values: str) -> Messages:
    """One user message. What documents hold in braces is left alone."""
    content = re.sub(r"\{(document|question)\}", lambda found: values.get(found[1], found[0]), prompt)
    return [{"role": "user", "content": content}]


def parse_questions(reply: str) -> list[str] | None:
    """The five questions of a reply that numbers them from 1 in any usual way; None if it does not."""
    number = re.compile(r"^\W*(?:question|问题)?\s*([1-9])\s*\**\s*[:：.、)）]\s*", re.IGNORECASE | re.MULTILINE)
    _, *found = number.split(reply)
    questions = [" ".join(text.split()).lstrip("* ") for text in found[1::2]]
    # bold type that began before the question
    questions = [text.removesuffix("**") if text.count("**") % 2 else text for text in questions]
    numbered = found[::2] == [str(n) for n in range(1, QUESTIONS + 1)]
    return questions if numbered and all(questions) else None


def refuses(reply: str) -> bool:
    return REFUSAL.match(reply.lstrip().replace("’", "'")) is not None
