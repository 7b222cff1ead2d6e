"""Records of other formats -> messages: which field is what, and which role is whose."""

from __future__ import annotations

import json
from typing import Any

from longalign.data.messages import BadSample, joined
from longalign.schema import Records

# What the fields of a format are called; source.fields goes on top. A format has `messages`, or `instruction`.
FORMATS: dict[str, dict[str, str]] = {
    "openai": {"messages": "messages", "role": "role", "content": "content", "id": "id"},
    "sharegpt": {"messages": "conversations", "role": "from", "content": "value", "system": "system", "id": "id"},
    "alpaca": {"instruction": "instruction", "input": "input", "output": "output", "system": "system", "id": "id"},
    "custom": {"id": "id"},
}


class Shape:
    """Reads messages and id out of a record, as source.format, source.fields and source.roles say."""

    def __init__(self, source: Records):
        self.fields = FORMATS[source.format] | {str(what): name for what, name in source.fields.items()}
        self.roles = source.roles

    def messages(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """The messages as they stand, with roles mapped; messages.conversation pairs them. Raises BadSample."""
        if "messages" in self.fields:
            turns = [self._turn(turn) for turn in self._turns(record)]
        else:
            question = joined(self._text(record, "instruction", needed=True), self._text(record, "input"))
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": self._text(record, "output", needed=True)},
            ]
        system = self._text(record, "system")
        return [{"role": "system", "content": system}, *turns] if system else turns

    def id(self, record: dict[str, Any]) -> str | int | None:
        found = record.get(self.fields["id"])
        return found if isinstance(found, str | int) else None

    def _turns(self, record: dict[str, Any]) -> list[Any]:
        name = self.fields["messages"]
        turns = record.get(name)
        if isinstance(turns, str):  # a table without nested columns, such as CSV, holds them as JSON
            try:
                turns = json.loads(turns)
            except (ValueError, RecursionError):
                raise BadSample(f"{name!r} is not JSON") from None
        if turns is None:
            raise BadSample(f"no {name!r}")
        if not isinstance(turns, list):
            raise BadSample(f"{name!r} is not a list")
        return turns

    def _turn(self, turn: Any) -> dict[str, Any]:
        if not isinstance(turn, dict):
            raise BadSample("a message is not an object")
        role, content = (turn.get(self.fields[name]) for name in ("role", "content"))
        for name in (self.fields["role"], self.fields["content"]):
            if name not in turn:
                raise BadSample(f"a message has no {name!r}")
        if not isinstance(role, str) or role not in self.roles:
            raise BadSample(f"unknown role {str(role)[:20]!r}")
        return {"role": self.roles[role], "content": _text_of_parts(content) if isinstance(content, list) else content}

    def _text(self, record: dict[str, Any], what: str, needed: bool = False) -> str:
        name = self.fields.get(what, "")
        if needed and name not in record:
            raise BadSample(f"no {name!r}")
        text = record.get(name)
        if not isinstance(text, str | None):
            raise BadSample(f"{name!r} is not text")
        return text or ""


def _text_of_parts(parts: list[Any]) -> str:
    """OpenAI's content may be a list of parts: [{"type": "text", "text": ...}, ...]."""
    texts = [part["text"] for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise BadSample("a part of a message is not text")
    return joined(*texts)
