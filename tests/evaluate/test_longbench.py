"""LongBench by its own metrics and by a judge, in this process and behind an API."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longalign.config import compose_config
from longalign.errors import UserError
from longalign.evaluate import run as evaluation
from longalign.evaluate.generate import Generator
from longalign.evaluate.metrics import f1, rouge_l
from tests.api_server import Api, completion
from tests.conftest import write_jsonl

QASPER = [
    {"_id": "a", "input": "what is golden", "context": "the river is golden. " * 9, "answers": ["the River!", "mill"]},
    {"input": "what is of amber", "context": "falcon </s> [[3]] {input} " * 4, "answers": ["unanswerable"]},
]
QMSUM = [{"_id": "m", "input": "sum up", "context": "the mill keeps the lantern. " * 9, "answers": ["a b c. d e"]}]


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The river.", "a river", 1),
        ("river river", "river", 2 / 3),
        ("the quiet river", "river mill", 1 / 2),
        ("mill", "river", 0),
        ("", "river", 0),
        ("the", "a", 0),
    ],
)
def test_f1(answer: str, reference: str, expected: float) -> None:
    assert f1(answer, reference, "en") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [  # of rouge 1.0.1, which LongBench uses
        (
            "falcon the keeps is golden. falcon keeps golden. amber of river. is mill .",
            "a of keeps is dog",
            0.428571424,
        ),
        ("of falcon amber", "amber of falcon", 2 / 3),
        ("a. b", "b. a", 1.0),
        ("a b a b", "a b", 1.0),
        ("a cat, mill", "a dog", 0.399999995),
        ("is a falcon", "mill", 0),
        ("", "mill", 0),
        (".", "mill", 0),
    ],
)
def test_rouge_l(answer: str, reference: str, expected: float) -> None:
    assert rouge_l(answer, reference, "en") == pytest.approx(expected, abs=1e-6)


def test_chinese() -> None:
    pytest.importorskip("jieba")
    # jieba's own example: 我 / 来到 / 北京 / 清华大学
    assert f1("我来到 北京。", "我来到北京清华大学", "zh") == pytest.approx(2 * 3 / (3 + 4))
    assert rouge_l("金色的河", "金色的河", "zh") == pytest.approx(1)
    assert f1("河", "山", "zh") == 0


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api(say=lambda prompt: completion("The river." if "what is golden" in prompt else "a b c", "length"))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def words(api: Api, model_dir: Path, tmp_path: Path) -> list[str]:
    write_jsonl(tmp_path / "qasper.jsonl", QASPER)
    write_jsonl(tmp_path / "qmsum.jsonl", QMSUM)
    return [
        "model=hf",
        "model.path=served",
        f"model.tokenizer={model_dir}",
        f"model.endpoint={api.url}",
        "endpoint.retries=0",
        "cluster=cpu",
        "task=longbench",
        f"task.longbench.path={tmp_path}",
        "task.longbench.datasets=[qasper,qmsum]",
        f"output_dir={tmp_path}/out",
    ]


def evaluate(words: list[str], tmp_path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    assert evaluation.run(compose_config("eval", words), False) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "longbench.jsonl").read_text().split("\n") if line]
    return json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["longbench"], rows


def test_an_endpoint_scored_by_program(words: list[str], api: Api, tmp_path: Path) -> None:
    results, rows = evaluate(words, tmp_path)
    assert [row["id"] for row in rows] == ["qasper/a", "qasper/2", "qmsum/m"]
    assert [row["scores"]["score"] for row in rows] == [100, 0, 75]
    assert {row["finish"] for row in rows} == {"length"}, "an answer that reached the limit is an answer"
    assert {group: found["score"] for group, found in results["by_group"].items()} == {
        "single_doc_qa": 50,
        "summarization": 75,
    }
    assert results["score"] == 62.5, "datasets count alike"
    assert {request["model"] for request in api.requests} == {"served"}
    assert sorted(request["max_tokens"] for request in api.requests) == [512, 512, 1024]
    asked = next(r for r in api.requests if "what is of amber" in r["messages"][0]["content"])
    assert QASPER[1]["context"] in asked["messages"][0]["content"], "a document is left as it is"
    assert evaluate(words, tmp_path) == (results, rows)
    assert len(api.requests) == 3


def test_an_endpoint_with_faults(words: list[str], api: Api, tmp_path: Path) -> None:
    api.faults = [(400, json.dumps({"error": {"message": "maximum context length"}}), {})]
    results, rows = evaluate([*words, "endpoint.concurrency=1"], tmp_path)
    assert rows[0]["answer"] is None
    assert "maximum context length" in rows[0]["finish"]
    assert results["failed"] == results["missing"] == 1
    assert results["by_dataset"]["qasper"]["score"] == 0, "of the one that was answered"
    results, rows = evaluate(words, tmp_path)
    assert (results["failed"], results["score"]) == (0, 62.5)
    shutil.rmtree(tmp_path / "out")
    api.faults = [(200, json.dumps(completion(None)), {})]
    results, rows = evaluate([*words, "endpoint.concurrency=1"], tmp_path)
    assert (rows[0]["answer"], rows[0]["scores"]["score"], results["empty"]) == ("", 0, 1)


def test_prompts_over_an_endpoints_context_are_cut(words: list[str], api: Api, tmp_path: Path) -> None:
    tight = [*words, "generation.context=200", "task.longbench.max_new_tokens={qa: 16, summary: 16}"]
    results, _ = evaluate(tight, tmp_path)
    assert results["prompts_cut"] > 0
    assert all(
        "what is" in r["messages"][0]["content"] or "sum up" in r["messages"][0]["content"] for r in api.requests
    )


def test_a_judge_of_answers_and_summaries(words: list[str], api: Api, tmp_path: Path) -> None:
    def say(prompt: str) -> dict[str, Any]:
        if "Assistant's answer:" in prompt:
            assert "the River!\nmill" in prompt or "unanswerable" in prompt
            return completion("[[2]]")
        return completion("[[5]]") if "Assistant's summary:" in prompt else completion("a b c")

    api.say = say
    judge = ["judge=local", "judge.model=j", f"judge.base_url={api.url}", "judge.repeats=3"]
    results, rows = evaluate([*words, *judge], tmp_path)
    assert [row["scores"]["score"] for row in rows] == [pytest.approx(66.6667, abs=1e-3)] * 2 + [100]
    assert [verdict["rating"] for verdict in rows[0]["verdicts"]] == [2, 2, 2]
    assert results["by_dataset"]["qmsum"]["program"] == 75
    assert len([r for r in api.requests if r["model"] == "j"]) == 9, "every repeat is asked"
    evaluate([*words, *judge, "judge.attempts=5"], tmp_path)
    assert len([r for r in api.requests if r["model"] == "j"]) == 9, "and kept"


def test_the_benchmarks_own_prompts(words: list[str], api: Api, tmp_path: Path) -> None:
    own = {"qasper": "Q {input} A {context}", "qmsum": "{context} S {input}"}
    (tmp_path / "dataset2prompt.json").write_text(json.dumps(own))
    evaluate([*words, f"task.longbench.prompts={tmp_path}/dataset2prompt.json"], tmp_path)
    assert f"Q what is golden A {QASPER[0]['context']}" in [r["messages"][0]["content"] for r in api.requests]
    with pytest.raises(UserError, match="holds no prompt of musique"):
        evaluate(
            [*words, f"task.longbench.prompts={tmp_path}/dataset2prompt.json", "task.longbench.datasets=[musique]"],
            tmp_path,
        )


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"input": "x"', "line 1 is no JSON"),
        ("[]", "line 1 is no object"),
        ('{"input": "x", "answers": ["y"]}', "line 1 has no text in 'context'"),
        ('{"input": "x", "context": "y", "answers": []}', "line 1 has no list of texts in 'answers'"),
        ("", "is empty"),
    ],
)
def test_files_with_faults(row: str, told: str, words: list[str], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "qasper.jsonl", [row])
    with pytest.raises(UserError, match=f"qasper.jsonl.*{told}"):
        evaluate(words, tmp_path)
    with pytest.raises(UserError, match=r"datasets=qaspr: no such dataset; did you mean 'qasper'"):
        evaluate([*words, "task.longbench.datasets=[qaspr]"], tmp_path)


@pytest.mark.parametrize("changes", [["generation.prefill_chunk_size=7"], ["generation.prefill_chunk_size=64"]])
def test_chunked_prefill_answers_as_whole_prefill_does(changes: list[str], model_dir: Path) -> None:
    """Also in batches, where whole chunks of a short prompt are padding."""
    words = ["model=hf", f"model.path={model_dir}", "template=longalign-llama", "cluster=cpu"]
    whole = Generator(compose_config("eval", [*words, "generation.prefill_chunk_size=null"]))
    chunked = Generator(compose_config("eval", [*words, *changes]))
    prompts = [
        whole.prompt_ids([{"role": "user", "content": "the quiet river keeps amber " * n}]) for n in (40, 1, 10, 23)
    ]
    alone = [whole.generate([prompt], 12)[0] for prompt in prompts]
    assert chunked.generate(prompts, 12) == alone
    assert [chunked.generate([prompt], 12)[0] for prompt in prompts] == alone
    assert len({tuple(ids) for ids in alone}) == 4
