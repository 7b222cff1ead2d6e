"""bench.strategies: every sample is run once by every strategy, and the figures follow from what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from longalign.bench import ranks, strategies
from longalign.bench.plot import plot_strategies
from longalign.bench.summary import Work, idle_share, summarise, work_of
from longalign.bench.tokens import write_random
from longalign.compare import given, strategy_of
from longalign.config import compose_config
from longalign.data.batch import load_batch
from longalign.data.packing import deal
from longalign.data.plan import Pack, read_data
from longalign.errors import UserError
from longalign.model.cost import Cost, PackSeconds
from longalign.schema import Config
from tests.conftest import in_process

LENGTHS = np.array([400, 30, 25, 160, 60, 12, 90, 45, 230, 10, 70, 33])
SMALL = ["strategy.packs_per_step=2", "strategy.strata=1", "strategy.batch_size=4", "strategy.group_size=2"]
ITEMS = ["packing packer=next_fit", "naive", "sorted", "balanced"]


@pytest.fixture(scope="module")
def random_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "tokens"
    write_random(folder, LENGTHS, LENGTHS // 5, vocab=500, seed=3)
    return folder


@pytest.fixture
def words(random_data: Path, tmp_path: Path) -> list[str]:
    layout = ["model=tiny", "cluster=cpu", "cluster.processes=2", "max_length=512"]
    return [*layout, f"data_dir={random_data}", f"output_dir={tmp_path}/out", *SMALL]


def items(*chosen: str) -> str:
    return f"bench.strategies=[{','.join(chosen)}]"


def prepared(words: list[str], folder: Path) -> tuple[Config, dict[str, Work]]:
    config = strategies.resolve(compose_config("bench", words))
    chosen = {item: strategy_of(item, given(config.strategy)) for item in config.bench.strategies}
    return config, strategies.prepare(config, chosen, folder)


# -- figures ----------------------------------------------------------------------------------------------


def test_seconds_are_fitted_above_the_time_that_launches_take() -> None:
    documents = [[10], [1000], [2000], [500, 500, 1000], [20]]
    of = lambda pack: max(0.3, sum(1e-3 * s + 1e-6 * s * s for s in pack))
    fitted = PackSeconds.fit(documents, [of(pack) for pack in documents])
    assert fitted.least == 0.3
    assert fitted.cost == pytest.approx((1e-3, 1e-6))
    assert fitted.of([5]) == 0.3
    assert fitted.of([1000, 100]) == pytest.approx(2.11)
    with pytest.raises(ValueError, match="to tell both costs"):
        PackSeconds.fit([[10], [10]], [0.3, 0.9])


def test_idle_is_the_share_that_ranks_wait_weighted_by_time() -> None:
    # 3 s in which the second rank works a third of the time, 1 s in which both work
    assert idle_share(np.array([[6.0, 2.0], [5.0, 5.0]]), np.array([3.0, 1.0])) == pytest.approx(0.25)
    assert idle_share(np.array([[6.0], [5.0]]), np.array([3.0, 1.0])) == 0


def made_up(micro_steps: list[list[list[int]]], samples: int, tokens: int, epoch_tokens: int) -> Work:
    arrays = [[np.array(mine) for mine in of_groups] for of_groups in micro_steps]
    return Work([], arrays, samples, tokens, 6e12, epoch_tokens, Cost(1.0, 0.0))


def step(seconds: float, samples: int, tokens: int, peak: int, *micro: float) -> dict[str, Any]:
    counts = {"samples": samples, "tokens": tokens, "packs": samples, "peak_bytes": peak}
    return {"seconds": seconds, **counts, "micro_seconds": list(micro)}


def test_a_report_follows_from_its_steps() -> None:
    """A document of s tokens takes s/1000 + (s/1000)^2 seconds: of 1000 2 s, of 2000 6 s, of 3000 12 s."""
    works = {
        "naive": made_up([[[3000], [1000]], [[2000], [1000]]], 4, 7000, 14_000),
        "packing": made_up([[[3000, 1000], [2000, 1000]]], 4, 7000, 14_000),
    }
    report = {
        "ranks": 2,
        "rows": [
            {"strategy": "sorted", "failed": "out of memory"},
            {
                "strategy": "naive",
                "settings": {"name": "naive"},
                "steps": [step(13, 2, 4000, 7, 12.0), step(7, 2, 3000, 9, 6.0)],
            },
            {"strategy": "packing", "settings": {"name": "packing"}, "steps": [step(16, 4, 7000, 8, 14.0)]},
        ],
    }
    summarise(report, works)
    failed, naive, packing = report["rows"]
    assert failed == {"strategy": "sorted", "failed": "out of memory"}
    assert report["fit"]["cost"] == pytest.approx([1e-3, 1e-6])
    assert report["fit"]["least"] == 6.0
    assert report["fit"]["largest_error"] == pytest.approx(0)
    assert (naive["seconds"], naive["step_s"], naive["samples"], naive["peak_bytes"]) == (20, 10, 4, 9)
    assert naive["samples_per_s"] == pytest.approx(4 / 20)
    assert naive["tokens_per_s_per_gpu"] == pytest.approx(7000 / 20 / 2)
    assert naive["tflops_per_gpu"] == pytest.approx(6 / 20 / 2)
    assert naive["epoch_s"] == pytest.approx(40), "half of the epoch's tokens took 20 s"
    assert (naive["epoch_of_naive"], packing["epoch_of_naive"]) == (1, pytest.approx(16 / 20))
    # documents of 1000 would take 2 s, but the fastest micro-step took 6: 9 of 12 s, then 6 of 6
    assert naive["idle"] == pytest.approx(12 * 0.25 / 18)
    assert packing["idle"] == pytest.approx(1 - (14 + 8) / 2 / 14)


def test_packs_that_are_too_alike_wait_by_flops() -> None:
    report = {
        "ranks": 2,
        "rows": [{"strategy": "p", "settings": {"name": "packing"}, "steps": [step(3, 2, 800, 0, 2.0)]}],
    }
    summarise(report, {"p": made_up([[[600], [200]]], 2, 800, 800)})
    assert report["fit"] is None
    assert report["rows"][0]["idle"] == pytest.approx(1 - 400 / 600)
    assert report["rows"][0]["epoch_of_naive"] is None
    assert "too alike" in strategies.told_fit(report)


# -- what is run ------------------------------------------------------------------------------------------


class FakeTraining:
    """In train_step's place: notes the packs, and makes a micro-step of each sample, in slices of 100 tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.steps: list[list[int]] = []
        here = SimpleNamespace(get_rank=lambda: 0, all_reduce=lambda *_: None, ReduceOp=dist.ReduceOp)
        monkeypatch.setattr(ranks, "dist", here)
        monkeypatch.setattr(ranks, "train_step", self.train_step)
        monkeypatch.setattr(ranks, "over_ranks", lambda seconds, shares: [])

    def train_step(self, engine: Any, dataset: Any, packs: list[Pack], *rest: Any) -> torch.Tensor:
        _, _, trace = rest
        self.steps.append([sample for pack in packs for sample in pack.sample_ids])
        trace.enter("data")
        for sample in self.steps[-1]:
            ids = [sample]
            for _ in range(0, LENGTHS[sample], 100):
                for phase in ("forward", "backward", "optimizer", "data"):
                    trace.enter(phase)
                trace.losses.append((ids, torch.zeros(())))
        return torch.zeros(3)


def test_only_what_is_new_is_warmed_up(words: list[str], tmp_path: Path) -> None:
    """Naive after packing has packs of other kernels, but none costlier or fuller; sorted after naive has neither."""
    works = prepared([*words, items("packing", "naive", "sorted")], tmp_path)[1]
    packs = {item: [pack for step in work.steps for pack in step] for item, work in works.items()}
    before = lambda items: [pack for item in items for pack in packs[item]]
    new = lambda item, *ran: ranks.warm_up_packs(works[item].steps, 2, before(ran), LENGTHS)
    assert {pack.tokens for pack in new("packing")} >= {max(pack.tokens for pack in packs["packing"])}
    assert [pack.tokens for pack in new("naive", "packing")] == [10, 10, 70, 70, 160, 160, 10]
    assert new("sorted", "packing", "naive") == new("naive", "sorted") == []


@pytest.mark.parametrize("groups", [1, 3])
def test_every_rank_meets_every_kernel_before_it_is_timed(groups: int) -> None:
    """Those of random packs, dealt as in training, and that of a rank without a pack; costliest and fullest, too."""
    random = np.random.default_rng(groups)
    for _ in range(50):
        lengths = random.choice([3, 60, 64, 65, 90, 128, 129, 500, 5000], size=40)
        cuts = np.sort(random.choice(np.arange(1, 40), size=int(random.integers(1, 39)), replace=False))
        samples = np.split(np.arange(40), cuts)
        packs = [Pack(s.tolist(), int(lengths[s].sum()), len(s), 1, float((lengths[s] ** 2).sum())) for s in samples]
        warm = ranks.warm_up_packs([packs[:7], packs[7:]], groups, [], lengths)
        met: list[set[tuple[int, int] | None]] = [set() for _ in range(groups)]
        for micro in deal([pack.cost for pack in warm], groups, 1):
            for group, mine in enumerate(micro):
                met[group] |= {ranks.kernels_of(lengths[warm[mine[0]].sample_ids]) if mine else None}
        assert all(of_group >= {ranks.kernels_of(lengths[pack.sample_ids]) for pack in packs} for of_group in met)
        assert all(None in of_group for of_group in met[1:]), "only the first has a pack at every micro-step"
        assert {max(p.cost for p in packs), max(p.tokens for p in packs)} <= {
            x for p in warm for x in (p.cost, p.tokens)
        }


@pytest.mark.parametrize(
    ("documents", "alike", "unlike"),
    [
        ([1000], [200], [1000, 1000]),  # one document has no cu_seqlens
        ([40], [64], [65]),  # tiles of the backward pass
        ([70, 128], [65, 3], [129, 3]),
        ([9] * 256, [9, 9], [9] * 257),  # where a table of tiles is looked up
    ],
)
def test_kernels_by_documents(documents: list[int], alike: list[int], unlike: list[int]) -> None:
    kernels = lambda lengths: ranks.kernels_of(np.array(lengths))
    assert kernels(documents) == kernels(alike) != kernels(unlike)


@pytest.mark.parametrize("item", ITEMS)
def test_every_sample_is_run_once(item: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, works = prepared([*words, items(item), "bench.warm_up=2"], tmp_path)
    fake, work = FakeTraining(monkeypatch), works[item]
    dataset, engine = read_data(config.data_dir)[0], SimpleNamespace(device=torch.device("cpu"))
    rows = ranks.measure(engine, dataset, work, config, None, [], item)  # type: ignore[arg-type]
    warm, timed = fake.steps[:2], fake.steps[2:]
    assert sorted(sample for step in timed for sample in step) == list(range(len(LENGTHS)))
    assert all(0 in step and step.count(0) % 2 == 0 for step in warm), "the longest sample, on both ranks"
    assert [row["samples"] for row in rows] == [len(step) for step in timed]
    assert [row["tokens"] for row in rows] == [LENGTHS[step].sum() for step in timed]
    assert [len(row["micro_seconds"]) for row in rows] == [len(step) for step in timed], "slices are added up"
    assert sorted(s for of_groups in work.micro_steps for mine in of_groups for s in mine) == sorted(LENGTHS)
    assert (work.samples, work.tokens, work.epoch_tokens) == (len(LENGTHS), LENGTHS.sum(), LENGTHS.sum())


def test_the_first_rank_has_the_costliest_packs(words: list[str], tmp_path: Path) -> None:
    _, works = prepared([*words, items("naive")], tmp_path)
    for first, second in works["naive"].micro_steps:
        assert first.max() >= second.max(initial=0)


def test_steps_limits_what_is_run_and_not_the_epoch(words: list[str], tmp_path: Path) -> None:
    _, works = prepared([*words, items("naive"), "bench.steps=2"], tmp_path)
    work = works["naive"]
    assert (len(work.steps), work.packs, work.samples) == (2, 8, 8)
    assert work.tokens < work.epoch_tokens == LENGTHS.sum()
    assert work_of(tmp_path / "strategies" / "0").tokens == work.tokens


def test_sequence_parallel_ranks_are_one_group(words: list[str], tmp_path: Path) -> None:
    _, works = prepared([*words, items("naive"), "cluster.sequence_parallel=2"], tmp_path)
    assert all(len(of_groups) == 1 for of_groups in works["naive"].micro_steps)
    assert works["naive"].predicted_idle == 0


def test_settings_of_an_item_and_of_all(words: list[str]) -> None:
    config = compose_config("bench", [*words, items("packing packer=next_fit packs_per_step=6", "sorted")])
    assert config.bench.strategies == ["packing packer=next_fit packs_per_step=6", "sorted"]
    packing, in_order = (strategy_of(item, given(config.strategy)) for item in config.bench.strategies)
    assert (packing.name, packing.average, packing.packer, packing.packs_per_step) == ("packing", "pack", "next_fit", 6)
    assert (in_order.name, in_order.group_size, in_order.batch_size, in_order.packs_per_step) == ("sorted", 2, 4, 2)


# -- the launcher -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (items("packng"), r"'packng': strategy=packng does not exist; did you mean 'packing'\?"),
        (items("packing packr=next_fit"), r"unknown key 'strategy.packr'; did you mean 'strategy.packer'\?"),
        (items("packing packer=first_fit"), r"strategy.packer='first_fit' is not allowed: it should be 'best_fit'"),
        (items("packing next_fit"), "expected key=value, got 'strategy.next_fit'"),
        (items("balanced strata=3"), r"'balanced strata=3': strategy.strata=3 does not divide"),
        ("data_dir=nowhere", "data_dir=.*nowhere holds no tokenised data"),
        ("bench.steps=4", r"bench.steps=4: 'naive' makes 3 steps .* give at most so many, or null for all"),
        ("max_length=399", "has a sample of 400 tokens, max_length=399"),
        ("cluster.sequence_parallel=3", "cluster.sequence_parallel=3 must divide"),
        ("cluster=slurm", "bench runs on this machine alone"),
    ],
)
def test_mistakes(word: str, message: str, words: list[str]) -> None:
    with pytest.raises(UserError, match=message):
        strategies.bench(compose_config("bench", [*words, items("naive"), word]), dry_run=True)


def test_tokens_that_the_model_does_not_have(words: list[str], tmp_path: Path) -> None:
    write_random(tmp_path / "large", np.array([8, 9]), np.array([1, 1]), vocab=10**6, seed=0)
    with pytest.raises(UserError, match=r"holds the token id \d+, and .* has a vocabulary of \d+"):
        strategies.bench(compose_config("bench", [*words, items("naive"), f"data_dir={tmp_path}/large"]), True)


def test_dry_run_counts_and_runs_nothing(words: list[str], tmp_path: Path) -> None:
    done = in_process("bench", *words, items("naive", "balanced"), "--dry-run", cwd=tmp_path)
    assert done.returncode == 0
    rows = [line.split() for line in done.stderr.splitlines()]
    assert next(row for row in rows if row[:1] == ["naive"])[1:5] == ["3", "12", "12", "1,165"]
    assert not (tmp_path / "out").exists()
    wrong = in_process("bench", *words, items("naiv"), "--dry-run", cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr.count("error:")) == (2, 1)


def launches(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *ends: tuple[int, list[dict[str, Any]]]
) -> tuple[int, list[list[str]], list[dict[str, Any]]]:
    """strategies.run over launches of ranks that add these rows and end with these codes: (code, commands, rows)."""
    file, commands, left = folder / "bench.json", [], list(ends)
    file.write_text(json.dumps({"rows": []}))

    def run_workers(command: list[str], *_: Any, **__: Any) -> int:
        code, rows = left.pop(0)
        commands.append(command[4:])
        file.write_text(json.dumps({"rows": json.loads(file.read_text())["rows"] + rows}))
        return code

    monkeypatch.setattr(strategies, "run_workers", run_workers)
    code = strategies.run(None, ["a", "b", "c"], folder)  # type: ignore[arg-type]
    assert not left
    return code, commands, json.loads(file.read_text())["rows"]


def test_a_strategy_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "strategies" / "1").mkdir(parents=True)
    (tmp_path / "strategies" / "1" / "failed.txt").write_text("out of GPU memory on a micro-step")
    a, b, c = {"strategy": "a"}, {"strategy": "b", "failed": "did not end"}, {"strategy": "c"}
    code, commands, rows = launches(monkeypatch, tmp_path, (2, [a, b]), (0, [c]))
    assert (code, commands) == (1, [["0", "1", "2"], ["2"]])
    assert rows == [a, {"strategy": "b", "failed": "out of GPU memory on a micro-step"}, c]


def test_ranks_that_die_or_are_stopped_leave_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = {"strategy": "a"}, {"strategy": "b", "failed": "did not end"}, {"strategy": "c", "failed": "did not end"}
    code, commands, rows = launches(monkeypatch, tmp_path, (1, [a, b]), (130, [c]))
    assert (code, commands) == (130, [["0", "1", "2"], ["2"]])
    assert [row.get("failed") for row in rows] == [None, "ranks ended with exit code 1", "did not end"]
    code, commands, rows = launches(monkeypatch, tmp_path, (2, []))
    assert (code, len(commands), rows) == (2, 1, []), "an engine that cannot be built is not tried again"


def test_rows_are_written_as_strategies_end(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three runs out of memory: the first one's figures stand by then, and the rank says why it ends."""
    config, works = prepared([*words, items("naive", "sorted", "packing")], tmp_path)
    (tmp_path / "bench.json").write_text(json.dumps(strategies.about(config, list(works))))
    seen = []

    def measure(engine: Any, dataset: Any, work: Work, config: Config, _: Any, ran: Any, item: str) -> Any:
        assert sorted(s for pack in ran for s in pack.sample_ids) == (list(range(len(LENGTHS))) if seen else [])
        seen.append(json.loads((tmp_path / "bench.json").read_text())["rows"])
        if item == "sorted":
            raise UserError("out of GPU memory on a micro-step")
        micro_steps = len(work.micro_steps)
        return [step(9.0, work.samples, work.tokens, 0, *[1.0] * micro_steps)]

    FakeTraining(monkeypatch)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 2, raising=False)
    for name, value in (("join", lambda *_: None), ("build_engine", lambda *_: None), ("measure", measure)):
        monkeypatch.setattr(ranks, name, value)
    monkeypatch.setattr(ranks.signal, "signal", lambda *_: None)
    assert ranks.main(str(tmp_path), "0", "1", "2") == 2
    assert [(row["strategy"], row.get("failed"), row.get("samples_per_s")) for row in seen[1]] == [
        ("naive", None, len(LENGTHS) / 9),
        ("sorted", "did not end", None),
    ]
    assert (tmp_path / "strategies" / "1" / "failed.txt").read_text() == "out of GPU memory on a micro-step"


@pytest.mark.parametrize(("code", "drawn"), [(0, True), (1, True), (143, False), (130, False)])
def test_a_picture_tells_that_a_bench_ended_by_itself(
    code: int, drawn: bool, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that was stopped, what it measured stands in bench.json, and scripts begin it again."""

    def run(config: Config, chosen: list[str], output: Path) -> int:
        report = json.loads((output / "bench.json").read_text())
        report["rows"] = [{"strategy": "naive", "settings": {"name": "naive"}, "steps": [step(1.0, 8, 100, 0, 1.0)]}]
        summarise(report, {"naive": work_of(output / "strategies" / "0")})
        (output / "bench.json").write_text(json.dumps(report))
        return code

    monkeypatch.setattr(strategies, "run", run)
    assert strategies.bench(compose_config("bench", [*words, items("naive")]), dry_run=False) == code
    assert (tmp_path / "out" / "bench.png").exists() == drawn


@pytest.mark.slow
def test_two_ranks_measure_every_strategy(words: list[str], tmp_path: Path) -> None:
    said = in_process(
        "bench",
        *words,
        items(*ITEMS),
        "cluster.zero_stage=3",
        "bench.warm_up=1",
        "cluster.env.OMP_NUM_THREADS=1",
        cwd=tmp_path,
    )
    assert said.returncode == 0, said.stderr
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [row["strategy"] for row in report["rows"]] == ITEMS
    for number, row in enumerate(report["rows"]):
        plan = pq.read_table(tmp_path / "out" / "strategies" / str(number) / "plan" / "plan.parquet")
        assert sorted(plan["sample_ids"].combine_chunks().flatten().to_pylist()) == list(range(len(LENGTHS)))
        assert [step["step"] for step in row["steps"]] == sorted(set(plan["step"].to_pylist()))
        for step in row["steps"]:
            of_step = np.isin(plan["step"], step["step"])
            assert (step["packs"], step["tokens"]) == (of_step.sum(), plan["tokens"].to_numpy()[of_step].sum())
            assert len(step["micro_seconds"]) == -(-step["packs"] // 2)
            assert 0 < sum(step["micro_seconds"]) < step["seconds"]
        assert (row["samples"], row["tokens"]) == (len(LENGTHS), LENGTHS.sum())
        assert row["tokens_per_s_per_gpu"] * 2 * row["seconds"] == pytest.approx(row["tokens"])
        assert row["seconds"] == pytest.approx(sum(step["seconds"] for step in row["steps"]))
        assert row["epoch_s"] == pytest.approx(row["seconds"])
        assert 0 <= row["idle"] < 0.5, "two ranks, one of which never waits"
    flops = [row["tflops_per_gpu"] * row["seconds"] for row in report["rows"]]
    assert flops == pytest.approx([flops[0]] * len(ITEMS)), "all ran the same documents"
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "out").rglob("*.safetensors")), "nothing is saved"
    assert not list((tmp_path / "out").rglob("checkpoints"))


# -- data and picture -------------------------------------------------------------------------------------


def test_random_data_have_the_lengths_and_targets_asked_for(random_data: Path) -> None:
    dataset, manifest = read_data(str(random_data))
    batch = load_batch(dataset, list(range(len(LENGTHS))))
    assert batch.cu_seqlens.diff().tolist() == LENGTHS.tolist() == dataset["length"]
    assert batch.n_target.tolist() == (LENGTHS // 5).tolist() == dataset["n_target"]
    last = (batch.cu_seqlens[1:] - 2)[batch.target_sample] - batch.target_rows
    assert last.max() == LENGTHS.max() // 5 - 1, "the last tokens are learned"
    assert batch.input_ids.max() < 500
    assert manifest["tokens"] == LENGTHS.sum()


@pytest.mark.parametrize("source", ["lengths", "one"])
def test_paper_tokens_writes_a_folder(source: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "lengths.npz", length=np.array([5, 700], np.int32), n_target=np.array([9, 3], np.int32))
    words = ["--one", "3000"] if source == "one" else ["--samples", "30", "--vocab", "50"]
    given = [] if source == "one" else [str(tmp_path / "lengths.npz")]
    script = Path(__file__).parents[2] / "bench" / "paper_tokens.py"
    subprocess.run([sys.executable, script, *given, tmp_path / "out", *words], check=True, capture_output=True)
    dataset = read_data(str(tmp_path / "out"))[0]
    pairs = set(zip(dataset["length"], dataset["n_target"], strict=True))
    assert pairs == ({(3000, 150)} if source == "one" else {(5, 4), (700, 3)}), "a first token has nothing before it"
    assert len(dataset) == (1 if source == "one" else 30)


def test_picture_leaves_out_what_failed(tmp_path: Path) -> None:
    report = {"ranks": 2, "device": "CPU", "zero_stage": 3}
    rows = [
        {"strategy": "naive", "epoch_s": 9000.0, "samples_per_s": 1.5},
        {"strategy": "sorted", "failed": "out of memory"},
    ]
    plot_strategies({**report, "rows": rows}, tmp_path / "p.png")
    plot_strategies({**report, "rows": rows[:1]}, tmp_path / "q.png")
    assert (tmp_path / "p.png").read_bytes() == (tmp_path / "q.png").read_bytes()
