"""LongBench-Chat from made-up cases to results: what the judge is told, how it is read, and what faults may not change."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longalign.config import compose_config
from longalign.errors import UserError
from longalign.evaluate import run as evaluation
from longalign.evaluate.answers import Answers
from longalign.evaluate.generate import Generator
from longalign.evaluate.judge import parse_rating
from tests.api_server import Api, completion

LOOK_ALIKE = "the </s> river <|im_end|> keeps {answer} amber [[9]]"
CASES = [
    {"idx": 1, "prompt": "the quiet river " * 20, "query": "what is the river", "answer": "quiet"},
    {"idx": 2, "prompt": LOOK_ALIKE, "query": "what {answer} is {question}", "answer": "{reference} amber"},
    {"idx": 3, "prompt": "what is golden 什么", "query": "什么是金色的", "answer": "河"},
    {"idx": 4, "prompt": "golden mill " * 400 + "what is of the lantern", "query": "what is it", "answer": "near"},
]
EXAMPLES = [[{"answer": f"example {n} of {idx}", "score": 3 * n} for n in (1, 2, 3)] for idx in (1, 2, 3, 4)]


def rate(prompt: str) -> dict[str, Any]:
    """A judge that rates by the words of the answer alone."""
    answer = prompt.rpartition("[The assistant's answer begins]\n")[2].partition("\n[The assistant's")[0]
    return completion(f"Good. [[{len(answer) % 10 + 1}]]")


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api(say=rate)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def words(api: Api, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("JUDGE_KEY", "sk-sesame")
    (tmp_path / "test_cases.json").write_text(json.dumps(CASES, ensure_ascii=False))
    (tmp_path / "few_shots.json").write_text(json.dumps(EXAMPLES))
    return [
        "model=hf",
        f"model.path={model_dir}",
        "template=longalign-llama",
        "cluster=cpu",
        "task=longbench_chat",
        f"task.longbench_chat.cases={tmp_path}/test_cases.json",
        f"task.longbench_chat.few_shots={tmp_path}/few_shots.json",
        "task.longbench_chat.max_new_tokens=8",
        "generation.batch_tokens=300",
        "judge=openai",
        "judge.model=m-2024-01-01",
        f"judge.base_url={api.url}",
        "judge.api_key_env=JUDGE_KEY",
        "judge.retries=0",
        "judge.timeout_s=5",
        f"output_dir={tmp_path}/out",
    ]


def evaluate(words: list[str], tmp_path: Path, dry_run: bool = False) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    assert evaluation.run(compose_config("eval", words), dry_run) == 0
    text = (tmp_path / "out" / "longbench_chat.jsonl").read_text()
    rows = [json.loads(line) for line in text.split("\n") if line]
    return json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["longbench_chat"], rows


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("[[5]]", 5),
        ("Rating: [[ 10 ]]", 10),
        ("As asked for by [[rating]]: [[7]]", 7),
        ("[[7]], that is [[7]]", 7),
        ("between [[6]] and [[7]]", None),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[7.5]]", None),
        ("[[7/10]]", None),
        ("[[-7]]", None),
        ("[[٧]]", None),
        ("7", None),
        ("[7]", None),
        ("", None),
        ("[[" + "1" * 5000 + "]]", None),
    ],
)
def test_ratings(reply: str, rating: int | None) -> None:
    assert parse_rating(reply, range(1, 11)) == rating


def test_from_cases_to_results(words: list[str], api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, rows = evaluate(words, tmp_path)
    assert [row["id"] for row in rows] == ["1", "2", "3", "4"]
    expected = [len(row["answer"].strip("\n")) % 10 + 1 for row in rows]
    assert [row["scores"]["score"] for row in rows] == expected, "no answer is flattened on its way to the judge"
    assert results["score"] == pytest.approx(sum(expected) / 4, abs=1e-3)
    assert results["by_language"]["zh"] == {"score": expected[2], "questions": 1, "missing": 0}
    assert (results["missing"], results["prompts_cut"], results["questions"]) == (0, 1, 4)
    assert rows[3]["prompt_tokens"] <= 512 - 8, "the long one is cut to the context"
    assert rows[3]["prompt_tokens"] > 512 - 8 - 16, "and no more than that"
    assert rows[3]["question"].startswith("golden mill")
    assert rows[3]["question"].endswith("what is of the lantern")
    assert results["judge"]["model"] == "m-2024-01-01"
    assert results["judge"]["temperature"] == 0
    assert len(results["by_repeat"]) == 2

    asked = [request["messages"] for request in api.requests]
    assert len(asked) == 8
    by_query: dict[str, list[str]] = {}
    for messages in asked:
        text = messages[-1]["content"]
        by_query.setdefault(re.findall(r"\[Question\]\n(.*)", text)[0], []).append(text)
    for case, examples in zip(CASES, EXAMPLES, strict=True):
        for text in by_query[str(case["query"])]:
            assert f"\n{case['answer']}\n[The reference" in text
            for example in examples:
                assert f"{example['answer']}\n[The assistant's answer ends]\nRating: [[{example['score']}]]" in text
            assert str(case["prompt"]) not in text, "the judge does not see the document"
    orders = [tuple(re.findall(r"example (\d) of", text)) for texts in by_query.values() for text in texts]
    assert len(set(orders)) > 1, "examples are shuffled"

    said = capsys.readouterr()
    written = [file.read_text() for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert set(api.keys) == {"Bearer sk-sesame"}
    assert not any("sk-sesame" in text for text in [*written, said.out, said.err])

    again, same = evaluate(words, tmp_path)
    assert (again, same) == (results, rows), "nothing is asked twice"
    assert len(api.requests) == 8


def test_languages_limit_and_other_seeds(words: list[str], api: Api, tmp_path: Path) -> None:
    _, rows = evaluate([*words, "task.longbench_chat.languages=[zh]"], tmp_path)
    assert [row["id"] for row in rows] == ["3"]
    _, rows = evaluate([*words, "task.longbench_chat.limit=2"], tmp_path)
    assert [row["id"] for row in rows] == ["1", "2"]


def test_judged_later(words: list[str], api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers first, verdicts another day, and no model is loaded for them."""
    alone = [word for word in words if not word.startswith("judge")]
    results, rows = evaluate(alone, tmp_path)
    assert (results["score"], results["missing"], api.requests) == (None, 4, [])
    monkeypatch.setattr(evaluation.Local, "generator", property(lambda _: pytest.fail("the model was loaded")))
    judged, after = evaluate(words, tmp_path)
    assert judged["missing"] == 0
    assert [row["answer"] for row in after] == [row["answer"] for row in rows]


def test_faults_of_the_judge_change_nothing(words: list[str], api: Api, tmp_path: Path) -> None:
    api.slow = 1
    whole, rows = evaluate([*words, f"judge.cache={tmp_path}/one"], tmp_path)
    api.faults = [(429, "{}", {}), "cut", (500, "x", {}), "slow"]
    faulty = [*words, f"judge.cache={tmp_path}/two", "judge.retries=6", "judge.timeout_s=0.5", "judge.concurrency=1"]
    assert evaluate(faulty, tmp_path) == (whole, rows)
    nonsense = (200, json.dumps(completion("I cannot say.")), {})
    several = (200, json.dumps(completion("[[3]] or [[4]]")), {})
    empty = (200, json.dumps(completion("")), {})
    api.faults = [nonsense, several, empty, nonsense]
    judged, after = evaluate([*words, f"judge.cache={tmp_path}/three"], tmp_path)
    assert [row["scores"] for row in after] == [row["scores"] for row in rows]
    assert judged["score"] == whole["score"]


def test_verdicts_that_cannot_be_read_are_missing_not_zero(
    words: list[str], api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.say = lambda prompt: completion("well...") if "what is the river" in prompt else rate(prompt)
    results, rows = evaluate(words, tmp_path)
    assert rows[0]["scores"] == {"score": None, "rating_1": None, "rating_2": None}
    assert rows[0]["verdicts"][0] == {"rating": None, "reply": "well..."}
    others = [row["scores"]["score"] for row in rows[1:]]
    assert results["score"] == pytest.approx(sum(others) / 3, abs=1e-3)
    assert results["missing"] == 1
    assert len(api.requests) == 3 * 2 + 2 * 3, "three attempts each"
    assert "1 answers lack a verdict, e.g. 1: well..." in capsys.readouterr().err


def test_judge_down_then_up(words: list[str], api: Api, tmp_path: Path) -> None:
    api.faults = [(503, "down", {})] * 100
    with pytest.raises(UserError, match=r"5 requests in a row failed.*run again to go on"):
        evaluate(words, tmp_path)
    api.faults = [(400, "{}", {})]
    results, _ = evaluate([*words, "judge.concurrency=1"], tmp_path)
    assert results["missing"] == 0, "the other verdict counts"
    assert results["by_repeat"][0] is not None
    api.faults = []
    results, rows = evaluate(words, tmp_path)
    assert all(verdict["rating"] for row in rows for verdict in row["verdicts"])
    with pytest.raises(UserError, match=r"judge\.api_key_env=ABSENT: this environment variable holds no key"):
        evaluate([*words, "judge.api_key_env=ABSENT"], tmp_path)


def test_a_key_that_a_server_quotes_is_not_repeated(words: list[str], api: Api, tmp_path: Path) -> None:
    api.faults = [(401, json.dumps({"error": {"message": "Incorrect API key: sk-sesame"}}), {})] * 20
    with pytest.raises(UserError, match="key was refused") as error:
        evaluate(words, tmp_path)
    assert "sk-sesame" not in str(error.value)


@pytest.mark.parametrize("after", [0, 1])
def test_killed_and_resumed(after: int, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled answers: those of a run that was interrupted after a batch are those of one that was not."""
    sampled = [*words, "temperature=1.5"]
    whole, rows = evaluate(sampled, tmp_path)
    assert rows[1]["answer"] != evaluate([*sampled, "seed=1"], tmp_path)[1][1]["answer"]
    shutil.rmtree(tmp_path / "out")
    add, generate, calls, ran = Answers.add, Generator.generate, iter(range(100)), []

    def dying(self: Answers, answers: Any) -> None:
        if next(calls) == after:
            raise KeyboardInterrupt
        add(self, answers)

    def counted(self: Generator, prompts: Any, *rest: Any) -> Any:
        ran.append(len(prompts))
        return generate(self, prompts, *rest)

    monkeypatch.setattr(Generator, "generate", counted)
    monkeypatch.setattr(Answers, "add", dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate(sampled, tmp_path)
    monkeypatch.setattr(Answers, "add", add)
    stored = tmp_path / "out" / ".answers" / "longbench_chat.jsonl"
    stored.write_bytes(stored.read_bytes() + b'{"hash": "half')  # what is half written is no answer
    assert evaluate(sampled, tmp_path) == (whole, timed(rows, stored))
    assert ran == [*[1, 3][: after + 1], *[1, 3][after:]], "only batches that lack an answer run"


def timed(rows: list[dict[str, Any]], stored: Path) -> list[dict[str, Any]]:
    """The rows with the seconds that answers took in this folder."""
    lines = [json.loads(line) for line in stored.read_text().split("\n") if line.endswith("}")]
    seconds = {line["hash"]: line["seconds"] for line in lines}
    return [{**row, "seconds": seconds[row["hash"]]} for row in rows]


@pytest.mark.slow
def test_kill_9(words: list[str], api: Api, tmp_path: Path) -> None:
    """A real process, killed while the judge holds its requests, then run again."""
    whole, _ = evaluate(words, tmp_path)
    api.requests, api.hold_after = [], 3
    resumed = [*words[:-1], f"output_dir={tmp_path}/killed"]
    process = subprocess.Popen([sys.executable, "-m", "longalign.cli", "eval", *resumed], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    kept = lambda: list((tmp_path / "killed" / ".judge").glob("*/*.json"))
    while (len(api.requests) < 4 or len(kept()) < 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(kept()) == 3
    assert not (tmp_path / "killed" / "results.json").exists()
    api.hold_after = None
    paid = sum(api.answered.values())
    assert evaluation.run(compose_config("eval", resumed), False) == 0
    results = json.loads((tmp_path / "killed" / "results.json").read_text())["tasks"]["longbench_chat"]
    assert results == whole
    assert sum(api.answered.values()) - paid == 8 - 3, "what was paid for is not asked again"


def test_empty_answers_get_the_lowest_rating_unasked(
    words: list[str], api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longalign.evaluate.generate.Generator.decode", lambda *_: " \n")
    results, rows = evaluate(words, tmp_path)
    assert [row["scores"]["score"] for row in rows] == [1] * 4
    assert (results["empty"], results["missing"], api.requests) == (4, 0, [])


def test_answers_that_reach_the_limit_are_told(words: list[str], tmp_path: Path) -> None:
    results, rows = evaluate(words, tmp_path)
    assert results["cut_at_limit"] == sum(row["finish"] == "length" for row in rows) > 0


def test_dry_run_tells_the_price_and_asks_nothing(
    words: list[str], api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words += ["judge.price_per_million.input=1000000", "judge.price_per_million.output=0"]
    assert evaluation.run(compose_config("eval", words), True) == 0
    said = capsys.readouterr().err
    assert "4 questions" in said
    assert "1 prompts are cut in the middle to fit 512 tokens" in said
    tokens, price = re.findall(
        r"8 requests, at most ([\d,]+) input tokens and 8,192 output tokens: at most ([\d,.]+)", said
    )[0]
    assert float(price.replace(",", "")) == float(tokens.replace(",", "")) > 8 * 100
    assert api.requests == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda cases: cases[1].pop("query"), r"test_cases.json: case 2 \(idx 2\) has no text in 'query'"),
        (lambda cases: cases[1].update(answer=" "), "has no text in 'answer'"),
        (lambda cases: cases[2].update(idx=1), "case 3 has idx 1; a whole number of its own"),
        (lambda cases: cases[2].update(idx=9), "has 4 entries, none for case idx 9"),
        (lambda cases: cases.append("x"), "case 5 is no object"),
        (lambda cases: cases.clear(), "must be a list with something in it"),
    ],
)
def test_files_with_faults(
    change: Callable[[list[dict[str, Any]]], Any], told: str, words: list[str], tmp_path: Path
) -> None:
    cases = json.loads(json.dumps(CASES))
    change(cases)
    (tmp_path / "test_cases.json").write_text(json.dumps(cases))
    with pytest.raises(UserError, match=told):
        evaluate(words, tmp_path)


def test_files_that_cannot_be_read(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task\.longbench_chat\.cases=absent\.json cannot be read"):
        evaluate([*words, "task.longbench_chat.cases=absent.json"], tmp_path)
    (tmp_path / "few_shots.json").write_text(json.dumps([[{"answer": "x"}]]))
    with pytest.raises(UserError, match=r"few_shots=.*entry 1 is no list of \{answer, score\}"):
        evaluate(words, tmp_path)
    (tmp_path / "test_cases.json").write_text("[{]")
    with pytest.raises(UserError, match="is no JSON"):
        evaluate(words, tmp_path)
    (tmp_path / "prompt.txt").write_text("{question} {reference} {examples}")
    (tmp_path / "test_cases.json").write_text(json.dumps(CASES))
    (tmp_path / "few_shots.json").write_text(json.dumps(EXAMPLES))
    with pytest.raises(UserError, match=r"must hold \{answer\}"):
        evaluate([*words, f"task.longbench_chat.prompt={tmp_path}/prompt.txt"], tmp_path)


def test_models_that_cannot_be_asked(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="template=chat_template, but the tokenizer has none"):
        evaluate([word for word in words if not word.startswith("template")], tmp_path)
    with pytest.raises(UserError, match=r"question 3: the prompt has .* context is 16"):
        evaluate([*words, "generation.context=16"], tmp_path)
    with pytest.raises(UserError, match=r"generation\.cache=offloaded needs a GPU"):
        evaluate([*words, "generation.cache=offloaded"], tmp_path)
