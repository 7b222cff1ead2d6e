"""The needle stands where the grid says, answers are judged strictly, and the command leaves its files."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from longalign.config import compose_config
from longalign.data.messages import Messages
from longalign.data.synthetic import Fact, facts
from longalign.errors import UserError
from longalign.evaluate.generate import Generator, Stream
from longalign.evaluate.haystack import _sentences_of, build_document, sentences
from longalign.evaluate.question import Question, Verdict
from longalign.evaluate.tasks import needle
from tests.conftest import in_process, longalign

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
    assert needle.exact_match(answer, FACT.value, FACT.answer) is exact
    assert needle.contains(answer, FACT.value) is inside


@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 1])
def test_depth(depth: float) -> None:
    count = lambda text: len(text.split())
    filler = itertools.repeat("some filler words.")
    hidden = [(depth, "NEEDLE here."), (0, "d one."), (0.5, "d two.")]
    document = build_document(hidden, 1000, filler, count)
    assert 990 < count(document) <= 1000
    place = document.split().index("NEEDLE") / count(document)
    assert place == pytest.approx(depth, abs=0.01)
    assert document.split().index("two.") / count(document) == pytest.approx(0.5, abs=0.01)


def test_haystack_of_the_users_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("One is here. Two is there! Three?")
    source = sentences("haystack", str(tmp_path), "0")
    assert set(itertools.islice(source, 6)) == {"One is here.", "Two is there!", "Three?"}
    (tmp_path / "b.html").write_text("<p>Four is a page.</p>")
    (tmp_path / "c.png").write_bytes(b"\x89PNG\0")
    _sentences_of.cache_clear()
    source = sentences("haystack", str(tmp_path), "0")
    assert "Four is a page." in itertools.islice(source, 4)
    assert "c.png is left out: not text" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match="haystack"):
        next(sentences("haystack", str(tmp_path / "none"), "0"))


@pytest.fixture(scope="module")
def generator(model_dir: Path) -> Generator:
    words = ["model=hf", f"model.path={model_dir}", "model.template=longalign-llama", "cluster=cpu"]
    return Generator(compose_config("eval", words))


def asked_of(generator: Generator, *words: str, seed: int = 0) -> list[tuple[Question, list[int], str]]:
    """(question, prompt ids, their text) of task=needle."""
    task = compose_config("eval", [f"task.needle.{word}" for word in words]).task.needle
    assert task is not None
    tokenizer, template = generator.tokenizer, generator.template

    def count(what: str | Messages) -> int:
        if isinstance(what, str):
            return len(tokenizer(what, add_special_tokens=False)["input_ids"])
        return len(template.prompt_ids(what))

    found = [(q, template.prompt_ids(q.messages)) for q in needle.questions(task, seed, count)]
    return [(q, prompt, tokenizer.decode(prompt)) for q, prompt in found]


GRID = ("lengths=[100,300]", "depths=[0,1]", "documents=2")


def test_prompts_fill_the_length_and_hold_the_needle(generator: Generator) -> None:
    words = (*GRID, "distractors=2", "without_document=true")
    asked = asked_of(generator, *words)
    assert len(asked) == len({q.id for q, _, _ in asked}) == 16
    for q, prompt, text in asked:
        (statement,) = q.reference or [""]
        assert q.about["values"][0] in statement
        assert (statement in text) == (q.about["length"] is not None)
        if q.about["length"]:
            assert q.about["length"] - 30 < len(prompt) <= q.about["length"]
            assert text.count("?") == 1
    again = [prompt for _, prompt, _ in asked_of(generator, *words)]
    assert again == [prompt for _, prompt, _ in asked]
    assert again != [prompt for _, prompt, _ in asked_of(generator, *words, seed=1)]
    values = {fact.statement for fact in facts("train", 200, random.Random(0))}
    assert not values & {one for q, _, _ in asked for one in q.reference or []}


def test_several_needles_stand_apart_and_each_counts(generator: Generator) -> None:
    for q, _, text in asked_of(generator, *GRID, "lengths=[300]", "needles=3"):
        places = [text.index(statement) / text.rindex(".") for statement in q.reference or []]
        assert len(places) == text.count("?") == 3
        first, *others = places
        assert (first < 0.1) if q.about["depth"] == 0 else (first > 0.6)
        assert all(abs(one - other) > 0.2 for one, other in itertools.combinations([first, *others], 2))
        one, two, three = q.about["values"]
        assert needle.score(q, f"{one}, {two} and {three}.", None)["score"] == 1
        assert needle.score(q, f"It is {three}.", None)["score"] == pytest.approx(1 / 3, abs=1e-4)
        assert needle.score(q, "", None)["score"] == 0


def test_haystacks_take_turns(generator: Generator, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(f"This is the {name} one. " * 50)
    asked = asked_of(generator, *GRID, f"haystack=[{tmp_path}/first,{tmp_path}/second]")
    for q, _, text in asked:
        used, unused = ("first", "second") if q.id.endswith("/0") else ("second", "first")
        assert q.about["haystack"] == f"{tmp_path}/{used}"
        assert used in text
        assert unused not in text


def test_no_room_is_said(generator: Generator) -> None:
    with pytest.raises(UserError, match=r"lengths=100 has no room for 1 needles and 40 distractors"):
        asked_of(generator, *GRID, "distractors=40")


def test_a_judge_rates_from_0_to_1(generator: Generator) -> None:
    question, _, _ = asked_of(generator, *GRID, "judge=true")[0]
    assert question.judge is not None
    (told,) = question.judge("my answer", 0)
    (reference,) = question.reference or [""]
    assert "my answer" in told["content"]
    assert reference in told["content"]
    verdicts = [Verdict(1, ""), Verdict(10, ""), Verdict(None, "")]
    assert needle.score(question, reference, verdicts) == {"score": 0.5, "exact_match": 1, "contains": 1}
    assert needle.score(question, reference, None)["score"] is None, "missing, not zero"


def test_batches_answer_as_single_questions_do(generator: Generator) -> None:
    prompts = [
        generator.template.prompt_ids([{"role": "user", "content": text}])
        for text in ("what", "the quiet river is near", "golden mill")
    ]
    alone = [generator.generate([prompt], 8)[0] for prompt in prompts]
    assert generator.generate(prompts, 8) == alone


def test_stream_shows_the_whole_answer(generator: Generator) -> None:
    written: list[str] = []
    stream = Stream(generator.decode, generator.template.stop_ids, written.append)
    prompt = generator.prompt_ids([{"role": "user", "content": "the quiet river"}])
    (ids,) = generator.generate([prompt], 12, stream)
    assert "".join(written) == generator.decode(ids)
    assert len(written) > 3, "it comes in pieces"


def test_summary_counts() -> None:
    def row(length: int | None, depth: float | None, score: float | None) -> dict:
        return {"about": {"length": length, "depth": depth}, "scores": {"score": score, "contains": 1.0}}

    rows = [row(10, 0, 1), row(10, 1, 0), row(20, 0, 1), row(20, 1, 1), row(20, 1, None), row(None, None, 0)]
    summary = needle.summarise(rows)
    assert summary["score"] == 0.75
    assert summary["contains"] == 1
    assert summary["score_without_document"] == 0
    assert summary["by_length"]["10"] == {"score": 0.5, "questions": 2, "missing": 0}
    assert summary["by_length"]["20"] == {"score": 1.0, "questions": 3, "missing": 1}
    assert summary["grid"] == {"10": {"0": 1, "1": 0}, "20": {"0": 1, "1": 1}}


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
    long = in_process("eval", *words, "task.needle.lengths=[1000]", cwd=tmp_path)
    assert long.returncode == 2
    assert "the model's context is 512" in long.stderr
