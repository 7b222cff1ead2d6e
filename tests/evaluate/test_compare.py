"""Runs side by side: the intervals are right, and nothing that differs stays unsaid."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from longalign.config import compose_config
from longalign.errors import UserError
from longalign.evaluate.compare import compare, difference, names
from longalign.evaluate.results import Group, read_run
from longalign.evaluate.statistics import Row, breakdown, half_width, mean, scores, t95
from tests.conftest import longalign
from tests.evaluate.pages import Page, row, write_run


def task(rows: list[Row], **more: Any) -> tuple[dict[str, Any], list[Row]]:
    by = breakdown(rows, lambda one: one["about"]["length"])
    counts = {"questions": len(rows), "missing": len(rows) - len(scores(rows))}
    return {
        "score": mean(scores(rows)),
        "best": 10,
        "settings": {"limit": None},
        **counts,
        "by_length": by,
        **more,
    }, rows


def rows(values: list[float | None], prefix: str = "q") -> list[Row]:
    """Two lengths in turn."""
    return [row(f"{prefix}{n}", value, {"length": 1000 * (1 + n % 2)}) for n, value in enumerate(values)]


def compared(folder: Path, *tasks: dict[str, Any], top: tuple[dict[str, Any], ...] = ({}, {}, {})) -> dict[str, Any]:
    runs = {n: read_run(write_run(folder / n, of, **more)) for n, of, more in zip("abc", tasks, top, strict=False)}
    return compare(runs)


def told(found: dict[str, Any], name: str, group: tuple[str, str] = ("", ""), run: str = "b") -> dict[str, Any]:
    rows = found["tasks"][name]["rows"]
    return next(one for one in rows if (one["breakdown"], one["group"]) == group)["differences"][run]


def test_quantiles_of_student() -> None:
    """Against scipy's."""
    stats = pytest.importorskip("scipy.stats")
    for freedom in [*range(1, 40), 12.5, 99, 1000, 1e6]:
        assert t95(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=3e-4)
    assert t95(2.9) == t95(2)
    assert t95(0.5) == t95(1)


def test_intervals_hold_the_truth_in_95_of_100() -> None:
    """Pairs with a shared part and a true difference of 0.3; also for means over groups of unlike size and spread."""
    rng = random.Random(0)
    group = lambda values: Group("", "", {}, values)
    held = {None: 0, "dataset": 0}
    trials = 1500
    for over in held:
        for _ in range(trials):
            one, two = [], []
            for n in range(24):
                dataset = "small" if n % 4 == 0 else "large"
                shared, spread = rng.gauss(5, 3), 2.0 if dataset == "small" else 0.5
                gain = {"small": 0.5, "large": 0.1}[dataset] if over else 0.3
                about = {"dataset": dataset}
                one.append(row(str(n), shared, about))
                two.append(row(str(n), shared + rng.gauss(gain, spread), about))
            found = difference(group(one), group(two), {"score": 0, "mean_over": over})
            low, high = found["interval"]
            held[over] += low <= 0.3 <= high
    for count in held.values():
        assert 0.94 < count / trials < 0.975  # standard error of the share: 0.006


def test_a_difference_by_hand(tmp_path: Path) -> None:
    """Differences 1, 2, 3, 2 (length 1000: 1, 3; 2000: 2, 2); one question is missing in either run."""
    first = rows([5, 5, 5, 5, None, 7])
    second = rows([6, 7, 8, 7, 9, None])
    found = compared(tmp_path, {"chat": task(first)}, {"chat": task(second)})
    assert told(found, "chat") == {
        "difference": 2,
        # standard deviation 0.8165, / 2, x t(3) 3.1824
        "interval": [pytest.approx(2 - 1.2992, abs=1e-4), pytest.approx(2 + 1.2992, abs=1e-4)],
        "questions": 4,
        "told": "higher",
    }
    by_1000 = told(found, "chat", ("length", "1000"))
    assert (by_1000["difference"], by_1000["questions"], by_1000["told"]) == (2, 2, "no difference seen")
    assert by_1000["interval"] == [pytest.approx(2 - 12.7062, abs=1e-3), pytest.approx(2 + 12.7062, abs=1e-3)]
    by_2000 = told(found, "chat", ("length", "2000"))
    assert (by_2000["difference"], by_2000["interval"], by_2000["told"]) == (2, None, "no interval")
    assert found["warnings"] == []
    # differences 2, 0, 2, 4: 2 ± 1.633 / 2 x 3.1824 = 2.598 holds 0; with 1 instead of 0, 2.25 ± 2.003 does not
    for other, expected in (([7, 5, 7, 9], "no difference seen"), ([7, 6, 7, 9], "higher")):
        near = compared(tmp_path, {"chat": task(rows([5] * 4))}, {"chat": task(rows(other))})
        assert told(near, "chat")["told"] == expected
    turned = compared(tmp_path, {"chat": task(second)}, {"chat": task(first)})
    assert told(turned, "chat")["told"] == "lower"
    assert told(turned, "chat")["difference"] == -2


@pytest.mark.parametrize(("gain", "questions", "expected"), [(1, 5, "no interval"), (1, 6, "higher"), (-1, 6, "lower")])
def test_differences_all_alike(tmp_path: Path, gain: int, questions: int, expected: str) -> None:
    values = [float(n) for n in range(1, 1 + questions)]
    found = compared(tmp_path, {"chat": task(rows(values))}, {"chat": task(rows([v + gain for v in values]))})
    assert told(found, "chat") == {"difference": gain, "interval": None, "questions": questions, "told": expected}


def test_pairing_needs_fewer_questions(tmp_path: Path) -> None:
    """A small gain on questions of very unlike difficulty: each run's interval is wide, the difference's is narrow."""
    rng = random.Random(1)
    hard = [rng.uniform(0, 9) for _ in range(40)]
    found = compared(
        tmp_path, {"chat": task(rows(hard))}, {"chat": task(rows([v + rng.uniform(0, 0.4) for v in hard]))}
    )
    all_rows = found["tasks"]["chat"]["rows"][0]
    (low, _), (_, high) = all_rows["runs"]["b"]["interval"], all_rows["runs"]["a"]["interval"]
    assert low < high, "they overlap"
    assert told(found, "chat")["told"] == "higher"


def test_alike_runs_and_the_order_of_rows(tmp_path: Path) -> None:
    values = [float(n % 7) for n in range(20)]
    one, two = rows(values), rows([v + (n % 3 - 1) for n, v in enumerate(values)])
    first = compared(tmp_path, {"chat": task(one)}, {"chat": task(one)}, {"chat": task(two)})
    assert told(first, "chat")["told"] == "no difference seen"
    assert told(first, "chat")["difference"] == 0
    shuffled = random.Random(0).sample(two, len(two))
    again = compared(tmp_path, {"chat": task(one)}, {"chat": task(one)}, {"chat": task(shuffled)})
    assert told(again, "chat", run="c")["interval"] == pytest.approx(told(first, "chat", run="c")["interval"])


def test_all_missing_is_no_zero(tmp_path: Path) -> None:
    found = compared(tmp_path, {"chat": task(rows([1, 2, 3]))}, {"chat": task(rows([None] * 3))})
    assert told(found, "chat") == {"difference": None, "interval": None, "questions": 0, "told": "no interval"}
    assert found["tasks"]["chat"]["rows"][0]["runs"]["b"] == {"score": None, "interval": None, "questions": 0}


def test_what_differs_is_said(tmp_path: Path) -> None:
    judge = {"model": "m1", "temperature": 0, "prompts_hash": "x"}
    first = task(rows([5, 5, 5, 4]), judge=judge)
    other_rows = [*rows([6, 7, 8])[:2], row("q2", 9, {"length": 1000}, reference="another"), *rows([1], "new")]
    other = task(other_rows, judge={**judge, "model": "m2"}, settings={"limit": 3})
    found = compared(
        tmp_path, {"chat": first, "solo": first}, {"chat": other}, top=({"seed": 42}, {"seed": 7, "template": "u"})
    )
    assert found["warnings"] == [
        "settings differ: template, seed",
        "chat: the questions differ: a has 4, b 4, 2 in common; only these tell the difference",
        "chat: settings differ: task.chat.limit",
        "chat: the judges differ, or what they were told (a: m1, b: m2); such scores are not on one scale",
        "solo: only a has this task; it is not compared",
    ]
    assert told(found, "chat")["questions"] == 2, "an id with another reference is another question"
    assert ("task.chat.limit", [None, 3]) in found["settings"]
    assert ("chat.judge.model", ["m1", "m2"]) in found["settings"]
    unjudged = compared(tmp_path, {"chat": first}, {"chat": task(rows([5, 5, 5, 4]))})
    assert "(a: m1, b: none)" in unjudged["warnings"][0]
    third = compared(tmp_path, {"chat": first}, {"chat": first}, {"solo": first})
    assert third["warnings"] == ["chat: c has no such task", "solo: only c has this task; it is not compared"]


def test_a_task_without_rows(tmp_path: Path) -> None:
    loss = lambda value: ({"loss": value, "by_length": {"0": {"loss": value + 1, "tokens": 5}}}, [])
    found = compared(tmp_path, {"heldout": loss(1.5)}, {"heldout": loss(1.25)})
    assert told(found, "heldout") == {"difference": -0.25, "interval": None, "questions": 0, "told": "no interval"}
    assert found["tasks"]["heldout"]["better"] == "lower"


def test_names_tell_runs_apart() -> None:
    found = lambda *paths: names([Path(path) for path in paths])
    assert found("/r/7b/10k/naive/eval", "/r/7b/10k/sorted/eval") == ["naive", "sorted"]
    assert found("/r/7b/0k/naive/eval", "/r/7b/10k/sorted/eval") == ["0k/naive", "10k/sorted"]
    assert found("/r/a", "/r/a/eval") == ["a", "a/eval"]
    assert len(set(found("/r/eval", "/s/eval", "/s/t/eval"))) == 3


def test_the_command(tmp_path: Path) -> None:
    """A run's folder and an evaluation's; no model is there to be loaded."""
    nasty = "<script>alert(1)</script>"
    grid = {"grid_axes": ["prompt tokens", "depth"], "grid": {"1000": {"0": 5.0}, "2000": {"0": None}}}
    write_run(tmp_path / "one" / "eval", {"chat": task(rows([5, 4, 5, 5]), **grid)}, model=nasty)
    write_run(tmp_path / "two", {"chat": task(rows([6, 7, 8, 7]), **grid)}, seed=1)
    done = longalign("eval", "compare=[one,two]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "settings differ: seed" in done.stderr
    assert "+2.25" in done.stderr
    found = json.loads((tmp_path / "runs" / "compare" / "compare.json").read_text())
    assert told(found, "chat", run="two")["difference"] == 2.25
    page = Page((tmp_path / "runs" / "compare" / "compare.html").read_text())
    assert page.loads() == []
    assert nasty in page.text
    assert [tag for tag, _ in page.tags].count("script") == 0
    (cells,) = page.row("", "all")
    # 5,4,5,5: sd 0.5; 6,7,8,7: sd 0.8165; differences 1,3,3,2: sd 0.9574; all / 2 x t(3) 3.1824
    assert cells[:2] == ["4.75 ± 0.80", "7.00 ± 1.30"]
    assert cells[2] == "+2.25 [+0.73, +3.77] n=4higher"
    assert page.row("length", "1,000")[0][:2] == ["5.00", "7.00 ± 12.71"]
    assert [of["aria-label"] for tag, of in page.tags if tag == "svg"]
    lines = [of["d"] for tag, of in page.tags if tag == "path" and of.get("class") == "line"]
    assert len(lines) == 2, "a line per run"
    told_only = longalign("eval", "compare=[one,two]", "output_dir=elsewhere", "--dry-run", cwd=tmp_path)
    assert told_only.returncode == 0
    assert not (tmp_path / "elsewhere").exists()


def test_values_of_the_paper_only_if_asked_for(tmp_path: Path) -> None:
    """Tables 2 and 3 as printed."""
    from longalign.evaluate.compare_page import html

    tasks = {"longbench_chat": task(rows([5, 4])), "longbench": task(rows([50, 40]), best=100)}
    runs = {n: read_run(write_run(tmp_path / n, tasks)) for n in "ab"}
    assert "Reported by the paper" not in html(runs, compare(runs), False)
    page = Page(html(runs, compare(runs), True))
    assert page.text.count("Not measured here") == 2
    assert page.row("Llama-2-7B-64k, LongAlign-10k, sorted batching") == [["6.38"], ["63.4", "42.2", "41.3"]]
    assert page.row("ChatGLM3-6B-64k, LongAlign-0k") == [["3.73"], ["58.7", "41.1", "38.4"]]


def test_wrong_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from longalign import commands

    def fails(*folders: str) -> str:
        given = ",".join(str(tmp_path / folder) for folder in folders)
        with pytest.raises(UserError) as error:
            commands.eval(compose_config("eval", [f"compare=[{given}]", f"output_dir={tmp_path}/out"]), False)
        return str(error.value)

    write_run(tmp_path / "a", {"chat": task(rows([1, 2]))})
    write_run(tmp_path / "b" / "eval", {"other": task(rows([1, 2]))})
    (tmp_path / "empty").mkdir()
    for name, text in (
        ("half", '{"tasks"'),
        ("list", "[1]"),
        ("none", '{"model": "x"}'),
        ("odd", '{"tasks": {"a": 1}}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(text)
    assert "two or more different evaluations" in fails("a")
    assert "two or more different evaluations" in fails("b", "b/eval")
    assert f"compare: {tmp_path}/empty has neither results.json nor eval/results.json" in fails("a", "empty")
    assert "has neither" in fails("a", "nowhere")
    assert "half/results.json is no JSON" in fails("a", "half")
    assert "list/results.json is no JSON object" in fails("a", "list")
    assert "has no 'tasks'" in fails("a", "none")
    assert "has no 'tasks'" in fails("a", "odd")
    assert "no task is in two of the runs (a: chat; b/eval: other)" in fails("a", "b")
    assert not (tmp_path / "out").exists()


def test_no_interval_where_none_can_be_known() -> None:
    assert half_width([]) is None
    assert half_width([[1.0]]) is None
    assert half_width([[1.0, 1.0, 1.0]]) is None
    assert half_width([[1.0, 2.0], [3.0]]) is None
    assert half_width([[1.0, 3.0]]) == pytest.approx(12.7062)
