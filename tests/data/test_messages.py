"""Reading every file format, and saying precisely what is wrong with a sample."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from longalign.data import messages as module
from longalign.data.messages import BadSample, conversation, expand, merge_system, read, understand
from longalign.errors import UserError

SAMPLES = [
    {"messages": [{"role": "user", "content": f"q{i} 你好"}, {"role": "assistant", "content": f"a{i}"}]}
    for i in range(5)
]


def write(path: Path) -> Path:
    lines = "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in SAMPLES).encode()
    name = path.name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.compress(lines))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(SAMPLES), path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(SAMPLES))
    else:
        path.write_bytes(lines)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet"])
def test_every_format_gives_the_same_samples(name: str, tmp_path: Path) -> None:
    raws = list(read(write(tmp_path / name)))
    assert [understand(r) for r in raws] == SAMPLES
    assert [r.line for r in raws] == [1, 2, 3, 4, 5]


def test_blank_lines_keep_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": []}\n\n  \n{"messages": []}\n')
    assert [r.line for r in read(path)] == [1, 4]


def test_globs_and_lists_expand_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.json"):
        write(tmp_path / name)
    found = expand([str(tmp_path / "*.jsonl"), str(tmp_path / "c.json")], "long_file")
    assert [p.name for p in found] == ["a.jsonl", "b.jsonl", "c.json"]


def test_globs_leave_out_what_prepare_writes_beside_its_data(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a_dropped.jsonl", "a.json", "b_dropped.jsonl", "c.json"):
        write(tmp_path / name)
    found = expand([str(tmp_path / "*.json*")], "long_file")
    assert [p.name for p in found] == ["a.jsonl", "b_dropped.jsonl", "c.json"], "b and c are not prepare's"
    assert expand([str(tmp_path / "a.json")], "long_file"), "asked for by name"


@pytest.mark.parametrize("pattern", ["none.jsonl", "*.parquet", "a.csv"])
def test_missing_or_unknown_files_are_refused(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match="long_file"):
        expand([str(tmp_path / pattern)], "long_file")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet"])
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=name):
        list(read(path))


def message(role: str, content: str | None) -> dict[str, str | None]:
    return {"role": role, "content": content}


U, A, S = message("user", "q"), message("assistant", "a"), message("system", "s")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        (None, "no messages"),
        ("text", "no messages"),
        (["text"], "message without a role"),
        ([{"content": "q"}], "message without a role"),
        ([message("human", "q"), A], "unknown role 'human'"),
        ([U], "no answered question"),
        ([S], "no answered question"),
        ([A], "no answered question"),
        ([A, U], "no answered question"),
        ([message("user", 3), A], "content is not text"),  # type: ignore[arg-type]
    ],
)
def test_bad_conversations_say_why(messages: object, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        conversation({"messages": messages})


U2, A2 = message("user", "q2"), message("assistant", "a2")


@pytest.mark.parametrize(
    ("messages", "expected", "changes"),
    [
        ([U, A], [U, A], {}),
        ([S, U, A], [S, U, A], {}),
        ([S, S, U, A], [message("system", "s\n\ns"), U, A], {}),
        ([message("system", None), U, A], [U, A], {}),
        ([U, A, U2], [U, A], {"unanswered last turn left out": 1}),
        ([A, U, A2], [U, A2], {"answer without a question left out": 1}),
        ([S, A, A, U, A2], [S, U, A2], {"answer without a question left out": 2}),
        ([U, U2, A], [message("user", "q\n\nq2"), A], {"user turns in a row joined": 1}),
        ([U, A, A2, U2, A], [U, message("assistant", "a\n\na2"), U2, A], {"answers in a row joined": 1}),
        ([U, S, A], [U, A], {"system message at the end left out": 1}),
        ([U, A, S, U2, A2], [U, A, message("user", "s\n\nq2"), A2], {"system message put into a user turn": 1}),
        ([message("user", None), message("assistant", "a\u200bb")], [message("user", ""), message("assistant", "ab")], {}),
    ],
)  # fmt: skip
def test_roles_are_paired_by_name(messages: list, expected: list, changes: dict[str, int]) -> None:
    assert conversation({"messages": messages}) == (expected, changes)


def test_a_system_message_goes_into_the_first_user_turn() -> None:
    assert merge_system([S, U, A]) == [message("user", "s\n\nq"), A]
    assert merge_system([S, message("user", ""), A]) == [message("user", "s"), A]
    assert merge_system([U, A]) == [U, A]


@pytest.mark.parametrize("line", [b"{not json", b"\xff\xfe", b"[1, 2]"])
def test_malformed_lines(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line)
    with pytest.raises(BadSample):
        understand(next(read(path)))


ARRAYS = [
    "[]",
    " [ ] ",
    "[1, 23, -4.5e6, 789]",
    '\ufeff[{"a": "],[{"}, "\\\\", "\\"", "\\ud83d", "你好", null, true, [[], {}]]\n',
    '[{"long": "' + "x" * 50 + '"}\r\n,\t{"b": [1, 2]} ]',
]
BROKEN = ["[1, 2", "[1 2]", "[1,]", "[,1]", "[1] 2", "[1]]", '["a', "[tru]", "[nul"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_arrays_read_in_pieces_are_those_read_whole(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    path = tmp_path / "a.json"
    for text in ARRAYS:
        path.write_text(text, encoding="utf-8")
        assert [raw.value for raw in read(path)] == json.loads(text.removeprefix("\ufeff"))
    for text in BROKEN:
        path.write_text(text)
        with pytest.raises(UserError, match=r"a\.json cannot be read"):
            list(read(path))
    for text in ('{"item": [1]}', "", "3"):
        path.write_text(text)
        with pytest.raises(UserError, match="holds one array"):
            list(read(path))


def test_an_item_without_end_is_not_read_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 10)
    monkeypatch.setattr(module, "MAX_ITEM", 100)
    path = tmp_path / "a.json"
    path.write_text('["a", "' + "x" * 10_000)
    with pytest.raises(UserError, match="item 2 of the array is malformed"):
        list(read(path))


def test_a_large_array_needs_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with open(path, "w") as file:
        file.write("[" + ",\n".join(json.dumps({"id": n, "value": "x" * 100_000}) for n in range(500)) + "]")
    assert path.stat().st_size > 50e6
    tracemalloc.start()
    count = sum(len(raw.value["value"]) == 100_000 for raw in read(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 500
    assert peak < 15e6
