"""Nothing is lost between raw files and the Arrow table, whatever is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import load_from_disk

from longalign.config import compose_config
from longalign.data.tokenize import choose, tokenize
from longalign.errors import UserError
from longalign.files import read_json
from tests.conftest import conversation, write_jsonl


def run(words: list[str], folder: Path, *more: str) -> dict:
    return tokenize(compose_config("tokenize", [*words, f"data_dir={folder}", *more]))


def test_table_and_manifest(data_dir: Path) -> None:
    table, manifest = load_from_disk(str(data_dir)), read_json(data_dir / "manifest.json")
    assert len(table) == manifest["samples"] == 27
    assert table["sample_id"][:] == list(range(27))
    for row in table:
        assert row["length"] == len(row["input_ids"]) == len(row["labels"]) <= 128
        assert row["n_target"] == sum(label != -100 for label in row["labels"]) > 0
        assert row["labels"][0] == -100
    assert max(table["length"]) == manifest["longest"] == 128, "a sample of exactly max_length stays whole"
    lines = sorted((r["source"], r["source_line"]) for r in table)
    assert lines == [("long", n) for n in range(1, 10)] + [("short", n) for n in range(1, 19)]
    assert [r["source"] for r in table] != sorted(r["source"] for r in table), "the order is mixed"
    assert manifest["tokens"] == sum(table["length"])
    assert manifest["model_shape"]["layers"] == 2


def test_bad_samples_are_counted_and_named(tmp_path: Path, base_words: list[str]) -> None:
    good = conversation(5, 3, 0)
    bad = {
        "malformed JSON": '{"messages": [',
        "no messages": {"messages": []},
        "unknown role 'bot'": {"messages": [{"role": "bot", "content": "x"}]},
        "half of a surrogate pair in the text": '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "x"}]}',
        "no target": {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]},
    }
    unanswered = {"messages": [*good["messages"], {"role": "user", "content": "more"}]}
    long = write_jsonl(tmp_path / "long.jsonl", [good, *bad.values(), unanswered])
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    manifest = run(base_words, tmp_path / "out", f"long_file={long}", f"short_file={empty}")
    ledger = manifest["ledger"]["long"]
    assert ledger["samples_in"] == 7
    assert ledger["changes"] == {"unanswered last turn left out": 1}
    assert ledger["rows_kept"] == 2
    assert ledger["dropped"] == dict.fromkeys(bad, 1)
    assert manifest["ledger"]["empty"]["samples_in"] == 0
    named = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    whole = named[:-1]
    assert [(n["line"], n["reason"]) for n in whole] == list(zip((2, 3, 4, 5, 6), bad, strict=True))
    assert not any(n["rest_kept"] for n in whole)
    assert named[-1] == {"file": str(long), "line": 7, "reason": "unanswered last turn left out", "rest_kept": True}
    assert all(n["file"] == str(long) for n in named)


def test_truncation_is_counted(tmp_path: Path, base_words: list[str]) -> None:
    long = write_jsonl(tmp_path / "long.jsonl", [conversation(20, 200, 0), conversation(5, 3, 0)])
    files = [f"long_file={long}", "short_file=null", "max_length=64"]
    ledger = run(base_words, tmp_path / "right", *files)["ledger"]["long"]
    assert ledger["truncated"] == 1
    assert ledger["tokens_in"] == ledger["tokens_kept"] + ledger["tokens_cut"]
    assert ledger["targets_in"] > ledger["targets_kept"] > 0
    dropped = run(base_words, tmp_path / "drop", *files, "truncate=drop")["ledger"]["long"]
    assert dropped["dropped"] == {"too long": 1}
    with pytest.raises(UserError, match=r"long\.jsonl:1 has \d+ tokens, max_length=64"):
        run(base_words, tmp_path / "error", *files, "truncate=error")
    assert not (tmp_path / "error").exists()


def test_datanum_is_seeded_and_nested() -> None:
    order = lambda *arguments, **kwargs: choose(50, *arguments, **kwargs).tolist()
    longs = lambda wanted, seed: {row for row in order(20, wanted, seed) if row < 50}
    assert len(longs(10, 1)) == 10
    assert longs(10, 1) < longs(30, 1)
    assert longs(10, 1) != longs(10, 2)
    assert order(20, 10, 1) == order(20, 10, 1) != sorted(order(20, 10, 1))
    assert len(longs(None, 1)) == 50
    assert order(3, 10, 1, shuffle=False) == [*sorted(longs(10, 1)), 50, 51, 52]
    assert sorted(order(20, 0, 1)) == list(range(50, 70))


def test_folders_in_the_way(tmp_path: Path, base_words: list[str]) -> None:
    files = [f"long_file={write_jsonl(tmp_path / 'long.jsonl', [conversation(5, 3, 0)])}", "short_file=null"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds something else"):
        run(base_words, tmp_path / "mine", *files, "overwrite=true")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    run(base_words, tmp_path / "out", *files)
    with pytest.raises(UserError, match="overwrite=true"):
        run(base_words, tmp_path / "out", *files)
    run(base_words, tmp_path / "out", *files, "overwrite=true")
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(UserError, match=r"holds something else \(notes\.md\)"):
        run(base_words, tmp_path / "out", *files, "overwrite=true")
    assert not list(tmp_path.glob("*.partial*"))


def test_absurd_records_are_dropped_like_others(tmp_path: Path, base_words: list[str]) -> None:
    rows = [conversation(5, 3, 0), "[" * 100_000, '{"messages": ' + "9" * 5000 + "}"]
    long = write_jsonl(tmp_path / "long.jsonl", rows)
    manifest = run(base_words, tmp_path / "out", f"long_file={long}", "short_file=null")
    assert manifest["ledger"]["long"]["dropped"] == {"malformed JSON": 2}


def test_files_of_one_name_are_refused(tmp_path: Path, base_words: list[str]) -> None:
    files = [write_jsonl(tmp_path / name / "part.jsonl", [conversation(5, 3, 0)]) for name in "ab"]
    with pytest.raises(UserError, match="two files are named part"):
        run(base_words, tmp_path / "out", f"long_file=[{files[0]},{files[1]}]", "short_file=null")


def test_a_turn_too_long_does_not_take_the_others_along(tmp_path: Path, base_words: list[str], model_dir: Path) -> None:
    """A template that rewrites history gives one row per answer: only those that fit no more are dropped."""
    import shutil

    from transformers import AutoTokenizer

    from tests.data.test_template import FORGETFUL

    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    made = AutoTokenizer.from_pretrained(model)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = FORGETFUL
    made.save_pretrained(model)
    turns = [
        *conversation(5, 3, 0)["messages"],
        *conversation(5, 3, 1)["messages"],
        *conversation(200, 3, 2)["messages"],
    ]
    long = write_jsonl(tmp_path / "long.jsonl", [{"messages": [dict(t, content=f"a|{t['content']}") for t in turns]}])
    words = [f"model.path={model}", "template=chat_template", f"long_file={long}", "short_file=null", "truncate=drop"]
    ledger = run(base_words, tmp_path / "out", *words)["ledger"]["long"]
    assert ledger["rows_kept"] == 2
    assert ledger["dropped"] == {"too long (one turn of several)": 1}


def test_nothing_usable(tmp_path: Path, base_words: list[str]) -> None:
    long = write_jsonl(tmp_path / "long.jsonl", [{"messages": []}] * 3)
    with pytest.raises(UserError, match="3 x no messages"):
        run(base_words, tmp_path / "out", f"long_file={long}", "short_file=null")
    with pytest.raises(UserError, match="both null"):
        run(base_words, tmp_path / "out", "long_file=null", "short_file=null")


def test_text_template_makes_every_token_a_target(tmp_path: Path, base_words: list[str]) -> None:
    rows = [{"text": "the river is near"}, {"messages": []}]
    long = write_jsonl(tmp_path / "text.jsonl", rows)
    manifest = run(base_words, tmp_path / "out", f"long_file={long}", "short_file=null", "template=text")
    row = load_from_disk(str(tmp_path / "out"))[0]
    assert row["labels"] == [-100, *row["input_ids"][1:]]
    assert manifest["ledger"]["text"]["dropped"] == {'no "text"': 1}


def test_full_disk_leaves_nothing_behind(
    tmp_path: Path, base_words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from longalign.data import tokenize as module

    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_arrow", full)
    files = [f"long_file={write_jsonl(tmp_path / 'long.jsonl', [conversation(5, 3, 0)])}", "short_file=null"]
    with pytest.raises(UserError, match=r"disk .* is full"):
        run(base_words, tmp_path / "out", *files)
    assert [p.name for p in tmp_path.iterdir()] == ["long.jsonl"]
