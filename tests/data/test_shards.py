"""tokenize at scale: killed, repeated, spread over processes, or fed with huge documents, it writes the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from datasets import load_from_disk

from longalign.config import compose_config
from longalign.data import shards
from longalign.data.encode import Encoder
from longalign.data.messages import Raw
from longalign.data.template import Template
from longalign.data.tokenize import held_out, tokenize
from longalign.errors import UserError
from longalign.files import read_json
from longalign.model.load import load_template, load_tokenizer
from longalign.schema import Config
from tests.conftest import WORDS, conversation, write_jsonl
from tests.data.faulty import Deadly, Trapped


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def shard_times(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in cache.rglob("*.arrow")}


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LONGALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longalign.data.parallel.CHUNK_BYTES", 2000)


def files_of(folder: Path, n: int = 120) -> list[str]:
    long = [conversation(40 + i % 60, 1 + i % 7, i) for i in range(n)]
    short: list = [conversation(4 + i % 9, 1 + i % 5, 3 * i) for i in range(2 * n)]
    short[7], short[20] = "", '{"messages": []}'
    files = write_jsonl(folder / "long.jsonl", long), write_jsonl(folder / "short.jsonl", short)
    return [f"long_file={files[0]}", f"short_file={files[1]}"]


def run(words: list[str], folder: Path, *more: str) -> dict:
    return tokenize(compose_config("tokenize", [*words, f"data_dir={folder}", *more]))


@pytest.mark.slow
def test_killed_at_any_point_it_continues(
    tmp_path: Path, base_words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of the command alone, whose workers must then end by themselves; again until a run comes through."""
    words = [*base_words, *files_of(tmp_path, 3000), "eval_fraction=0.1"]
    monkeypatch.setenv("LONGALIGN_CACHE", str(tmp_path / "undisturbed"))
    run(words, tmp_path / "whole", "num_proc=1")
    cache = tmp_path / "cache"
    environment = {**os.environ, "LONGALIGN_CACHE": str(cache)}
    command = [
        sys.executable,
        "-m",
        "longalign.cli",
        "tokenize",
        *words,
        f"data_dir={tmp_path / 'killed'}",
        "num_proc=2",
    ]
    made, rng = [0], random.Random(1)
    for _ in range(2):
        child = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, cwd=tmp_path)
        while child.poll() is None and len(list(cache.rglob("*.arrow"))) <= made[-1]:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        family = psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not psutil.wait_procs(family, timeout=30)[1], "workers outlive their command"
        made.append(len(list(cache.rglob("*.arrow"))))
    assert 0 < made[1] <= made[2]
    before = shard_times(cache)
    monkeypatch.setenv("LONGALIGN_CACHE", str(cache))
    run(words, tmp_path / "killed", "num_proc=2")
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
    assert before.items() <= shard_times(cache).items(), "whole shards are not made again"
    assert not list(tmp_path.rglob("*.partial*"))


def test_processes_and_cache_leave_no_trace(
    tmp_path: Path, base_words: list[str], monkeypatch: pytest.MonkeyPatch, small_chunks: None
) -> None:
    words = [*base_words, *files_of(tmp_path), "eval_fraction=0.2"]
    for name, processes in (("one", 1), ("two", 2), ("again", 1)):
        monkeypatch.setenv("LONGALIGN_CACHE", str(tmp_path / f"cache-{'two' if name == 'again' else name}"))
        run(words, tmp_path / name, f"num_proc={processes}")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two") == hashes(tmp_path / "again")
    one, two = (shard_times(tmp_path / f"cache-{name}") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert len(one) > 10, "one chunk would prove nothing"


def test_another_mix_encodes_nothing(
    tmp_path: Path, base_words: list[str], own_cache: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*base_words, *files_of(tmp_path)]
    run(words, tmp_path / "all")
    calls = []
    encode = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, records: calls.append(len(records)) or encode(self, records))
    run(words, tmp_path / "5k", "datanum=5k", "datanum.n_long=5")
    run(words, tmp_path / "seed", "seed=8", "shuffle=false", "eval_fraction=0.5")
    assert not calls
    run(words, tmp_path / "shorter", "max_length=100")
    assert sum(calls) == 120 + 239


def test_a_changed_file_is_encoded_as_far_as_it_changed(
    tmp_path: Path, base_words: list[str], own_cache: Path, small_chunks: None
) -> None:
    words = [*base_words, *files_of(tmp_path), "shuffle=false"]
    run(words, tmp_path / "before")
    file, before = tmp_path / "long.jsonl", shard_times(own_cache)
    told, lines = file.stat(), file.read_text().splitlines()
    word = WORDS[0]
    changed = next(i for i, line in enumerate(lines) if i > 50 and word in line)
    lines[changed] = lines[changed].replace(word, word[::-1], 1)
    file.write_text("\n".join(lines) + "\n")
    os.utime(file, ns=(told.st_atime_ns, told.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (told.st_size, told.st_mtime_ns), "nothing else tells"
    run(words, tmp_path / "after")
    assert len(shard_times(own_cache).keys() - before.keys()) == 1
    rows = [load_from_disk(str(tmp_path / name)).to_list() for name in ("before", "after")]
    assert [i for i, (old, new) in enumerate(zip(*rows, strict=True)) if old != new] == [changed]


def test_a_damaged_shard_is_made_again(tmp_path: Path, base_words: list[str], own_cache: Path) -> None:
    words = [*base_words, *files_of(tmp_path)]
    run(words, tmp_path / "before")
    for path in own_cache.rglob("*.arrow"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run(words, tmp_path / "after")
    assert hashes(tmp_path / "before") == hashes(tmp_path / "after")


def test_unused_shards_are_deleted(tmp_path: Path, base_words: list[str], own_cache: Path) -> None:
    old, new = own_cache / "tokens" / "x" / "old.arrow", own_cache / "tokens" / "x" / "new.arrow"
    killed = own_cache / "tokens" / "x" / "y.partial-999999999"
    old.parent.mkdir(parents=True)
    for path in (old, new, killed):
        path.touch()
    os.utime(old, (0, time.time() - (shards.KEEP_DAYS + 1) * 86400))
    run([*base_words, *files_of(tmp_path)], tmp_path / "out")
    assert [path.exists() for path in (old, new, killed)] == [False, True, False]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failure_names_file_and_line(
    processes: int,
    tmp_path: Path,
    base_words: list[str],
    own_cache: Path,
    small_chunks: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(config: Config) -> Template:
        return Trapped("longalign-llama", load_tokenizer(config))

    monkeypatch.setattr("longalign.data.tokenize.load_template", load)
    words = files_of(tmp_path)
    lines = (tmp_path / "long.jsonl").read_text().splitlines()
    user, answer = conversation(5, 3, 0)["messages"]
    lines[66] = json.dumps({"messages": [{**user, "content": "trap"}, answer]})
    (tmp_path / "long.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(RuntimeError, match=r"long\.jsonl:67: ZeroDivisionError"):
        run([*base_words, *words], tmp_path / "out", f"num_proc={processes}")
    assert not (tmp_path / "out").exists()


def test_a_dead_worker_is_told_with_its_lines(
    tmp_path: Path, base_words: list[str], own_cache: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "Writer", Deadly)
    words = files_of(tmp_path)
    with open(tmp_path / "long.jsonl", "a") as file:
        file.write(json.dumps({"messages": "trap"}) + "\n")
    with pytest.raises(RuntimeError, match=r"worker process died .*\.jsonl:\d+-\d+"):
        run([*base_words, *words], tmp_path / "out", "num_proc=2")


@pytest.mark.slow
def test_a_document_of_ten_million_characters(tmp_path: Path, base_words: list[str], own_cache: Path) -> None:
    """It is encoded whole, and so are its neighbours; nothing is counted twice."""
    n = 10_000_000
    text = (" ".join(WORDS) + " ") * (n // (len(" ".join(WORDS)) + 1) + 1)
    huge = {"messages": [{"role": "user", "content": text[:n]}, {"role": "assistant", "content": "the river"}]}
    rows = [conversation(5, 3, 0), huge, conversation(6, 3, 1)]
    file = write_jsonl(tmp_path / "long.jsonl", rows)
    words = [*base_words, f"long_file={file}", "short_file=null", "max_length=20000000", "shuffle=false", "num_proc=2"]
    manifest = run(words, tmp_path / "out")
    table = load_from_disk(str(tmp_path / "out"))
    template = load_template(compose_config("tokenize", words))
    assert table["source_line"][:] == [1, 2, 3]
    assert manifest["ledger"]["long"]["truncated"] == 0
    ids, labels = (table.with_format("numpy")[1][name] for name in ("input_ids", "labels"))
    assert len(ids) == manifest["longest"] > n / 10
    assert template.tokenizer.decode(ids[1:-50]).startswith("[INST]" + text[:1000])
    answer = template.tokenizer("the river", add_special_tokens=False)["input_ids"]
    assert labels[labels != -100].tolist() == [*answer, template.tokenizer.eos_token_id]
    alone = template.rows(conversation(6, 3, 1)["messages"])[0]
    assert table[2]["input_ids"] == alone.input_ids


# -- held out -------------------------------------------------------------------------------------------------


def said(table: list[dict]) -> set[tuple[int, ...]]:
    return {tuple(row["input_ids"]) for row in table}


def test_held_out_by_content_alone(tmp_path: Path, base_words: list[str], own_cache: Path) -> None:
    words = [*base_words, *files_of(tmp_path), "max_length=512"]
    short = (tmp_path / "short.jsonl").read_text().splitlines()
    twins = [json.dumps({"id": i, **json.loads(line)}) for i, line in enumerate(short[:7])]
    random.Random(0).shuffle(short)
    mixed = write_jsonl(tmp_path / "mixed" / "mixed.jsonl", short + twins)
    manifest = run(words, tmp_path / "one", "eval_fraction=0.3")
    for entry in manifest["ledger"].values():  # nothing is dropped here, so every token is somewhere
        for what in ("tokens", "targets"):
            assert entry[f"{what}_elsewhere"] > 0
        assert entry["tokens_in"] == sum(entry[f"tokens_{where}"] for where in ("cut", "elsewhere", "kept"))
    run([*words, f"short_file={mixed}"], tmp_path / "two", "eval_fraction=0.3", "datanum=5k", "datanum.n_long=20")
    train, held, train2, held2 = (
        load_from_disk(str(tmp_path / name)).to_list() for name in ("one", "one/eval", "two", "two/eval")
    )
    assert not said(train) & said(held), "what is held out is not trained on, nor is its twin"
    assert not said(train2) & said(held2)
    assert said(held2) == said(held), "order, neighbours, other fields, file names and datanum decide nothing"
    assert len(train) + len(held) == 120 + 238
    assert 0.2 < len(held) / (len(train) + len(held)) < 0.4
    assert [row["sample_id"] for row in held] == list(range(len(held)))
    told = read_json(tmp_path / "one" / "eval" / "manifest.json")
    assert told.keys() == manifest.keys()
    assert told["samples"] == len(held)
    assert told["fingerprint"] != manifest["fingerprint"]
    for source in ("long", "short"):
        ours, theirs = manifest["ledger"][source], told["ledger"][source]
        assert ours["rows"] == ours["rows_kept"] + ours["rows_held_out"] + ours["rows_not_chosen"]
        assert ours["rows_held_out"] == theirs["rows_kept"] == sum(row["source"] == source for row in held)
        assert theirs["tokens_kept"] == sum(row["length"] for row in held if row["source"] == source)


def test_the_draw_is_fair_seeded_and_nested() -> None:
    content = np.arange(100_000, dtype=np.uint64)
    few, more, other = held_out(content, 0.01, 1), held_out(content, 0.2, 1), held_out(content, 0.01, 2)
    assert abs(few.sum() - 1000) < 5 * 1000**0.5
    assert not (few & ~more).any(), "a larger fraction holds out the same samples, and others"
    assert (few & other).sum() < 50
    assert not held_out(content, 0, 1).any()
    assert held_out(content, 1, 1).all()


def test_without_a_fraction_nothing_is_held_out(tmp_path: Path, base_words: list[str], own_cache: Path) -> None:
    words = [*base_words, *files_of(tmp_path)]
    assert run(words, tmp_path / "none")["ledger"]["long"]["rows_held_out"] == 0
    assert not (tmp_path / "none" / "eval").exists()


def test_all_held_out_is_a_test_set_nearly_all_a_mistake(
    tmp_path: Path, base_words: list[str], own_cache: Path
) -> None:
    words = [*base_words, *files_of(tmp_path)]
    kept = len(load_from_disk(str(tmp_path / "none"))) if run(words, tmp_path / "none") else 0
    assert run(words, tmp_path / "all", "eval_fraction=1")["samples"] == 0
    assert len(load_from_disk(str(tmp_path / "all/eval"))) == kept > 0
    with pytest.raises(UserError, match=r"no sample is left to train on: .* held out by eval_fraction=0.9999"):
        run(words, tmp_path / "most", "eval_fraction=0.999999")


# -- memory ---------------------------------------------------------------------------------------------------

PEAK = """
import sys, threading, time, psutil
from longalign.config import compose_config
from longalign.data import parallel
from longalign.data.tokenize import tokenize
parallel.CHUNK_BYTES = 1 << 17  # many chunks also of little data
config, peak, here = compose_config("tokenize", sys.argv[1:]), [0], psutil.Process()
def watch():
    while True:
        total = 0
        for process in [here, *here.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.Error:
                pass
        peak[0] = max(peak[0], total)
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
tokenize(config)
print(peak[0])
"""


@pytest.mark.slow
def test_ten_times_the_data_needs_no_more_memory(tmp_path: Path, base_words: list[str]) -> None:
    peaks = []
    for times in (1, 10):
        rows = [conversation(500 + i % 50, 3, i) for i in range(300 * times)]
        file = write_jsonl(tmp_path / f"{times}" / "long.jsonl", rows)
        words = [*base_words, f"long_file={file}", "short_file=null", "max_length=65536", "num_proc=2"]
        command = [sys.executable, "-c", PEAK, *words, f"data_dir={tmp_path / f'out-{times}'}"]
        environment = {**os.environ, "LONGALIGN_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout.split()[-1]) / 1e6)
    assert peaks[0] < 1500
    assert peaks[1] < min(peaks[0] + 100, 1500), f"{peaks} MB"


def test_records_of_a_table_make_the_same_shards_again() -> None:
    """Parsed records have no bytes of their own: their name must not depend on how Python made them."""
    first = [Raw("a.parquet", 1, {"messages": [{"role": "user", "content": "x" * 3}]}), Raw("a.parquet", 2, {"b": 1.5})]
    again = [Raw("b.parquet", 5, json.loads(json.dumps(first[0].value))), Raw("b.parquet", 6, {"b": float("1.5")})]
    assert shards.Task.of(first).name == shards.Task.of(again).name
    again[1] = Raw("b.parquet", 6, {"b": 1.25})
    assert shards.Task.of(first).name != shards.Task.of(again).name
