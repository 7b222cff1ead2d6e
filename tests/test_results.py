"""make results: stages that are skipped, stopped and begun again; figures of the page against those worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from longalign.chat.answer import Answer
from longalign.chat.session import Session, document_at
from longalign.config import compose_config
from longalign.data.synthetic import base_texts, conversations
from tests.conftest import write_jsonl

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import results  # noqa: E402
import results_collect  # noqa: E402
import results_page  # noqa: E402
import results_stages  # noqa: E402


def stage(folder: Path, code: str, name: str = "a", **more: Any) -> results_stages.Stage:
    words = [sys.executable, "-c", code, str(folder / name)]
    return results_stages.Stage(name, folder / f"{name}.done", lambda: words, folder, **more)


DONE = "import os,sys,time; open(sys.argv[1] + '.done', 'w').close(); "


def test_what_a_stage_reads_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = tmp_path / "asked"
    asked.write_text("who?")
    echo = stage(tmp_path, DONE + "print(sys.stdin.read())", input=asked, output=tmp_path / "out")
    assert results_stages.run_all([echo], tmp_path / "logs") == 0
    assert (tmp_path / "out").read_text() == "who?\n"
    assert f" < {asked}\n" in capfd.readouterr().out


def test_a_stage_is_noted_and_its_output_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answers = stage(tmp_path, DONE + "time.sleep(0.2); print('answer')", output=tmp_path / "out")
    assert results_stages.run_all([answers], tmp_path / "logs") == 0
    assert (tmp_path / "out").read_text() == "answer\n"
    noted = json.loads((tmp_path / "stages.jsonl").read_text())
    assert noted["stage"] == "a"
    assert noted["command"] in capfd.readouterr().out
    assert 0 < noted["seconds"] < 60
    assert results_stages.run_all([answers], tmp_path / "logs") == 0
    assert "$" not in capfd.readouterr().out, "it is done"


def test_time_that_is_up_stops_a_stage_and_leaves_nothing(tmp_path: Path) -> None:
    """The command gets SIGTERM, as a run that is to save needs it, and is waited for."""
    code = "import os,signal,sys,time\nos.chdir(os.path.dirname(sys.argv[1]))\nsignal.signal(signal.SIGTERM, lambda *_: (open('saved','w'), sys.exit(143)))\n"
    code += "print('half', flush=True)\nopen('ready','w')\ntime.sleep(60)"
    began = time.monotonic()
    assert results_stages.run_all([stage(tmp_path, code, output=tmp_path / "out")], tmp_path / "logs", seconds=3) == 0
    assert time.monotonic() - began < 30
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "stages.jsonl").exists()


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_failure_ends_what_needs_it_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str], gpus: int) -> None:
    broken = stage(tmp_path, "print('why', flush=True); raise SystemExit(7)", output=tmp_path / "out")
    needy = stage(tmp_path, DONE, "b", needs=(broken.done,))
    other = stage(tmp_path, DONE, "c")
    assert results_stages.run_all([broken, needy, other], tmp_path / "logs", gpus) == 7
    assert [json.loads(line)["stage"] for line in (tmp_path / "stages.jsonl").read_text().splitlines()] == ["c"]
    assert not (tmp_path / "out").exists()
    said = capfd.readouterr().out
    assert "[a] failed with exit code 7" in said
    assert f"[b] was not run: it needs {broken.done}" in said


def test_stages_on_gpus_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """a and b can only end if they run at the same time; c needs both GPUs, and d what c makes."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    tell = "import os,sys,time\nopen(sys.argv[1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    wait = "while not os.path.exists(os.path.join(os.path.dirname(sys.argv[1]), '{}')): time.sleep(0.05)\n"
    end = "print('said by', sys.argv[1])\nopen(sys.argv[1] + '.done', 'w')"
    a, b = (stage(tmp_path, tell + wait.format(other) + end, me) for me, other in (("a", "b"), ("b", "a")))
    c = stage(tmp_path, tell + end, "c", gpus=2)
    d = stage(tmp_path, tell + end, "d", needs=(c.done,))
    more = stage(tmp_path, tell + end, "e", gpus=3)
    assert results_stages.run_all([d, a, b, c, more], tmp_path / "logs", 2, 60) == 2
    assert {(tmp_path / name).read_text() for name in "ab"} == {"5", "7"}
    assert sorted((tmp_path / "c").read_text().split(",")) == ["5", "7"]
    assert (tmp_path / "d").read_text() in ("5", "7")
    rows = [json.loads(line) for line in (tmp_path / "stages.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows[2:]] == ["c", "d"]
    assert [row["machine"][:5] for row in rows] == ["1 of ", "1 of ", "2 of ", "1 of "]
    said = capfd.readouterr().out
    assert "\nsaid by" not in said
    assert (tmp_path / "logs/a.log").read_text() == f"said by {tmp_path}/a\n"
    assert "[e] was not run: it needs 3 GPUs" in said
    assert not list(tmp_path.glob("*.log")), "a run's folder must be empty for `train`"


def test_stages_that_share_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of a part each can only end if they run at the same time, and on two GPUs two run on each; the next, which
    takes a whole GPU, begins when one is empty again."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    begun = "import glob,os,sys,time\nhere = os.path.dirname(sys.argv[1])\n"
    begun += "open(sys.argv[1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    meet = "while len(glob.glob(here + '/part?')) < 4: time.sleep(0.05)\n"
    count = "open(here + '/beside', 'w').write(str(len(glob.glob(here + '/part?.done'))))\n"
    end = "open(sys.argv[1] + '.done', 'w')"
    of_four = [stage(tmp_path, begun + meet + end, f"part{n}", parts=1) for n in range(4)]
    whole = stage(tmp_path, begun + count + end, "whole")
    assert results_stages.run_all([*of_four, whole], tmp_path / "logs", 2, 60) == 0
    seen = [(tmp_path / f"part{n}").read_text() for n in range(4)]
    assert sorted(seen) == ["5", "5", "7", "7"]
    assert int((tmp_path / "beside").read_text()) >= 2, "those of its GPU had ended"


# -- the page ----------------------------------------------------------------------------------------------------


def run_of(needle: float, long: float, short: float, step_s: list[float]) -> dict[str, Any]:
    lengths = {"1024": {"score": 1.0}, "65000": {"score": needle}, "8192": {"score": 0.5}}
    heldout = {"by_source": {"long": {"loss": long}, "short": {"loss": short}}}
    metrics = {
        "step": [1, 2, 3, 4, 5],
        "tokens": [9, 9, 9, 9, 1000],
        "step_s": step_s,
        "loss_by_length": {"<1k": [1.0, 2.0]},
    }
    grid = {"grid": {"1024": {"0": 1.0}}, "grid_axes": ["prompt tokens", "depth"], "best": 1}
    tasks = {"needle": {"score": needle, "by_length": lengths, **grid}, "heldout": heldout}
    return {"stages": [], "eval": {"tasks": tasks}, "train": {"peak_mem_gb": 7.5, "metrics": metrics}}


@pytest.fixture
def records() -> dict[str, Any]:
    return {
        "untouched": {"stages": [], "eval": run_of(0.0, 4.0, 2.0, [])["eval"]},
        "full/packing/1": run_of(0.9, 1.0, 2.02, [10, 50, 20, 20, 20]),
        "full/packing/2": run_of(0.7, 1.2, 2.06, [10, 50, 20, 20, 20]),
        "full/naive/1": run_of(0.8, 3.0, 2.2, [60, 0, 0, 0, 180]),
        "full/naive/2": run_of(0.8, 3.1, 2.2, [60, 0, 0, 0, 180]),
        "full/packing+weighting/1": run_of(0.1, 1.0, 2.0, [1, 1, 1, 1, 1]),
    }


def cells(table: str) -> dict[str, dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {row[0]: dict(zip(lines[0], row, strict=True)) for row in lines[2:]}


def test_figures_of_a_comparison(records: dict[str, Any]) -> None:
    rows = {"packing": "full/packing", "naive": "full/naive"}
    text = results_page.comparison(records, rows, {"untouched": "untouched"})
    table = cells(text)
    packing = table["packing"]
    assert packing["seeds"] == "2"
    assert packing["needle"] == "0.80 (0.70 to 0.90)"
    assert packing["needle, longest"] == "0.80 (0.70 to 0.90)"
    assert packing["short loss against untouched"] == "+2.0% (+1.0% to +3.0%)"
    assert packing["minutes"] == "2.0"
    assert packing["tokens/s"] == "50"  # 1000 tokens in 20 s after four steps
    assert packing["retrieval"] == "not measured"
    assert table["untouched"]["long loss"] == "4.000"
    assert table["untouched"]["minutes"] == ""
    told = text.splitlines()[-1]
    assert "needle, needle, longest" in told  # rows 0.8 and 0.8, seeds 0.2 apart
    assert "long loss" not in told  # 1.1 and 3.05, seeds 0.2 apart
    assert "short loss" not in told  # 2.04 and 2.2, seeds 0.04 apart


def test_kinds_by_length(records: dict[str, Any]) -> None:
    for seed, score in ((1, 0.5), (2, 1.0)):
        grid = {"4096": {"multi_key": 0.0}, "65000": {"multi_key": score}}
        records[f"full/packing/{seed}"]["eval"]["tasks"]["retrieval"] = {"grid": grid}
    table = cells(results_page.kinds_by_length(records, "full/packing"))
    assert table == {"multi key": {"": "multi key", "4,096": "0.00", "65,000": "0.75 (0.50 to 1.00)"}}
    assert results_page.kinds_by_length(records, "full/naive") == "not measured"


def test_two_gpus(records: dict[str, Any]) -> None:
    row = {"settings": {"name": "packing"}, "tokens_per_s_per_gpu": 41.6, "idle": 0.125}
    failed = {"settings": {"name": "naive"}, "failed": "out of memory"}
    records["2gpu"] = {"stages": [], "bench": {"rows": [row, failed]}}
    table = cells(results_page.two_gpus(records))
    assert list(table["packing"].values()) == ["packing", "50", "42", "12.5%"]
    assert list(table["naive"].values())[2:] == ["not measured", "not measured"]


def test_rows_of_one_seed_are_not_said_to_be_alike(records: dict[str, Any]) -> None:
    rows = {"packing": "full/packing", "both": "full/packing+weighting"}
    assert "no two rows" not in results_page.comparison(records, rows, {})


def test_a_row_takes_its_own_runs_alone(records: dict[str, Any]) -> None:
    assert len(results_page.seeds(records, "full/packing")) == 2
    assert len(results_page.seeds(records, "full/packing+weighting")) == 1
    assert len(results_page.seeds(records, "untouched")) == 1


def test_the_page_without_figures_and_with(tmp_path: Path, records: dict[str, Any]) -> None:
    """What nobody measured is said so; hand-written words stay; making it again changes nothing."""
    words, page, folder = ROOT / "docs/results.md", tmp_path / "docs/results.md", tmp_path / "docs/results"
    folder.mkdir(parents=True)
    results_page.write(folder, page, words)
    empty = page.read_text()
    assert empty.count("<!-- begin ") == words.read_text().count("<!-- begin ") >= 12
    assert empty.count("not measured") > 12
    assert "| packing | not measured | not measured |" in empty
    for name, record in records.items():
        (folder / f"{name.replace('/', '_')}.json").write_text(json.dumps(record))
    results_page.write(folder, page, page)
    full = page.read_text()
    assert "0.80 (0.70 to 0.90)" in full
    assert [line for line in full.splitlines() if line.startswith("#")] == [
        line for line in empty.splitlines() if line.startswith("#")
    ]
    results_page.write(folder, page, page)
    assert page.read_text() == full


# -- the stages themselves ---------------------------------------------------------------------------------------


def test_rows_are_given_the_steps_of_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokens = Path("data/smollm2/tokens")
    about = {
        "full": {"samples": 101, "tokens": 9000, "longest": 900},
        "none": {"samples": 60, "tokens": 999, "longest": 30},
    }
    for name, data in about.items():
        (tokens / name).mkdir(parents=True)
        (tokens / name / "manifest.json").write_text(json.dumps(data))
    results.PLAN.parent.mkdir(parents=True)
    results.PLAN.write_text(json.dumps({"steps": 10}))
    assert results.same_steps("full", "naive") == results.same_steps("full", "sorted") == ["strategy.batch_size=11"]
    assert results.same_steps("none", "packing+weighting") == [results.BEST_FIT, "strategy.pack_tokens=100"]
    assert results.same_steps("full", "packing") == [results.BEST_FIT]
    assert results.same_steps("full", "balanced") == []
    words = results.two_gpu_stage(results.Longalign({}), Path("model")).command()
    (items,) = (word for word in words if word.startswith("bench.strategies="))
    given = compose_config("bench", [items]).bench.strategies
    packed = ["packing+weighting packer=best_fit", "packing packer=best_fit"]
    assert given == [packed[0], "naive batch_size=11", "sorted batch_size=11", packed[1], "balanced"]


def test_downloads_are_not_wanted_where_their_outcome_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a network, to which the documents and the model were brought."""
    monkeypatch.chdir(tmp_path)
    stages = lambda: [*results.model_stages(results.Longalign({})), *results.wheel_stages()]
    assert [stage.done.exists() for stage in stages()] == [False] * 5
    for file in (
        "models/smollm2-135m/config.json",
        *(f"data/smollm2/{part}/documents.json" for part in ("train", "test")),
    ):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    assert [stage.done.exists() for stage in stages()] == [True] * 5


class Replies:
    """A model that says these, one after the other."""

    context = None

    def __init__(self, replies: list[str]):
        self.replies = iter(replies)

    def count(self, messages: Any) -> int:
        return len(messages)

    def answer(self, messages: Any, write: Any) -> Answer:
        write(next(self.replies))
        return Answer(1, 0, 1, cut=False)


def test_a_chat_asks_all_that_a_document_is_asked_in_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the questions are, how the transcript is kept and what the page makes of it."""
    monkeypatch.chdir(tmp_path)
    results.TEST.mkdir(parents=True)
    results.SHOWN.mkdir(parents=True)
    document = "a line\n\na paragraph"
    talk = [
        ("user", f"{document}\n\nWho?\n\nAnswer:"),
        ("assistant", "the cat"),
        ("user", "When?"),
        ("assistant", "1 | 2"),
    ]
    row = {"messages": [{"role": role, "content": text} for role, text in talk]}
    longer = {"messages": [{"role": "user", "content": "x" * 500}]}
    (results.TEST / "long.jsonl").write_text(json.dumps(longer) + "\n" + json.dumps(row) + "\n")
    (chat,) = (stage for stage in results.last_stages(results.Longalign({}), 5) if stage.name == "chat")
    assert f"file={results.SHOWN}/document.txt" in chat.command()
    assert (results.SHOWN / "document.txt").read_text() == document
    assert chat.input
    assert chat.input.read_text() == f"Who?\nWhen?\n/save {chat.done}\n"
    session = Session(Replies(["the cat", "1 | 3"]), lambda _: None, lambda _: None)
    session.wait_with((document_at("file", results.SHOWN / "document.txt"),))
    for line in chat.input.read_text().splitlines():
        session.take(line)
    results_collect.note(results.SHOWN, "chat", "longalign chat", 1, "CPU")
    record = results_collect.record(results.SHOWN)
    turns = [{"question": "Who?", "answer": "the cat", "expected": "the cat"}]
    turns += [{"question": "When?", "answer": "1 | 3", "expected": "1 | 2"}]
    assert record["chat"] == turns
    told = results_page.transcript(record)
    assert "| When? | 1 \\| 3 | 1 \\| 2 |" in told
    assert told.endswith("Word for word right: 1 of 2.")
    session.undo()  # as if the second question had been refused
    session.take(f"/save {chat.done}")
    assert results_collect.talk(results.SHOWN) == [turns[0], {**turns[1], "answer": ""}]


def test_a_stage_run_again_stands_once(tmp_path: Path) -> None:
    for seconds in (1, 2):
        results_collect.note(tmp_path, "model", "convert", seconds, "CPU")
    results_collect.note(tmp_path, "text", "prepare", 3, "CPU")
    assert [row["seconds"] for row in results_collect.stages_of(tmp_path)] == [2, 3]


def test_numbers_are_shortened() -> None:
    assert results_collect.short({"a": [1.23456789, 65536, None, "1.23456789"]}) == {
        "a": [1.2346, 65536, None, "1.23456789"]
    }


@pytest.mark.slow
def test_smoke_continued_training_and_its_evaluation(tmp_path: Path) -> None:
    """The smallest part that has data, training, evaluation and page in it; and nothing of it is done twice."""
    data = tmp_path / "data/smollm2"
    (data / "test/documents").mkdir(parents=True)
    (data / "test/documents/a.txt").write_text((ROOT / "docs/design.md").read_text())
    (data / "test/documents.json").write_text('{"documents": []}')
    (data / "train").mkdir()
    write_jsonl(data / "train/text.jsonl", list(base_texts(6000, seed=0)))
    for kind in ("long", "short"):
        write_jsonl(data / f"test/{kind}.jsonl", list(conversations(kind, "test", 4, seed=0)))
    command = [sys.executable, str(ROOT / "scripts/results.py"), "--smoke", str(tmp_path), "--only"]
    parts = ["tokens:base", "tokens:heldout", "*:base"]
    done = subprocess.run([*command, *parts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "docs/results/base.json").read_text())
    assert [stage["stage"] for stage in record["stages"]] == ["train:base", "eval:base"]
    steps = len((tmp_path / "runs/smollm2/base/metrics.jsonl").read_text().splitlines())
    assert record["train"]["metrics"]["step"] == list(range(1, steps + 1))
    assert set(record["eval"]["tasks"]) == {"heldout", "needle", "retrieval"}
    page = (tmp_path / "docs/results.md").read_text()
    assert f"| continued training alone | 1 | {record['eval']['tasks']['needle']['score']:.2f} |" in page
    assert (tmp_path / "docs/images/results-needle-continued.png").is_file()
    again = subprocess.run([*command, *parts], capture_output=True, text=True)
    assert again.returncode == 0
    assert "$ longalign" not in again.stdout
