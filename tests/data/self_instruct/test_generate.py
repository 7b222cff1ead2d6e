"""source=self_instruct end to end, against a server on this machine: what is written, asked, counted and paid for."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from longalign.commands import prepare
from longalign.config import compose_config, conf_dir
from longalign.data.messages import conversation
from longalign.data.self_instruct.pieces import TASKS
from longalign.errors import UserError
from tests.api_server import Api, completion, reader
from tests.conftest import TINY, WORDS

FILES = ("self_instruct.jsonl", "self_instruct_dropped.jsonl", "self_instruct.json")
QUICK = ["source.min_tokens=60", "source.max_tokens=150", "source.price_per_million.input=2"]


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Nine texts of one piece, one of several, a page in Chinese, a picture."""
    folder = tmp_path / "documents"
    folder.mkdir()
    rng = random.Random(0)
    say = lambda n: " ".join(rng.choice(WORDS) for _ in range(n))
    for n in range(9):
        (folder / f"{n}.txt").write_text(f"Text {n} {{question}}. {say(60)}")
    (folder / "long.md").write_text("\n\n".join(f"{say(50)}." for _ in range(6)))
    (folder / "zh.html").write_text("<p>" + "这是关于一条安静河流的故事。" * 3 + "</p>", encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    return folder


def words(api: Api, documents: Path, output: Path, *more: str) -> list[str]:
    where = [f"source.documents={documents}", f"source.base_url={api.url}", f"output_dir={output}"]
    return ["source=self_instruct", "model=tiny", "source.model=m", "source.api_key_env=null", *where, *QUICK, *more]


def run(api: Api, documents: Path, output: Path, *more: str, dry_run: bool = False) -> None:
    assert prepare(compose_config("prepare", words(api, documents, output, *more)), dry_run) == 0


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


# -- what is written ------------------------------------------------------------------------------------------


def test_samples_are_document_question_and_the_answer_to_them(api: Api, documents: Path, tmp_path: Path) -> None:
    run(api, documents, tmp_path / "out", "source.samples=40")
    samples = rows(tmp_path / "out" / "self_instruct.jsonl")
    assert len(samples) == 40
    count = AutoTokenizer.from_pretrained(TINY)
    prompts = {f.stem: f.read_text(encoding="utf-8").strip() for f in (conf_dir() / "prompts/self_instruct").iterdir()}
    drawn = Counter[int]()
    for sample in samples:
        user, assistant = sample["messages"]
        text, _, question = user["content"].rpartition("\n\n")
        file = documents / sample["document"]
        if file.suffix == ".html":
            assert sample["language"] == "zh"
            assert text == "这是关于一条安静河流的故事。" * 3
        else:
            assert sample["language"] == "en"
            assert text in file.read_text()
            assert text
            assert file.suffix == ".md" or text == file.read_text()
        tokens = len(count(text, add_special_tokens=False).input_ids)
        assert 60 <= tokens == sample["document_tokens"] <= 150
        asked = prompts[f"{sample['task']}.{sample['language']}"].replace("{document}", text)
        offered = reader(asked)["choices"][0]["message"]["content"].splitlines()
        (number,) = [n for n, line in enumerate(offered, 1) if line == f"{n}: {question}"]
        drawn[number] += 1
        before, after = prompts[f"answer.{sample['language']}"].split("{document}")
        answer = reader(before + text + after.replace("{question}", question))
        assert assistant["content"] == answer["choices"][0]["message"]["content"]
        assert conversation(sample)[0] == sample["messages"], "tokenize reads it"
    assert set(drawn) == {1, 2, 3, 4, 5}
    assert {sample["task"] for sample in samples} == set(TASKS)
    pieces = Counter((sample["document"], sample["piece"]) for sample in samples)
    assert max(pieces.values()) - min(pieces.values()) <= 1
    assert len(pieces) > 11, "long.md gives several"
    assert len(api.requests) == 80
    assert api.answered.most_common(1)[0][1] == 1
    manifest = json.loads((tmp_path / "out" / "self_instruct.json").read_text())
    assert manifest["samples"] == 40
    assert manifest["replies"] == 80
    assert (manifest["input_tokens"], manifest["output_tokens"]) == (800, 240)  # as the server says
    assert manifest["documents"]["left_out"]["unreadable"] == 1
    assert {"document": "picture.png", "reason": "unreadable", "detail": "not text"} in rows(
        tmp_path / "out" / "self_instruct_dropped.jsonl"
    )


def test_seed_and_length_weight_decide_what_is_asked(api: Api, documents: Path, tmp_path: Path) -> None:
    asked = []
    for n, more in enumerate([[], [], ["seed=7"], ["source.length_weight=10"]]):
        run(api, documents, tmp_path / str(n), "source.samples=3", f"source.cache={tmp_path}/cache", *more)
        asked.append([(s["document"], s["piece"], s["task"]) for s in rows(tmp_path / str(n) / FILES[0])])
    run(api, documents, tmp_path / "all", "source.samples=13")
    assert asked[0] == asked[1]
    assert asked[0] != asked[2]
    lengths = [s["document_tokens"] for s in rows(tmp_path / "all" / FILES[0])]
    longest = [s["document_tokens"] for s in rows(tmp_path / "3" / FILES[0])]
    assert min(longest) > statistics.median(lengths)


def test_own_prompts_are_asked(api: Api, documents: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    for task in TASKS:
        (tmp_path / "prompts" / f"{task}.en.txt").write_text('Look: {document} Ask as "1: " to "5: ", mate.')
    more = ["source.samples=4", f"source.prompts={tmp_path}/prompts", "source.languages=[en]"]
    run(api, documents, tmp_path / "out", *more)
    contents = [request["messages"][0]["content"] for request in api.requests]
    assert sum(c.startswith("Look: ") and c.endswith("mate.") for c in contents) == 4
    assert sum("in English. Rely on the text alone" in c for c in contents) == 4


# -- a server that misbehaves ---------------------------------------------------------------------------------


def test_faults_change_nothing(api: Api, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["source.samples=20", f"source.cache={tmp_path}/a"]
    run(api, documents, tmp_path / "good", *more)
    api.answered.clear()
    api.faults = [
        (429, "{}", {"Retry-After": "1"}),
        (500, "oops", {}),
        "slow",
        (200, '{"id": "1", "choices": [{"ind', {}),
        "cut",
        (502, "<html>", {"Content-Type": "text/html"}),
        (200, "<html>busy</html>", {"Content-Type": "text/html"}),
    ] * 2
    api.slow = 3
    run(api, documents, tmp_path / "bad", "source.samples=20", f"source.cache={tmp_path}/b", "source.timeout_s=2")
    assert api.faults == []
    assert set(api.answered.values()) == {1}
    for name in FILES[:2]:
        assert (tmp_path / "good" / name).read_bytes() == (tmp_path / "bad" / name).read_bytes()
    assert "40 replies paid for, 0 from the cache" in said(capsys)


def test_replies_of_no_use_are_counted_and_others_asked_instead(
    api: Api, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    useless = [
        (completion("I'm sorry, I cannot do that."), "refusal"),
        (completion(None, refusal="No."), "refusal"),
        (completion("Well: what? who?"), "unparsable"),
        (completion("1: a?\n2: b?\n3: c?"), "unparsable"),
        (completion("1: a?\n2: b", "length"), "reply cut at max_tokens"),
        (completion(None, "content_filter"), "content filter"),
        (completion("  "), "empty reply"),
    ]
    seen: list[str] = []
    expected = Counter[str]()

    def say(prompt: str) -> dict[str, Any]:
        asks = '"5: "' in prompt or "“5: ”" in prompt
        with api.lock:
            seen.append(prompt)
            number = len(seen)
            reply, reason = useless[number // 3 % len(useless)]
            if number % 3 or (reason == "unparsable" and not asks):
                return reader(prompt)
            expected[f"{'questions' if asks else 'answer'}: {reason}"] += 1
        return reply

    api.say = say
    run(api, documents, tmp_path / "out", "source.samples=20")
    samples, dropped = (rows(tmp_path / "out" / name) for name in FILES[:2])
    dropped = [row for row in dropped if "task" in row]
    manifest = json.loads((tmp_path / "out" / FILES[2]).read_text())
    assert len(samples) == 20
    assert Counter(row["reason"] for row in dropped) == expected == manifest["dropped"]
    assert {"questions: unparsable", "questions: refusal", "answer: refusal"} <= set(expected)
    assert len({(row["document"], row["piece"], row["task"]) for row in [*samples, *dropped]}) == 20 + len(dropped)
    assert "dropped, named in" in said(capsys)
    asked = len(api.requests)
    before = (tmp_path / "out" / FILES[0]).read_bytes()
    run(api, documents, tmp_path / "out", "source.samples=20", "overwrite=true")
    assert len(api.requests) == asked, "useless replies were paid for as well, and are kept"
    assert (tmp_path / "out" / FILES[0]).read_bytes() == before
    assert f"0 replies paid for, {asked} from the cache" in said(capsys)


def test_a_server_that_only_refuses(api: Api, documents: Path, tmp_path: Path) -> None:
    api.say = lambda _: completion("Sorry, no.")
    with pytest.raises(UserError, match=r"no candidate gave a sample \(\d+ questions: refusal\)"):
        run(api, documents, tmp_path / "out")
    dropped = [row for row in rows(tmp_path / "out" / FILES[1]) if "task" in row]
    assert len(dropped) == len(api.requests)
    assert not (tmp_path / "out" / FILES[0]).exists()


def test_a_server_that_is_broken_stops_the_run_and_keeps_what_was_paid(
    api: Api, documents: Path, tmp_path: Path
) -> None:
    run(api, documents, tmp_path / "whole", "source.samples=6")
    more = ["source.samples=6", "source.retries=0", "source.concurrency=1"]
    api.answered.clear()
    say = api.say

    def breaks(prompt: str) -> dict[str, Any]:
        if len(api.answered) == 4:
            api.faults = [(500, '{"error": {"message": "down"}}', {})] * 100
        return say(prompt)

    api.say = breaks
    with pytest.raises(UserError, match=r"5 requests in a row failed, the last one with: .*down"):
        run(api, documents, tmp_path / "out", *more)
    assert not (tmp_path / "out" / FILES[0]).exists()
    api.say, api.faults = say, []
    run(api, documents, tmp_path / "out", *more)
    assert set(api.answered.values()) == {1}
    assert (tmp_path / "out" / FILES[0]).read_bytes() == (tmp_path / "whole" / FILES[0]).read_bytes()


# -- money ----------------------------------------------------------------------------------------------------


def test_a_preview_asks_nothing(
    api: Api, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["source.samples=9", "source.price_per_million.input=1000", "source.price_per_million.output=7"]
    run(api, documents, tmp_path / "out", *more, "source.api_key_env=NO_SUCH_KEY", dry_run=True)
    assert api.requests == []
    assert not (tmp_path / "out").exists()
    text = said(capsys)
    assert "unreadable: picture.png: not text" in text
    assert "requests: 18 " in text
    (read,) = re.findall(r"input tokens: about ([\d,]+)", text)
    tokens = int(read.replace(",", ""))
    assert f"price: about {(tokens * 1000 + 9 * 500 * 7) / 1e6:,.2f}" in text
    run(api, documents, tmp_path / "out", *more)
    count = AutoTokenizer.from_pretrained(TINY)
    sent = [len(count(request["messages"][0]["content"]).input_ids) for request in api.requests]
    assert len(sent) == 18
    assert tokens == pytest.approx(sum(sent), rel=0.1), "the questions are not known beforehand"
    capsys.readouterr()
    run(api, documents, tmp_path / "out", "source.price_per_million.input=null", dry_run=True)
    assert "price: unknown; source.price_per_million.input" in said(capsys)


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_at_once_than_allowed(limit: int, api: Api, documents: Path, tmp_path: Path) -> None:
    api.delay = 0.05
    run(api, documents, tmp_path / "out", "source.samples=9", f"source.concurrency={limit}")
    assert len(api.requests) == 18
    assert api.peak == limit


def test_more_samples_than_candidates(
    api: Api, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(api, documents / "0.txt", tmp_path / "out", "source.samples=50")
    assert {sample["task"] for sample in rows(tmp_path / "out" / FILES[0])} == set(TASKS)
    assert "source.samples=50 wanted, but all 4 candidates are used" in said(capsys)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_never_pays_twice(
    api: Api, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed at once after 9 replies, interrupted after 31, run again: the files of a run that never stopped."""
    more = ["source.samples=24", "source.concurrency=4"]
    run(api, documents, tmp_path / "whole", *more)
    api.answered.clear()
    output, cache = tmp_path / "killed", tmp_path / "killed" / ".cache"

    def hold(replies: int) -> None:
        """Answer until the cache holds so many replies, then no more."""
        api.hold_after = len(api.requests) + replies - len(api.answered)

    def held(replies: int) -> bool:
        return len(list(cache.glob("*/*.json"))) == replies and api.now > 0

    def release() -> None:
        api.hold_after = None
        wait_until(lambda: api.now == 0)
        assert not (output / FILES[0]).exists()

    hold(9)
    command = [str(Path(sys.executable).with_name("longalign")), "prepare", *words(api, documents, output, *more)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: held(9) or process.poll() is not None)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    release()

    hold(31)
    interrupt = lambda: (wait_until(lambda: held(31)), os.kill(os.getpid(), signal.SIGINT))
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run(api, documents, output, *more)
    thread.join()
    assert "the same command goes on from there" in said(capsys)
    release()

    run(api, documents, output, *more)
    assert "17 replies paid for, 31 from the cache" in said(capsys)
    assert len(api.answered) == 48
    assert set(api.answered.values()) == {1}
    for name in FILES:
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# -- mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["source.length_weight=11"], "source.length_weight=11 is not allowed"),
        (["source.documents=nowhere"], "source.documents=nowhere: no such folder or file"),
        (["source.min_tokens=200"], "source.max_tokens of at least source.min_tokens=200"),
        (["source.min_tokens=149"], "source.min_tokens=149 decides what is too short"),
        (["source.prompts=nowhere"], "source.prompts=nowhere: no .txt file there"),
        (["source.api_key_env=NO_SUCH_KEY"], "source.api_key_env=NO_SUCH_KEY: this environment variable holds no key"),
        (["source.base_url=localhost"], "source.base_url='localhost'"),
        (["output_dir={documents}/out"], "what is written would be read"),
        (["source.cache={documents}/cache"], "what is written would be read"),
        (["output_dir={done}"], "exists already; overwrite=true replaces it"),
    ],
)
def test_mistakes_are_told_and_nothing_is_asked(
    more: list[str], told: str, api: Api, documents: Path, tmp_path: Path
) -> None:
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / FILES[0]).write_text("")
    with pytest.raises(UserError) as error:
        run(api, documents, tmp_path / "out", *(w.format(documents=documents, done=tmp_path / "done") for w in more))
    assert told in str(error.value)
    assert api.requests == []
