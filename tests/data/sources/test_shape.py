"""Records of every format become the same messages; what is wrong with a record is its reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from longalign.config import compose_config
from longalign.data.messages import BadSample
from longalign.data.sources.shape import Shape
from longalign.errors import UserError
from longalign.schema import Files

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SYSTEM = [{"role": "system", "content": "s"}]


def shape(*words: str) -> Shape:
    source = compose_config("prepare", ["source=files", "source.path=x.jsonl", *words]).source
    assert isinstance(source, Files)
    return Shape(source)


@pytest.mark.parametrize(
    ("words", "record", "messages"),
    [
        ([], {"messages": TALK}, TALK),
        ([], {"messages": json.dumps(TALK)}, TALK),
        (["source.fields.messages=chat"], {"chat": TALK}, TALK),
        (["source.fields.content=text"], {"messages": [{"role": "user", "text": "q"}]}, TALK[:1]),
        ([], {"messages": [{"role": "human", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
         [{"role": "user", "content": "a\n\nb"}]),
        (["source.format=sharegpt"], {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, TALK),
        (["source.format=sharegpt"], {"system": "s", "conversations": [{"from": "human", "value": "q"}]}, [*SYSTEM, TALK[0]]),
        (["source.format=sharegpt", "source.roles.Q=user"], {"conversations": [{"from": "Q", "value": "q"}]}, TALK[:1]),
        (["source.format=alpaca"], {"instruction": "q", "input": "", "output": "a"}, TALK),
        (["source.format=alpaca"], {"instruction": "q", "output": "a"}, TALK),
        (["source.format=alpaca"], {"instruction": "q", "input": "i", "output": "a", "system": "s"},
         [*SYSTEM, {"role": "user", "content": "q\n\ni"}, TALK[1]]),
        (["source.format=alpaca", "source.fields={instruction: question,output: reply}"], {"question": "q", "reply": "a"}, TALK),
        (["source.format=custom", "source.fields={instruction: question,output: reply}"], {"question": "q", "reply": "a"}, TALK),
        (["source.format=custom", "source.fields={messages: t,role: who,content: said}"],
         {"t": [{"who": "user", "said": "q"}, {"who": "model", "said": "a"}]}, TALK),
    ],
)  # fmt: skip
def test_every_format_becomes_messages(
    words: list[str], record: dict[str, Any], messages: list[dict[str, str]]
) -> None:
    assert shape(*words).messages(record) == messages


@pytest.mark.parametrize(
    ("words", "record", "reason"),
    [
        ([], {"chat": TALK}, "no 'messages'"),
        ([], {"messages": None}, "no 'messages'"),
        ([], {"messages": {"role": "user"}}, "'messages' is not a list"),
        ([], {"messages": "[{"}, "'messages' is not JSON"),
        ([], {"messages": ["q", "a"]}, "a message is not an object"),
        ([], {"messages": [{"from": "user", "content": "q"}]}, "a message has no 'role'"),
        ([], {"messages": [{"role": "user", "value": "q"}]}, "a message has no 'content'"),
        ([], {"messages": [{"role": "tool", "content": "q"}]}, "unknown role 'tool'"),
        ([], {"messages": [{"role": None, "content": "q"}]}, "unknown role 'None'"),
        ([], {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of a message is not text"),
        (["source.format=alpaca"], {"input": "q", "output": "a"}, "no 'instruction'"),
        (["source.format=alpaca"], {"instruction": "q"}, "no 'output'"),
        (["source.format=alpaca"], {"instruction": ["q"], "output": "a"}, "'instruction' is not text"),
    ],
)
def test_what_is_wrong_is_the_reason(words: list[str], record: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSample) as said:
        shape(*words).messages(record)
    assert str(said.value) == reason


@pytest.mark.parametrize(("found", "expected"), [("x_1", "x_1"), (7, 7), (0, 0), (None, None), ([1], None)])
def test_ids_are_kept(found: Any, expected: Any) -> None:
    assert shape().id({"id": found}) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["source.format=custom"], "a map with messages, role, content or with instruction, output"),
        (["source.format=custom", "source.fields={messages: m}"], "a map with messages, role, content"),
        (["source.format=llama"], "source.format='llama' is not allowed"),
        (["source.fields.question=q"], "should be 'messages', 'role'"),
        (["source.roles.human=robot"], "source.roles.human='robot' is not allowed"),
        (["source.output=a/b"], "source.output='a/b' is not allowed"),
    ],
)
def test_settings_that_cannot_hold(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        shape(*words)
