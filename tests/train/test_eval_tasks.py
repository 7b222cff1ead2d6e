"""Questions asked of the weights in training: answered as the exported model answers them, and training is not changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longalign.config import compose_config
from longalign.errors import UserError
from longalign.evaluate.generate import Generator
from longalign.evaluate.tasks import needle
from longalign.launch import prepare_run
from longalign.schema import Config
from longalign.train.answers import rounds
from longalign.train.metrics import read_metrics
from tests.conftest import launch_all
from tests.train import watched

STEPS = 3
TRAIN = [
    "strategy=packing",
    "strategy.packs_per_step=2",
    "lr=1e-2",
    "lr_final=1e-2",
    f"max_steps={STEPS}",
    "save_every=null",
]
# three prompts, each a batch of its own: on two ranks one has nothing to ask in the second round
GRID = ["task.needle.lengths=[100,200,400]", "task.needle.depths=[0.5]", "task.needle.documents=1"]
GRID += ["task.needle.max_new_tokens=12", "generation.batch_tokens=400", "generation.prefill_chunk_size=128"]
# the data's template holds, not this one
ASK = ["eval_every=2", "eval_tasks=[needle]", "template=longalign-chatglm", *GRID]
LAYOUTS = {"one": (1, 1), "zero0": (2, 0), "zero1": (2, 1), "zero2": (2, 2), "zero3": (2, 3)}  # processes, ZeRO stage
PARTITIONED = "cluster.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 100}}"  # all but norms
COMPARED = ("one", "zero3")

Make = Callable[..., Config]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, run_config: Make) -> Path:
    """A run of every layout that asks after steps 2 and 3, and of some one that does not."""
    root = tmp_path_factory.mktemp("runs")
    for processes in (1, 2):
        configs = []
        for name, (wanted, stage) in LAYOUTS.items():
            if wanted == processes:
                words = [*TRAIN, f"cluster.processes={processes}", f"cluster.zero_stage={stage}", PARTITIONED]
                configs.append(run_config(root / name, *words, *ASK))
                configs += [run_config(root / f"{name}-blind", *words)] * (name in COMPARED)
        assert launch_all(configs, root, worker=[watched.__file__]) == 0
    return root


def answers_of(run: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "answers" / f"needle-{step:06d}.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_answers_are_those_of_the_exported_model(name: str, runs: Path) -> None:
    """The last evaluation sees the exported weights; there each prompt is asked alone, without chunks."""
    words = ["model=hf", f"model.path={runs / name / 'model'}", "cluster=cpu", "seed=7", *GRID]
    config = compose_config("eval", [*words, "generation.prefill_chunk_size=null"])
    generator = Generator(config)
    assert config.task.needle
    count = lambda what: len(
        generator.tokenizer(what, add_special_tokens=False)["input_ids"]
        if isinstance(what, str)
        else generator.prompt_ids(what)
    )
    questions = needle.questions(config.task.needle, config.seed, count)
    wanted = []
    for question in questions:
        (ids,) = generator.generate([generator.prompt_ids(question.messages)], question.max_new_tokens)
        wanted.append((question.id, generator.decode(ids), "length" if len(ids) == 12 else "stop"))
    rows = answers_of(runs / name, STEPS)
    assert [(row["id"], row["answer"], row["finish"]) for row in rows] == wanted
    assert len({answer for _, answer, _ in wanted}) == 3, "answers that tell the prompts apart"
    assert [row["answer"] for row in rows] != [row["answer"] for row in answers_of(runs / name, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows(name: str, runs: Path) -> None:
    rows = read_metrics(runs / name / "eval.jsonl")
    assert [row["step"] for row in rows] == [2, 3], "every second step, and the last"
    for row in rows:
        found, answers = row["needle"], answers_of(runs / name, row["step"])
        assert set(row) == {"step", "needle", "seconds"}
        assert found["questions"] == len(answers) == 3
        assert found["score"] == sum(a["scores"]["score"] for a in answers) / 3
        assert list(found["by_length"]) == ["100", "200", "400"]
        assert found["cut_at_limit"] == sum(a["finish"] == "length" for a in answers)
        assert 0 < found["seconds"] <= row["seconds"]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED)
def test_asking_changes_nothing(name: str, runs: Path) -> None:
    seen, blind = (load_file(runs / run / "model" / "model.safetensors") for run in (name, f"{name}-blind"))
    assert all(torch.equal(seen[key], blind[key]) for key in blind)
    rows, others = (read_metrics(runs / run / "metrics.jsonl") for run in (name, f"{name}-blind"))
    assert [(row["loss"], row["grad_norm"]) for row in rows] == [(row["loss"], row["grad_norm"]) for row in others]


def test_rounds() -> None:
    dealt = rounds([10, 90, 30, 80, 20], batch_tokens=100, ranks=2)
    assert dealt == [[[1], [3]], [[2, 4, 0]]]
    assert sorted(len(batch) for of_ranks in rounds([10] * 9, 1000, 4) for batch in of_ranks) == [3, 3, 3]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["eval_tasks=[needle]", "task.needle.lengths=[600]"], "eval_tasks=needle: .* the model's context is 512"),
        (
            ["eval_tasks=[needle]", "task.needle.judge=true", *GRID],
            r"nothing is judged while training; .*needle\.judge=false",
        ),
        (["eval_tasks=[longbench]"], r"eval_tasks=longbench: the task has no settings; .*task=\[longbench\]"),
        (["eval_tasks=[longbench_chat]"], "eval_tasks='longbench_chat' is not allowed: .*'heldout', 'needle'"),
        (["eval_tasks=[]"], "eval_tasks=.* is not allowed"),
        (["eval_tasks=needle", "eval_every=null"], "needs the steps between evaluations: eval_every="),
    ],
)
def test_what_cannot_be_asked_is_refused_first(words: list[str], told: str, run_config: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        prepare_run(run_config(tmp_path / "run", "eval_every=2", *words), dry_run=True)
    assert not (tmp_path / "run").exists()
