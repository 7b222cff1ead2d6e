"""What is asked can be found in the prompt by another reader, lengths are kept, and only answers count as answers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from longalign.config import compose_config
from longalign.data.messages import Messages
from longalign.data.template import Template
from longalign.errors import UserError
from longalign.evaluate import run as evaluation
from longalign.evaluate.question import CountTokens, Question
from longalign.evaluate.tasks import retrieval
from longalign.model.spm import chatglm_tokenizer
from tests.api_server import Api, completion
from tests.conftest import TINY

KINDS = ("single_key", "multi_key", "multi_value", "multi_query", "variable_tracking", "aggregation")
GLM = Path(__file__).parents[1] / "golden" / "chatglm_tokenizer" / "tokenizer.model"


# -- a reader that knows the wording and nothing of how prompts are made ----------------------------------------


def split(prompt: str) -> tuple[str, str]:
    """(document, question)"""
    _, *document, question, _ = prompt.split("\n\n")
    return "\n\n".join(document), question


def numbers_of(document: str) -> list[tuple[str, str]]:
    return re.findall(r"One of the secret numbers of the ([a-z ]+) is (\d+)\.", document)


def interpret(document: str) -> dict[str, str]:
    """The value of every variable, by running the assignments from the first to the last."""
    values: dict[str, str] = {}
    for name, of in re.findall(r"Let (\w+) = (\w+)\.", document):
        assert name not in values
        values[name] = of if of.isdigit() else values[of]
    return values


def solve(prompt: str) -> list[str]:
    document, question = split(prompt)
    if value := re.search(r"have the value (\d+)", question):
        return [name for name, its in interpret(document).items() if its == value[1]]
    if count := re.search(r"Which (\d+) words", question):
        return [word for word, _ in Counter(document.split()).most_common(int(count[1]))]
    asked = re.search(r"secret numbers? of (.*), as the text", question)
    assert asked
    keys = [key.removeprefix("the ") for key in asked[1].split(", ")]
    return [number for key in keys for owner, number in numbers_of(document) if owner == key]


# -- prompts ----------------------------------------------------------------------------------------------------


@cache
def counter(name: str) -> CountTokens:
    tiny = name == "tiny"
    tokenizer = AutoTokenizer.from_pretrained(TINY) if tiny else chatglm_tokenizer(GLM)
    template = Template("longalign-llama" if tiny else "longalign-chatglm", tokenizer)

    def count(what: str | Messages) -> int:
        if isinstance(what, str):
            return len(tokenizer(what, add_special_tokens=False)["input_ids"])
        return len(template.prompt_ids(what))

    return count


def asked(*words: str, seed: int = 0, count: CountTokens | None = None) -> list[Question]:
    config = compose_config("eval", ["task=retrieval", *(f"task.retrieval.{word}" for word in words)])
    assert config.task.retrieval is not None
    return retrieval.questions(config.task.retrieval, seed, count or counter("tiny"))


def prompt_of(question: Question) -> str:
    (message,) = question.messages
    return message["content"]


@pytest.mark.parametrize("tokenizer", ["tiny", "glm"])
def test_prompts_fill_the_length(tokenizer: str) -> None:
    """Also with a tokenizer that puts a token before a text of its own."""
    count = counter(tokenizer)
    found = asked("lengths=[1500,6000]", "samples=2", count=count)
    assert len({q.id for q in found}) == len(found) == 2 * 2 * 6
    for q in found:
        assert q.about["length"] - 35 < count(q.messages) <= q.about["length"], q.id
        assert sorted(solve(prompt_of(q))) == sorted(q.reference or []), q.id


def test_the_seed_decides() -> None:
    words = ("lengths=[700,900]", "samples=2")
    found = asked(*words)
    assert asked(*words) == found
    others = [prompt_of(q) for q in asked(*words, seed=1)]
    assert not {prompt_of(q) for q in found} & set(others)
    fewer = asked("lengths=[900]", "samples=1", "kinds=[aggregation,multi_value]")
    assert {q.id: q for q in found}.items() >= {q.id: q for q in fewer}.items(), "the rest of the grid changes nothing"


def test_no_text_is_counted_twice() -> None:
    """What makes prompts of 128k tokens quick to build: the kinds of a sample share sentences and their counts."""
    calls: Counter[str] = Counter()

    def count(what: str | Messages) -> int:
        if isinstance(what, str):
            calls[what] += 1
        return counter("tiny")(what)

    asked("lengths=[3000]", "samples=1", count=count)
    assert set(calls.values()) == {1}


@pytest.mark.parametrize("kind", KINDS[:4])
def test_numbers_stand_once_and_where_they_should(kind: str) -> None:
    words = ["lengths=[1200]", "samples=8", f"kinds=[{kind}]", "values=3", "queries=5", "keys=9"]
    stated = {"single_key": 1, "multi_key": 9, "multi_value": 3, "multi_query": 5}[kind]
    for q in asked(*words):
        document, _ = split(prompt_of(q))
        pairs = numbers_of(document)
        assert len(pairs) == len({number for _, number in pairs}) == stated
        assert len({key for key, _ in pairs}) == (1 if kind == "multi_value" else stated)
        assert len(q.reference or []) == (1 if kind == "multi_key" else stated)
        assert sorted(solve(prompt_of(q))) == sorted(q.reference or [])
        for wanted, depth in zip(q.reference or [], q.about["depths"], strict=True):
            assert prompt_of(q).count(wanted) == 1
            assert document.index(wanted) / len(document) == pytest.approx(depth, abs=0.1)


def test_depths_are_uniform() -> None:
    found = asked("lengths=[300]", "samples=80", "kinds=[single_key]")
    quarters = Counter(int(4 * depth) for q in found for depth in q.about["depths"])
    assert all(10 <= quarters[quarter] <= 30 for quarter in range(4)), quarters


def test_order_of_queries_is_that_of_the_reference() -> None:
    for q in asked("lengths=[900]", "samples=3", "kinds=[multi_query]"):
        assert solve(prompt_of(q)) == q.reference


def test_a_document_of_distractors() -> None:
    for q in asked("lengths=[3000]", "samples=3", "kinds=[multi_key]"):
        document, _ = split(prompt_of(q))
        pairs = numbers_of(document)
        assert len(pairs) == document.count(".") > 90, "nothing else"
        assert len(dict(pairs)) == len({number for _, number in pairs}) == len(pairs)
        assert solve(prompt_of(q)) == q.reference


@pytest.mark.parametrize(("chains", "hops"), [(1, 1), (2, 4), (5, 2)])
def test_variables_of_a_chain(chains: int, hops: int) -> None:
    for q in asked("lengths=[900]", "samples=4", "kinds=[variable_tracking]", f"chains={chains}", f"hops={hops}"):
        values = interpret(split(prompt_of(q))[0])
        assert Counter(Counter(values.values()).values()) == {hops + 1: chains}
        assert solve(prompt_of(q)) == q.reference, "in the order of assignment"


@pytest.mark.parametrize(("length", "words"), [(250, 1), (700, 5), (5000, 5), (3000, 10)])
def test_common_words_stand_out(length: int, words: int) -> None:
    for q in asked(f"lengths=[{length}]", "samples=3", "kinds=[aggregation]", f"words={words}"):
        counts = Counter(split(prompt_of(q))[0].split())
        wanted = [counts.pop(word) for word in q.reference or []]
        assert len(wanted) == words
        assert len(counts) >= 2 * words
        assert min(wanted) >= 5 * max(counts.values())
        assert min(counts.values()) >= 2


@pytest.mark.parametrize(
    ("kind", "lower"), [("single_key", ""), ("multi_value", ".*retrieval.values"), ("aggregation", ".*retrieval.words")]
)
def test_no_room_is_said(kind: str, lower: str) -> None:
    with pytest.raises(UserError, match=f"task.retrieval.lengths=60 has no room for what {kind} asks; raise it{lower}"):
        asked("lengths=[60]", "samples=1", f"kinds=[{kind}]")


def test_haystacks_and_prompts_of_the_users_own(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(f"This is {{key}} in the {name} one. " * 50)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "single_key.txt").write_text("Read.\n\n{document}\n\nGive the number of {key}.\n\nSo:")
    (tmp_path / "own" / "statement.txt").write_text("{key} has {value}, no less.")
    words = ["lengths=[500]", "samples=2", "kinds=[single_key,aggregation]", f"prompts={tmp_path}/own"]
    for q in asked(*words, f"haystack=[{tmp_path}/first,{tmp_path}/second]"):
        if q.about["kind"] == "single_key":
            found = re.search(r"([a-z ]+) has (\d{7}), no less\.", prompt_of(q))
            assert found
            assert q.reference == [found[2]]
            assert prompt_of(q).endswith(f"Give the number of {found[1].strip()}.\n\nSo:")
            used = "first" if q.id.endswith("/0") else "second"
            assert q.about["haystack"] == f"{tmp_path}/{used}"
            assert prompt_of(q).count(f"This is {{key}} in the {used} one.") > 10
        else:
            assert "haystack" not in q.about
    (tmp_path / "own" / "aggregation.txt").write_text("{document} Which?")
    with pytest.raises(UserError, match=r"task.retrieval.prompts=.*aggregation.txt must hold \{count\}"):
        asked(*words)
    with pytest.raises(UserError, match=r"task.retrieval.prompts=.*none is no folder"):
        asked(f"prompts={tmp_path}/none")


# -- scores -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "wanted", "answer", "score", "exact"),
    [
        ("single_key", ["1234567"], "1234567", 1, 1),
        ("single_key", ["1234567"], "The secret number of the amber falcon is **1234567**.", 1, 1),
        ("single_key", ["1234567"], "数字是1234567。", 1, 1),
        ("single_key", ["1234567"], "11234567 12345678 1234567a", 0, 0),
        ("single_key", ["1234567"], "1234567 or 7654321", 1, 0),
        ("single_key", ["1234567"], "1234567 " + "so " * 64, 1, 1),
        ("single_key", ["1234567"], "1234567 " + "so " * 65, 1, 0),
        ("single_key", ["1234567"], "", 0, 0),
        ("multi_value", ["1234567", "7654321"], "1. 7654321\n2. 1234567", 1, 1),
        ("multi_value", ["1234567", "7654321"], "7654321,7654321", 0.5, 0),
        ("multi_query", ["1234567", "7654321", "1111111", "2222222"], "1111111", 0.25, 0),
        ("variable_tracking", ["BCDFG", "XKRTP"], "bcdfg and Xkrtp.", 1, 1),
        ("variable_tracking", ["BCDFG", "XKRTP"], "BCDFG, XKRTP, QQQQQ", 1, 0),
        ("variable_tracking", ["BCDFG", "XKRTP"], "BCDFGH, XKRTP", 0.5, 0),
        ("aggregation", ["falcon", "river"], "The words are River and Falcon.", 1, 1),
        ("aggregation", ["falcon", "river"], "falcons, river", 0.5, 0),
        ("aggregation", ["falcon", "river"], "falcon, river, amber", 1, 0),
    ],
)
def test_scores(kind: str, wanted: list[str], answer: str, score: float, exact: float) -> None:
    question = Question("1", [], wanted, {"kind": kind}, 9)
    assert retrieval.score(question, answer, None) == {"score": score, "exact": exact}


def test_summary_counts() -> None:
    def row(length: int, kind: str, score: float | None) -> dict[str, Any]:
        return {"about": {"length": length, "kind": kind}, "scores": {"score": score, "exact": score and score // 1}}

    rows = [
        row(10, "single_key", 1),
        row(10, "aggregation", 0.5),
        row(20, "single_key", 0),
        row(20, "single_key", None),
    ]
    summary = retrieval.summarise(rows)
    assert summary["score"] == 0.5
    assert summary["exact"] == pytest.approx(1 / 3, abs=1e-4)
    assert summary["by_kind"]["single_key"] == {"score": 0.5, "questions": 3, "missing": 1}
    assert summary["by_length"]["10"]["score"] == 0.75
    assert summary["grid"] == {"10": {"aggregation": 0.5, "single_key": 1}, "20": {"single_key": 0}}


# -- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("say", "score", "exact"),
    [
        (lambda prompt: f"The answer: {', '.join(reversed(solve(prompt)))}.", 1, 1),
        (lambda prompt: prompt, 1, 0),
        (lambda prompt: "", 0, 0),
    ],
    ids=["oracle", "recital", "silence"],
)
def test_an_endpoint(
    say: Callable[[str], str], score: float, exact: float, api: Api, model_dir: Path, tmp_path: Path
) -> None:
    api.say = lambda prompt: completion(say(prompt))
    words = [f"model.endpoint={api.url}", "model=hf", "model.path=served", f"model.tokenizer={model_dir}"]
    words += ["task=retrieval", "task.retrieval.lengths=[700,900]", "task.retrieval.samples=1", "cluster=cpu"]
    assert evaluation.run(compose_config("eval", [*words, f"output_dir={tmp_path}"]), False) == 0
    results = json.loads((tmp_path / "results.json").read_text())["tasks"]["retrieval"]
    assert (results["score"], results["exact"], results["questions"]) == (score, exact, 12)
    assert set(results["by_kind"]) == set(KINDS)
    assert results["grid"]["900"] == dict.fromkeys(sorted(KINDS), score)
    assert len((tmp_path / "retrieval.jsonl").read_text().splitlines()) == 12
    assert (tmp_path / "retrieval.png").read_bytes().startswith(b"\x89PNG")
