"""Answers on disk as they come, and what makes an answer the answer to a question.

Each line of the file is one answer under the hash of its messages and of all settings that decide it. Lines are only
ever added, so a run that was killed goes on where it stopped, and answers of other settings stay for when these return.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from typing import Any

from longalign.errors import UserError
from longalign.evaluate.question import Answer, CountTokens, Question
from longalign.files import disk_errors


class Answers:
    """`with Answers(file) as stored`: stored.kept maps hashes to answers. Raises UserError if another run writes it."""

    def __init__(self, path: Path):
        self.path = path
        self.kept: dict[str, Answer] = {}

    def __enter__(self) -> Answers:
        with disk_errors(self.path, "output_dir"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+b", buffering=0)  # a batch is one write
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise UserError(f"output_dir: {self.path} is in use by another run; choose another output_dir") from None
        self.file.seek(0)
        text = self.file.read()
        for line in text.splitlines():
            try:
                row = json.loads(line)
                key = row.pop("hash")
                self.kept[key] = Answer(**row)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # of a run that was killed while it wrote: asked again
        if text and not text.endswith(b"\n"):
            self.file.write(b"\n")
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def add(self, answers: Iterable[tuple[str, Answer]]) -> None:
        """Keep the answers of these hashes; on disk when this returns."""
        found = dict(answers)
        self.kept |= found
        lines = [json.dumps({"hash": key, **asdict(answer)}) + "\n" for key, answer in found.items()]
        with disk_errors(self.path, "output_dir"):
            self.file.write("".join(lines).encode())
            os.fsync(self.file.fileno())


def hash_of(question: Question, settings: dict[str, Any]) -> str:
    """settings: of the model and the generation, as far as they decide an answer."""
    told = json.dumps([question.messages, question.max_new_tokens, settings], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def fitted(question: Question, context: int | None, count_tokens: CountTokens) -> Question:
    """The question with a prompt that leaves room for the answer, in the context (tokens; None = unlimited).

    If it may be, its last message is cut in the middle, as LongBench does it: equally many characters stay at either
    end, and about.cut_tokens tells how many tokens went. Raises UserError if it may not, or nothing would be left.
    """
    room = (context or 0) - question.max_new_tokens
    prompt_tokens = count_tokens(question.messages) if context else 0
    if context is None or prompt_tokens <= room:
        return question
    *before, last = question.messages
    kept, per_token = len(last["content"]), len(last["content"]) / prompt_tokens
    tokens, messages = prompt_tokens, question.messages
    while question.cut_middle and tokens > room and kept > 0:
        kept = max(0, kept - ceil((tokens - room) * per_token))
        head, tail = (kept + 1) // 2, kept // 2
        content = last["content"]
        messages = [*before, {**last, "content": content[:head] + content[len(content) - tail :]}]
        tokens = count_tokens(messages)
    if not question.cut_middle or not kept:
        raise UserError(
            f"question {question.id}: the prompt has {prompt_tokens:,} tokens and max_new_tokens="
            f"{question.max_new_tokens}, but the model's context is {context:,}; shorten the prompts, or set "
            "generation.context if the model can do more"
        )
    return replace(question, messages=messages, about={**question.about, "cut_tokens": prompt_tokens - tokens})
