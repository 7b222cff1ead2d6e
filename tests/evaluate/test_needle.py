"""The needle stands where the grid says, answers are judged strictly, and the command leaves its files."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from longalign.config import compose_config
from longalign.data.synthetic import Fact, facts
from longalign.errors import UserError
from longalign.evaluate import needle
from longalign.evaluate.generate import Generator, Stream
from tests.conftest import longalign

FACT = Fact(
    "code of Rome",
    "amber falcon",
    "The code of Rome is amber falcon.",
    "What is it?",
    "The code of Rome is amber falcon.",
)


@pytest.mark.parametrize(
    ("answer", "exact", "inside"),
    [
        ("The code of Rome is amber falcon.", True, True),
        ("  AMBER falcon! ", True, True),
        ("It is amber falcon.", False, True),
        ("amber falcons", False, False),
        ("amber", False, False),
        ("", False, False),
        ("The code of Rome is amber falcon. The code of Rome is amber falcon.", False, True),
    ],
)
def test_judging(answer: str, exact: bool, inside: bool) -> None:
    assert needle.exact_match(answer, FACT) is exact
    assert needle.contains(answer, FACT) is inside


@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 1])
def test_depth(depth: float) -> None:
    count = lambda text: len(text.split())
    document = needle.build_document(
        "NEEDLE here.", ["d one.", "d two."], depth, 1000, itertools.repeat("some filler words."), count
    )
    assert 990 < count(document) <= 1000
    place = document.split().index("NEEDLE") / count(document)
    assert place == pytest.approx(depth, abs=0.01)
    assert "d one." in document
    assert "d two." in document


def test_haystack_of_the_users_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("One is here. Two is there! Three?")
    source = needle.sentences(str(tmp_path), random.Random(0))
    assert set(itertools.islice(source, 6)) == {"One is here.", "Two is there!", "Three?"}
    (tmp_path / "b.html").write_text("<p>Four is a page.</p>")
    (tmp_path / "c.png").write_bytes(b"\x89PNG\0")
    needle._sentences_of.cache_clear()
    source = needle.sentences(str(tmp_path), random.Random(0))
    assert "Four is a page." in itertools.islice(source, 4)
    assert "c.png is left out: not text" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match="haystack"):
        next(needle.sentences(str(tmp_path / "none"), random.Random(0)))


@pytest.fixture(scope="module")
def generator(model_dir: Path) -> Generator:
    words = ["model=hf", f"model.path={model_dir}", "model.template=longalign-llama", "cluster=cpu"]
    return Generator(compose_config("eval", words))


def test_prompts_fill_the_length_and_hold_the_needle(generator: Generator) -> None:
    words = ["task.needle.lengths=[100,300]", "task.needle.depths=[0,1]", "task.needle.documents=2"]
    task = compose_config(
        "eval", [*words, "task.needle.distractors=2", "task.needle.without_document=true"]
    ).task.needle
    assert task is not None
    asked = needle.questions(task, generator, seed=0)
    assert len(asked) == 16
    for q in asked:
        text = generator.tokenizer.decode(q.prompt)
        assert q.fact.question in text
        assert (q.fact.statement in text) == (q.length is not None)
        if q.length:
            assert q.length - 30 < len(q.prompt) <= q.length
    assert [q.prompt for q in needle.questions(task, generator, seed=0)] == [q.prompt for q in asked]
    assert [q.prompt for q in needle.questions(task, generator, seed=1)] != [q.prompt for q in asked]
    train = {fact.key for fact in facts("train", 200, random.Random(0))}
    assert not train & {q.fact.key for q in asked}


def test_batches_answer_as_single_questions_do(generator: Generator) -> None:
    prompts = [
        generator.prompt_ids([{"role": "user", "content": text}])
        for text in ("what", "the quiet river is near", "golden mill")
    ]
    alone = [generator.generate([prompt], 8)[0] for prompt in prompts]
    assert dict(generator.answers(prompts, 8, batch_tokens=100)) == {
        i: generator.decode(ids) for i, ids in enumerate(alone)
    }


def test_stream_shows_the_whole_answer(generator: Generator) -> None:
    written: list[str] = []
    stream = Stream(generator.decode, generator.template.stop_ids, written.append)
    prompt = generator.prompt_ids([{"role": "user", "content": "the quiet river"}])
    (ids,) = generator.generate([prompt], 12, stream)
    assert "".join(written) == generator.decode(ids)
    assert len(written) > 3, "it comes in pieces"


def test_over_the_context_is_refused(generator: Generator) -> None:
    with pytest.raises(UserError, match="context is 512"):
        generator.check_fits([5] * 510, 8)


def test_summary_counts() -> None:
    row = lambda length, depth, ok: {"length": length, "depth": depth, "exact_match": ok, "contains": True}
    summary = needle.summarise(
        [row(10, 0, True), row(10, 1, False), row(20, 0, True), row(20, 1, True), row(None, None, False)]
    )
    assert summary["score"] == 0.75
    assert summary["contains"] == 1
    assert summary["score_without_document"] == 0
    assert summary["by_length"] == {"10": 0.5, "20": 1.0}
    assert summary["grid"]["10"] == {"0": 1.0, "1": 0.0}


def test_command_leaves_results_and_heatmap(tmp_path: Path, model_dir: Path) -> None:
    words = ["model=hf", f"model.path={model_dir}", "model.template=longalign-llama", "cluster=cpu", "output_dir=out"]
    words += [
        "task.needle.lengths=[64,128]",
        "task.needle.depths=[0,1]",
        "task.needle.documents=1",
        "task.needle.max_new_tokens=4",
    ]
    done = longalign("eval", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["tasks"]["needle"]["grid"]) == {"64", "128"}
    assert len((tmp_path / "out" / "needle.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "out" / "needle.png").read_bytes().startswith(b"\x89PNG")
    long = longalign("eval", *words, "task.needle.lengths=[1000]", cwd=tmp_path)
    assert long.returncode == 2
    assert "the model's context is 512" in long.stderr
