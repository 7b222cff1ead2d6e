"""The page says what the files say, whatever texts they hold, and loads nothing."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from longalign.errors import UserError
from longalign.evaluate.report import SHOWN, write_report
from longalign.evaluate.statistics import Row, breakdown, grid, mean, scores
from longalign.evaluate.table import summary_table
from longalign.progress import console
from tests.evaluate.pages import Page, row, write_run

NASTY = (
    "</pre><script>alert('x')</script> <img src=http://evil.example/x.png> & \"quoted\" 'single' {{ 7*7 }} {% raw %}"
)


def grid_task(rows: list[Row], **more: Any) -> tuple[dict[str, Any], list[Row]]:
    by = lambda key: breakdown(rows, lambda one: one["about"][key])
    counts = {"questions": len(rows), "missing": len(rows) - len(scores(rows)), "failed": 0}
    shape = {"grid_axes": ["prompt tokens", "depth"], "grid": grid(rows, "length", "depth")}
    found = {"score": mean(scores(rows)), "best": 1, "settings": {"lengths": [1024, 2048]}, **counts}
    return {**found, "by_length": by("length"), "by_depth": by("depth"), **shape, **more}, rows


def four_cells() -> list[Row]:
    """1024: 1, 1 | 1, 0; 2048: 0, 1 | missing, missing."""
    values = {(1024, 0): (1, 1), (1024, 0.5): (1, 0), (2048, 0): (0, 1), (2048, 0.5): (None, None)}
    return [
        row(f"{length}/{depth}/{n}", value, {"length": length, "depth": depth})
        for (length, depth), found in values.items()
        for n, value in enumerate(found)
    ]


def report(folder: Path, tasks: dict[str, Any], **top: Any) -> Page:
    return Page(write_report(write_run(folder, tasks, **top)).read_text(encoding="utf-8"))


def test_numbers_grid_and_missing(tmp_path: Path) -> None:
    page = report(tmp_path, {"hunt": grid_task(four_cells())})
    # 1,1,1,0,0,1: mean 2/3, standard deviation 0.5164, / sqrt(6) = 0.2108, x t(5) 2.5706 = 0.542
    assert page.row("hunt") == [["0.667 ± 0.542", "1", "8", "2"]]
    # 1,1,1,0: sd 0.5 / sqrt(4) = 0.25, x t(3) 3.1824 = 0.796
    assert page.row("1,024") == [["0.750 ± 0.796", "4", "0"]]
    # 0,1: sd 0.7071 / sqrt(2) = 0.5, x t(1) 12.7062 = 6.353
    assert page.row("2,048") == [["0.500 ± 6.353", "4", "2"]]
    assert page.row("0%") == [["1.00", "0.50"], ["0.750 ± 0.796", "4", "0"]]
    assert page.row("50%") == [["0.50", "missing"], ["0.500 ± 6.353", "4", "2"]]
    assert "missing 2048/0.5/0" in " ".join(page.text.split())
    assert "count as no 0: 2" in page.text
    assert page.text.count("What is 1024/0/0?") == 2, "in the folded line, and in full"
    assert [of["aria-label"] for tag, of in page.tags if tag == "svg"] != []
    assert all(of.get("role") == "img" and of.get("aria-label") for tag, of in page.tags if tag == "svg")
    assert (tmp_path / "hunt.png").read_bytes().startswith(b"\x89PNG")


def test_curve_has_a_gap_where_a_score_is_missing(tmp_path: Path) -> None:
    rows = [row(f"{n}/{i}", None if n == 2 else i, {"length": n, "depth": 0}) for n in (1, 2, 3, 4) for i in (0, 1)]
    page = report(tmp_path, {"hunt": grid_task(rows)})
    path = next(of["d"] for tag, of in page.tags if tag == "path" and of.get("class") == "line")
    assert path is not None
    assert [path.count("M"), path.count("L")] == [2, 1]
    assert page.row("2") == [["missing", "2", "2"]]


def test_all_missing_and_no_rows(tmp_path: Path) -> None:
    nothing = grid_task([row("a", None, {"length": 1, "depth": 0}), row("b", None, {"length": 2, "depth": 0})])
    loss = {
        "loss": 1.25,
        "perplexity": 3.49,
        "by_length": {
            "0": {"loss": 1.5, "tokens": 12000, "samples": 4},
            "4096": {"loss": 1.0, "tokens": 9, "samples": 1},
        },
    }
    page = report(tmp_path, {"hunt": nothing, "heldout": (loss, [])})
    assert page.row("hunt") == [["missing", "1", "2", "2"]]
    assert page.row("heldout") == [["1.250 (loss)", "", "", ""]]
    assert page.row("0") == [["1.500", "12,000", "4"]]
    assert "lower is better" in page.text
    assert "no rows of single questions" in page.text
    assert "0.000" not in page.text


def test_nothing_loads_and_nothing_escapes(tmp_path: Path) -> None:
    about = {"length": 1, "depth": 0, "query": NASTY, NASTY: NASTY}
    verdicts = [{"rating": None, "reply": NASTY}, {"rating": 3, "reply": "[[3]]"}]
    odd = "bell \x07 nul \x00 half \ud800 c1 \x9b end \uffff 你好 \u202eback"
    rows = [
        row(NASTY, 1, about, question=NASTY, answer=NASTY, reference=[NASTY, "two"], verdicts=verdicts),
        row("odd", 0, {"length": 1, "depth": 0}, answer=odd, reference=None),
        row("none", None, {"length": 1, "depth": 0}, answer=None, finish="request failed: <b>"),
    ]
    summary, _ = grid_task(rows, settings={"path": NASTY}, judge={"model": NASTY})
    summary["by_kind"] = {NASTY: {"score": 1, "questions": 1, "missing": 0}, "b": {"score": None}}
    tasks = {"hunt": (summary, rows)}
    page = report(tmp_path, tasks, model=f"runs/{NASTY}", endpoint="http://host:8000/v1?a=<b>")
    assert page.loads() == []
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "img" not in [tag for tag, _ in page.tags]
    assert page.text.count(NASTY) > 8, "shown to the letter"
    assert "bell ␇ nul ␀ half \ufffd c1 \ufffd end \ufffd 你好" in page.text
    assert "(none: request failed: <b>)" in page.text
    assert "verdict 1: no rating that can be read" in page.text
    assert "verdict 2: rating 3" in page.text
    assert not any(ord(sign) < 32 and sign not in "\n\t" for sign in (tmp_path / "report.html").read_text("utf-8"))
    style = (tmp_path / "report.html").read_text("utf-8").partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_controls_stand_last_and_count_in_no_interval(tmp_path: Path) -> None:
    rows = four_cells()
    controls = [row(f"{n}/alone", 0, {"length": None, "depth": None}) for n in range(9)]
    page = report(tmp_path, {"hunt": (grid_task(rows)[0], controls + rows)})
    assert page.row("hunt")[0][0] == "0.667 ± 0.542"
    assert page.text.count("(a control, not in the score)") == 9
    assert page.text.index("1024/0/0") < page.text.index("0/alone")


def test_the_order_of_rows_is_nothing(tmp_path: Path) -> None:
    rows = four_cells()
    pages = []
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        write_run(tmp_path, {"hunt": grid_task(four_cells())})
        (tmp_path / "hunt.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        pages.append(write_report(tmp_path).read_text())
    assert pages[0] == pages[1] == pages[2]
    assert pages[0].index("2048/0.5/0") < pages[0].index(">0.000<") < pages[0].index(">1.000<")


def test_many_questions_and_huge_answers_stay_small(tmp_path: Path) -> None:
    long = "word " * 200_000  # 1 MB
    rows = [row(f"q{n}", n / 5000, {"n": n}, answer=long if n % 100 == 0 else "x" * 3000) for n in range(5000)]
    summary = {"score": 0.5, "best": 1, "questions": 5000, "missing": 0}
    page = report(tmp_path, {"big": (summary, rows)})
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    assert f"{SHOWN} of 5,000 are shown" in page.text
    assert "all are in big.jsonl" in page.text
    shown = [of for tag, of in page.tags if tag == "details" and of.get("class") == "question"]
    assert len(shown) == SHOWN
    assert {"What is q0?", "What is q4999?"} <= set(page.text.split("\n")), "lowest and highest"
    assert "characters ...]" in page.text
    assert {of["data-score"] for of in shown} == {"low", "high"}


def test_means_over_groups_have_their_own_interval(tmp_path: Path) -> None:
    """Of 2 and 4 values: strata with variances 2 and 4, so se^2 = (2/2 + 4/4) / 4 and Welch's df = 4 / (1 + 1/3)."""
    rows = [
        row(f"{d}{n}", v, {"dataset": d})
        for d, found in (("a", (0, 2)), ("b", (10, 10, 12, 14)))
        for n, v in enumerate(found)
    ]
    variance = (2 / 2 + (1.5**2 * 2 + 0.5**2 + 2.5**2) / 3 / 4) / 4
    freedom = int(variance**2 / ((1 / 4) ** 2 / 1 + (variance - 1 / 4) ** 2 / 3))
    half = {1: 12.7062, 2: 4.3027, 3: 3.1824}[freedom] * variance**0.5
    summary = {"score": 6.25, "best": 100, "mean_over": "dataset", "questions": 6, "missing": 0}
    page = report(tmp_path, {"mix": (summary, rows)})
    assert page.row("mix") == [[f"6.25 ± {half:.2f}", "100", "6", "0"]]


def test_files_with_faults(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither results\.json nor"):
        write_report(tmp_path)
    write_run(tmp_path, {"hunt": grid_task(four_cells())})
    shutil.copy(tmp_path / "hunt.jsonl", tmp_path / "copy")
    (tmp_path / "hunt.jsonl").write_text((tmp_path / "copy").read_text() + '{"half')
    with pytest.raises(UserError, match=r"hunt\.jsonl, line 9 is no JSON"):
        write_report(tmp_path)
    (tmp_path / "hunt.jsonl").write_text('{"answer": 1}\n')
    with pytest.raises(UserError, match=r"line 1 lacks id, about or scores"):
        write_report(tmp_path)


def test_the_terminal_shows_the_grid() -> None:
    summary, _ = grid_task(four_cells(), score_without_document=0.25)
    with console.capture() as captured:
        console.print(summary_table("hunt", summary))
    lines = [line.split() for line in captured.get().splitlines()]
    assert ["1,024", "1.00", "0.50", "0.75"] in lines
    assert ["2,048", "0.50", "missing", "0.50"] in lines
    assert ["mean", "0.75", "0.50", "0.67"] in lines
    assert ["without", "the", "document", "0.250"] in lines
    assert ["all", "0.667", "8", "2"] in lines
