"""`prepare` with sources of others, from files as they come to files as tokenize reads them."""

from __future__ import annotations

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from longalign.config import compose_config
from longalign.data.prepare import describe, prepare
from longalign.errors import UserError

# Line ends, quotes, commas, other scripts and what JSON escapes: what the formats disagree about.
RECORDS = [
    {"id": f"r{i}", "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"answer {i}"}]}
    for i, q in enumerate(["plain", 'a "quoted", one', "two\nlines\r\n", "你好 🌍", "tab\t\\ back", "null", " x "])
]


def run(folder: Path, *words: str) -> list[str]:
    return prepare(compose_config("prepare", [f"output_dir={folder}", *words]))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def jsonl(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[list[str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def as_text() -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "jsonl": lambda path: path.write_text(as_text(), encoding="utf-8", newline=""),
    "jsonl.gz": lambda path: path.write_bytes(gzip.compress(as_text().encode())),
    "jsonl.zst": lambda path: path.write_bytes(zstandard.compress(as_text().encode())),
    "json": lambda path: path.write_text(json.dumps(RECORDS, indent=1), encoding="utf-8"),
    "parquet": lambda path: pq.write_table(pa.Table.from_pylist(RECORDS), path),
    "csv": lambda path: write_csv(path, [["id", "messages"], *([r["id"], json.dumps(r["messages"])] for r in RECORDS)]),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_same(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path / f"talks.{kind}")
    run(tmp_path / "out", "source=files", f"source.path={tmp_path}/talks.{kind}")
    assert lines(tmp_path / "out" / "talks.jsonl") == RECORDS
    assert (tmp_path / "out" / "talks_dropped.jsonl").read_text() == ""


def test_alpaca_as_csv(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "a.csv", [["instruction", "input", "output"], ["say\nit", 'with "this"', "it"], ["q", "", "a"]]
    )
    run(tmp_path / "out", "source=files", f"source.path={tmp_path}/a.csv", "source.format=alpaca")
    found = [[m["content"] for m in sample["messages"]] for sample in lines(tmp_path / "out" / "a.jsonl")]
    assert found == [['say\nit\n\nwith "this"', "it"], ["q", "a"]]


def parquet_splits(folder: Path) -> None:
    folder.mkdir()
    for name, rows in (("train-0-of-2", RECORDS[:3]), ("train-1-of-2", RECORDS[3:]), ("test-0-of-1", RECORDS[:1])):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")


def saved(folder: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(RECORDS).save_to_disk(folder)


def saved_splits(folder: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list(RECORDS), "test": Dataset.from_list(RECORDS[:1])}).save_to_disk(folder)


def arrow(folder: Path) -> None:
    """A kind of file that only `datasets` reads."""
    folder.mkdir()
    table = pa.Table.from_pylist(RECORDS)
    with pa.ipc.new_stream(str(folder / "data.arrow"), table.schema) as writer:
        writer.write_table(table)


def by_readme(folder: Path) -> None:
    """A repository whose README says which file is what, as hubs have it."""
    folder.mkdir()
    WRITERS["jsonl"](folder / "all.jsonl")
    WRITERS["jsonl"](folder / "other.jsonl")
    configs = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: all.jsonl\n---\n"
    (folder / "README.md").write_text(configs)


@pytest.mark.parametrize("write", [parquet_splits, saved, saved_splits, arrow, by_readme])
def test_a_folder_is_a_local_copy_of_a_hub(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "LongAlign-10k")
    run(tmp_path, "source=longalign10k", f"source.path={tmp_path}/LongAlign-10k")
    assert lines(tmp_path / "long.jsonl") == RECORDS
    run(tmp_path, "source=hub", f"source.path={tmp_path}/LongAlign-10k")
    assert lines(tmp_path / "LongAlign-10k.jsonl") == RECORDS


@pytest.mark.parametrize("write", [parquet_splits, saved_splits])
def test_splits_are_told_apart(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "set")
    run(tmp_path, "source=hub", f"source.path={tmp_path}/set", "source.split=test")
    assert lines(tmp_path / "set.jsonl") == RECORDS[:1]
    with pytest.raises(UserError, match=r"source.split=dev: .*set has (train, test|test, train)"):
        run(tmp_path, "source=hub", f"source.path={tmp_path}/set", "source.split=dev", "overwrite=true")


BAD = {  # reason -> the line it stands on
    "malformed JSON": '{"messages": [',
    "not a JSON object": "[1]",
    "no 'messages'": {"text": "x"},
    "no messages": {"messages": []},
    "unknown role 'alien'": {"messages": [{"role": "alien", "content": "x"}]},
    "content is not text": {"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "x"}]},
    "no answered question": {"messages": [{"role": "user", "content": "x"}]},
    "every turn is empty": {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": None}]},
}


@pytest.mark.parametrize("source", ["files", "hub"])
def test_bad_records_are_counted_and_named(source: str, tmp_path: Path) -> None:
    good, cut = RECORDS[0], {"messages": [*RECORDS[0]["messages"], {"role": "user", "content": "?"}]}
    jsonl(tmp_path / "in" / "a.jsonl", [good, "", *BAD.values(), good])
    file = jsonl(tmp_path / "in" / "b.jsonl", [*BAD.values(), cut])
    path = f"{tmp_path}/in" if source == "hub" else f"{tmp_path}/in/*.jsonl"
    told = run(tmp_path / "out", f"source={source}", f"source.path={path}", "source.output=talks")
    manifest = json.loads((tmp_path / "out" / "talks.json").read_text())
    assert manifest["dropped"] == dict.fromkeys(BAD, 2)
    assert manifest["changes"] == {"unanswered last turn left out": 1}
    assert (manifest["records_in"], manifest["records_kept"], manifest["conversations_out"]) == (19, 3, 3)
    named = lines(tmp_path / "out" / "talks_dropped.jsonl")
    expected = [("a.jsonl", n, reason, False) for n, reason in enumerate(BAD, start=3)]
    expected += [("b.jsonl", n, reason, False) for n, reason in enumerate(BAD, start=1)]
    expected += [("b.jsonl", len(BAD) + 1, "unanswered last turn left out", True)]
    assert [(Path(e["file"]).name, e["line"], e["reason"], e["rest_kept"]) for e in named] == expected
    assert Path(named[-1]["file"]) == file
    assert any("talks_dropped.jsonl" in line for line in told)
    assert [len(s["messages"]) for s in lines(tmp_path / "out" / "talks.jsonl")] == [2, 2, 2]


def test_a_csv_row_of_another_length_is_dropped_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('instruction,output\n"two\nlines",a\nq,a,more\nq\n\nq2,a2\n')
    run(tmp_path, "source=files", f"source.path={tmp_path}/a.csv", "source.format=alpaca")
    assert [e["line"] for e in lines(tmp_path / "a_dropped.jsonl")] == [2, 3]
    assert [s["messages"][0]["content"] for s in lines(tmp_path / "a.jsonl")] == ["two\nlines", "q2"]


CHAT_PAGE = [
    {"from": "human", "value": "Write <b>bold</b> in HTML, please, and tell me what it does."},
    {"from": "gpt", "value": "<div class=\"markdown prose\"><p>Use <code>&lt;b&gt;</code>:</p><pre><div><span>html</span>"
     "<button>Copy code</button><code class=\"language-html\">&lt;b&gt;bold&lt;/b&gt;\n</code></div></pre></div>"},
    {"from": "human", "value": "And in Markdown, how would one write the same thing?"},
    {"from": "gpt", "value": "```markdownCopy code**bold**\n```"},
    {"from": "human", "value": "Thank you, that was very kind of you."},
    {"from": "gpt", "value": "<p></p>"},
]  # fmt: skip


def test_sharegpt_pages(tmp_path: Path) -> None:
    (tmp_path / "pages.json").write_text(json.dumps([{"id": "p1", "conversations": CHAT_PAGE}]))
    run(tmp_path, "source=sharegpt", f"source.path={tmp_path}/pages.json", "source.languages=en")
    (sample,) = lines(tmp_path / "sharegpt.jsonl")
    assert sample["id"] == "p1"
    assert [m["role"] for m in sample["messages"]] == ["user", "assistant"] * 2
    assert [m["content"] for m in sample["messages"]] == [
        CHAT_PAGE[0]["value"],
        "Use `<b>`:\n\n```html\n<b>bold</b>\n```",
        CHAT_PAGE[2]["value"],
        "```markdown\n**bold**\n```",
    ]
    reasons = [entry["reason"] for entry in lines(tmp_path / "sharegpt_dropped.jsonl")]
    assert reasons == ["empty turns left out", "unanswered last turn left out"]


def test_long_conversations_become_parts_that_fit_the_model(tmp_path: Path) -> None:
    from longalign.model.load import load_template

    talk = [{"from": who, "value": f"{who} {i} " + "word " * 20} for i in range(9) for who in ("human", "gpt")]
    jsonl(tmp_path / "long.jsonl", [{"conversations": talk}, {"id": "x", "conversations": talk[:2]}])
    words = [f"source.path={tmp_path}/long.jsonl", "source.max_tokens=200", "model=tiny", f"output_dir={tmp_path}"]
    run(tmp_path, "source=sharegpt", *words)
    *parts, short = lines(tmp_path / "sharegpt.jsonl")
    assert len(parts) > 1
    assert [(part["id"], part["part"]) for part in parts] == [("long.jsonl:1", n + 1) for n in range(len(parts))]
    assert [m["content"] for part in parts for m in part["messages"]] == [turn["value"] for turn in talk]
    assert short["id"] == "x"
    assert "part" not in short
    template = load_template(compose_config("prepare", ["source=sharegpt", *words]))
    assert all(len(row.input_ids) <= 200 for part in parts for row in template.rows(part["messages"]))
    manifest = json.loads((tmp_path / "sharegpt.json").read_text())
    assert (manifest["records_kept"], manifest["conversations_out"]) == (2, len(parts) + 1)
    assert manifest["changes"] == {"conversations cut into parts": 1}


def test_one_and_two_processes_write_the_same(tmp_path: Path) -> None:
    question = {"from": "human", "value": "words of a page " * 600}
    pages = [{"id": i, "conversations": [question, *CHAT_PAGE[1:]]} if i % 7 else {"id": i} for i in range(700)]
    jsonl(tmp_path / "pages.jsonl", pages)
    assert (tmp_path / "pages.jsonl").stat().st_size > 5 << 20, "several chunks"
    for n in (1, 2):
        run(tmp_path / str(n), "source=sharegpt", f"source.path={tmp_path}/pages.jsonl", f"num_proc={n}")
    for name in ("sharegpt.jsonl", "sharegpt_dropped.jsonl", "sharegpt.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert json.loads((tmp_path / "1" / "sharegpt.json").read_text())["dropped"] == {"no 'conversations'": 100}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"messages": [', "item 1 of the array is malformed or cut short"),
        ("a.json", b'{"messages": []}', "use .jsonl"),
        ("a.jsonl.gz", gzip.compress(as_text().encode(), mtime=0)[:60], "cannot be read"),
        ("a.parquet", b"PAR1 no more", "cannot be read"),
        ("a.csv", b'messages\n"[]"\n"x', "unexpected end of data .after row 1"),
        ("a.csv", b"messages\n\xff\xfe\n", "cannot be read"),
        ("a.csv", b"a,a\n1,2\n", "two columns are named 'a'"),
        ("a.jsonl", b"", "no conversation is left: there is no record"),
        (
            "a.jsonl",
            b'{"id": 1, "chat": []}\n{"a": 1}\n',
            "2 x no 'messages'; .*record 1, has 'id', 'chat'; source.format",
        ),
        ("a.txt", b"x", "unknown kind of file; one of .jsonl"),
    ],
)
def test_files_that_cannot_be_used(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", "source=files", f"source.path={tmp_path / name}")
    assert not list((tmp_path / "out").glob("*")), "nothing half-written stays"


def test_names_that_collide(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", RECORDS)
    jsonl(tmp_path / "b.jsonl", RECORDS)
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"would be overwritten by its own result; give source.output=NAME"):
        run(tmp_path, "source=files", f"source.path={file}", "overwrite=true")
    with pytest.raises(UserError, match="gives 2 files: name the one they become"):
        run(tmp_path / "out", "source=files", f"source.path={tmp_path}/*.jsonl")
    with pytest.raises(UserError, match="is a folder; give its files"):
        run(tmp_path / "out", "source=files", f"source.path={tmp_path}")
    with pytest.raises(UserError, match="no such folder"):
        run(tmp_path / "out", "source=hub", f"source.path={tmp_path}/none")
    words = ["source=files", f"source.path=[{file},{tmp_path}/b.jsonl]", "source.output=both"]
    told = describe(compose_config("prepare", [f"output_dir={tmp_path}/out", *words]))
    assert told[-3:] == [f"write {tmp_path}/out/{name}" for name in ("both.jsonl", "both_dropped.jsonl", "both.json")]
    assert not (tmp_path / "out").exists()
    run(tmp_path / "out", *words)
    with pytest.raises(UserError, match=r"both.jsonl exists already; overwrite=true"):
        run(tmp_path / "out", *words)
    run(tmp_path / "out", *words, "overwrite=true")
    assert lines(tmp_path / "out" / "both.jsonl") == RECORDS * 2
    assert file.read_bytes() == before


def test_a_failed_run_leaves_the_older_files(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", RECORDS)
    out = tmp_path / "out"
    run(out, "source=files", f"source.path={file}")
    before = {path: path.read_bytes() for path in out.iterdir()}
    jsonl(file, ["{"])
    with pytest.raises(UserError, match="malformed JSON"):
        run(out, "source=files", f"source.path={file}", "overwrite=true")
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupted_run_leaves_nothing(processes: int, tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "words of a page " * 600}, {"from": "gpt", "value": "yes"}] * 2
    file, out = jsonl(tmp_path / "a.jsonl", [{"conversations": talk}] * 15_000), tmp_path / "out"
    words = ["source=sharegpt", f"source.path={file}", f"output_dir={out}", f"num_proc={processes}"]
    command = [sys.executable, "-m", "longalign.cli", "prepare", *words]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not any(path.stat().st_size for path in out.glob("*.partial")):  # in the middle of its work
        assert child.poll() is None
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: the command and its worker processes
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert said.strip().endswith("interrupted")
    assert "Traceback" not in said, said
    assert list(out.iterdir()) == []
