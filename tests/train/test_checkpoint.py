"""Checkpoints on their own: the same content on every layout, and what is done about files that cannot be trusted."""

from __future__ import annotations

import json
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from longalign.errors import UserError
from longalign.schema import Config
from longalign.train import checkpoint, saver
from longalign.train.saver import Saver
from tests.conftest import launch_all

WORKER = str(Path(__file__).with_name("saved.py"))


def merged(path: Path) -> dict[str, torch.Tensor]:
    """ "KIND/PARAMETER" -> all its numbers, put together from the files of all ranks by their names alone."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for file in sorted(path.glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            parameter, _, start = key.rpartition("@")
            pieces.setdefault(parameter, []).append((int(start), tensor))
    whole = {}
    for key, found in pieces.items():
        found.sort(key=lambda piece: piece[0])
        ends = [start + len(tensor) for start, tensor in found]
        assert [start for start, _ in found] == [0, *ends[:-1]], f"gaps or overlaps in {key}"
        whole[key] = torch.cat([tensor for _, tensor in found])
    return whole


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


FLOAT, BRAIN = "float32", "bfloat16"
GRID = [(stage, dtype) for dtype in (FLOAT, BRAIN) for stage in range(4) if (stage, dtype) != (0, BRAIN)]
# each way in which DeepSpeed keeps states: none, two optimizers of its own below stage 3, stage 3 with and without copies
SOME = {2: [(0, FLOAT), (1, BRAIN), (2, FLOAT), (3, BRAIN)], 1: [(0, FLOAT), (2, BRAIN), (3, FLOAT)]}


def words(processes: int, stage: int, dtype: str) -> list[str]:
    return [f"cluster.processes={processes}", f"cluster.zero_stage={stage}", f"model.dtype={dtype}"]


def check_layouts(
    chosen: dict[int, list[tuple[int, str]]], tmp_path: Path, run_config: Callable[..., Config], *more: str
) -> None:
    """See saved.py. Every layout saves and resumes; checkpoints of two processes are loaded by one, and saved again."""
    common = ["strategy=packing", "strategy.packs_per_step=3", "epochs=2", "grad_clip=0.5", "save_every=2", *more]
    references = tmp_path / "references"
    references.mkdir()
    for processes in (2, 1):
        runs = {
            name: run_config(tmp_path / name, *common, *words(processes, stage, dtype))
            for stage, dtype in chosen[processes]
            for name in [f"{processes}-zero{stage}-{dtype}"]
        }
        assert launch_all(list(runs.values()), tmp_path, worker=[WORKER, str(references)]) == 0
        for name in runs:
            saved = merged(tmp_path / name / "checkpoints" / "step-000002")
            assert_equal(saved, torch.load(tmp_path / name / "told.pt"))
            assert_equal(merged(tmp_path / name / "again" / "checkpoints" / "step-000002"), saved)
            for reference in references.iterdir():
                again = tmp_path / name / f"from-{reference.name}" / "checkpoints" / "step-000002"
                assert_equal(merged(again), merged(reference / "checkpoints" / "step-000002"))
                record = checkpoint.read_record(again)
                assert record["updates"] == 2
                assert len(record["files"]) == processes
        if processes == 2:  # what one process then loads
            for name in runs:
                shutil.copytree(tmp_path / name / "checkpoints", references / name / "checkpoints")


@pytest.mark.slow
def test_layouts_save_and_load_the_same(tmp_path: Path, run_config: Callable[..., Config]) -> None:
    check_layouts(SOME, tmp_path, run_config)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("offload", [False, True])
def test_all_layouts_save_and_load_the_same(offload: bool, tmp_path: Path, run_config: Callable[..., Config]) -> None:
    """With offload, DeepSpeed compiles its Adam for the CPU, which takes minutes the first time."""
    grid = [(stage, dtype) for stage, dtype in GRID if stage or not offload]
    more = ["cluster.offload_optimizer=true"] if offload else []
    check_layouts({2: grid, 1: grid}, tmp_path, run_config, *more)


# -- files, with a small model and one process ----------------------------------------------------------------


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run(tmp_path: Path, run_config: Callable[..., Config]) -> Callable[..., Config]:
    (tmp_path / "run").mkdir()
    return lambda *words: run_config(tmp_path / "run", "save_every=1", *words)


def small_engine(width: int = 64) -> Any:
    """As much of an engine as a checkpoint asks for, without ZeRO: `engine.module`, one AdamW."""
    module = torch.nn.Sequential(torch.nn.Linear(width, 64), torch.nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    return SimpleNamespace(
        module=module, optimizer=optimizer, basic_optimizer=optimizer, zero_optimization_stage=lambda: 0
    )


def train(engine: Any) -> dict[str, torch.Tensor]:
    engine.module(torch.ones(1, engine.module[0].in_features)).sum().backward()
    engine.optimizer.step()
    engine.optimizer.zero_grad()
    return {f"master/{name}": p.detach().flatten().clone() for name, p in engine.module.named_parameters()}


def names(config: Config) -> list[str]:
    return sorted(p.name for p in (Path(config.output_dir or "") / "checkpoints").iterdir())


def saved_steps(config: Config, count: int) -> list[Path]:
    """A run of so many steps, each saved."""
    engine = small_engine()
    with Saver(engine, config, {"seed": 7}) as saver:
        for step in range(1, count + 1):
            train(engine)
            saver.save(step)
    return checkpoint.complete(Path(config.output_dir or "") / "checkpoints")


def test_newest_and_milestones_are_kept(alone: None, run: Callable[..., Config]) -> None:
    config = run("keep_last=2", "keep_every=3")
    saved_steps(config, 8)
    assert names(config) == ["step-000003", "step-000006", "step-000007", "step-000008"]
    with pytest.raises(UserError, match=r"keep_every=3 is not allowed: it should be a multiple of save_every=2"):
        run("save_every=2", "keep_every=3")
    with pytest.raises(UserError, match=r"a multiple of save_every=null"):
        run("save_every=null", "keep_every=3")


def flip(path: Path, place: int) -> None:
    """Change one bit, so that time and size tell nothing."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def another_step(path: Path) -> None:
    record = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps({**record, "step": record["step"] + 1}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bit flipped in a weight": (lambda p: flip(p / "rank-00000.safetensors", -1000), "differs from its checksum"),
    "bit flipped in the header": (lambda p: flip(p / "rank-00000.safetensors", 12), "differs from its checksum"),
    "bit flipped in the record": (lambda p: flip(p / "checkpoint.json", 25), "checkpoint.json"),
    "another step in the record": (another_step, "checkpoint.json differs from its checksum"),
    "record cut short": (lambda p: os.truncate(p / "checkpoint.json", 20), "checkpoint.json is cut short"),
    "truncated": (lambda p: os.truncate(p / "rank-00000.safetensors", 100), "has 100 bytes of"),
    "missing": (lambda p: (p / "rank-00000.safetensors").unlink(), "rank-00000.safetensors is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_the_last_sound_one_taken(
    kind: str, alone: None, run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, said = DAMAGE[kind]
    warned: list[str] = []
    monkeypatch.setattr(checkpoint, "warn", warned.append)
    config = run("resume=auto")
    one, two, three = saved_steps(config, 3)
    assert checkpoint.find_sound(config) == three
    damage(three)
    assert checkpoint.find_sound(config) == two
    assert len(warned) == 1
    assert "step-000003" in warned[0]
    assert said in warned[0]
    with pytest.raises(UserError, match=said):
        checkpoint.find_sound(config.model_copy(update={"resume": str(three)}))
    damage(two)
    assert checkpoint.find_sound(config) == one
    damage(one)
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        checkpoint.find_sound(config)


def test_what_was_saved_is_loaded_and_other_models_are_refused(alone: None, run: Callable[..., Config]) -> None:
    engine = small_engine()
    with Saver(engine, run(), {"seed": 7}) as saver:
        wanted = [train(engine) for _ in range(3)][-1]
        saver.save(3)
    (path,) = checkpoint.complete(saver.folder)
    assert checkpoint.check(path, {"seed": 7}) == 3
    with pytest.raises(UserError, match=r"another plan: seed changed"):
        checkpoint.check(path, {"seed": 8})
    fresh = small_engine()
    checkpoint.load(fresh, path)
    assert torch.equal(train(fresh)["master/0.weight"], train(engine)["master/0.weight"])
    assert_equal({key: value for key, value in merged(path).items() if key.startswith("master")}, wanted)
    with pytest.raises(UserError, match=r"another model: 0.weight had 4096 numbers, now 192"):
        checkpoint.load(small_engine(width=3), path)


def test_a_checkpoint_of_deepspeeds_layout_is_refused(alone: None, run: Callable[..., Config]) -> None:
    config = run("resume=auto")
    old = Path(config.output_dir or "") / "checkpoints" / "step-000200"
    old.mkdir(parents=True)
    (old / "checkpoint.json").write_text('{"step": 200, "processes": 2, "zero_stage": 2, "plan": {}, "files": {}}')
    with pytest.raises(UserError, match=r"layout of an earlier version.*init_from"):
        checkpoint.find(config)


def run_until_full(engine: Any, config: Config, hard_limit: int) -> None:
    with Saver(engine, config, {}) as saver:
        train(engine)
        saver.save(1)
        saver.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard_limit))
        saver.save(2)


@pytest.mark.parametrize("words", [["save_async=true"], ["save_async=false"]])
def test_a_full_disk_is_told_and_harms_nothing(words: list[str], alone: None, run: Callable[..., Config]) -> None:
    """A limit on the size of files stands for the full disk."""
    config, engine = run(*words), small_engine()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match=r"the disk .* is full.*change output_dir, or lower keep_last"):
            run_until_full(engine, config, limits[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(config) == ["step-000001"]
    assert checkpoint.changed(Path(config.output_dir or "") / "checkpoints" / "step-000001") is None


def test_training_goes_on_while_a_checkpoint_is_written(
    alone: None, run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the state at the save, whatever the steps behind it do; a second save waits for the first."""
    go, began = threading.Event(), threading.Event()

    def held_up(*given: Any) -> Any:
        began.set()
        assert go.wait(20)
        return write_tensors(*given)

    write_tensors = saver.write_tensors
    monkeypatch.setattr(saver, "write_tensors", held_up)
    engine = small_engine()
    with Saver(engine, run(), {}) as writer:
        wanted = train(engine)
        writer.save(1)
        assert began.wait(20)
        train(engine)
        assert checkpoint.complete(writer.folder) == []
        second = threading.Thread(target=writer.save, args=(2,))
        second.start()
        time.sleep(0.2)
        assert second.is_alive()
        go.set()
        second.join()
    one, two = checkpoint.complete(writer.folder)
    assert_equal({key: value for key, value in merged(one).items() if key.startswith("master")}, wanted)
    assert not torch.equal(merged(two)["master/0.weight"], merged(one)["master/0.weight"])


def test_nothing_is_a_checkpoint_before_every_rank_has_written(alone: None, run: Callable[..., Config]) -> None:
    config = run("grace_s=0.5", "resume=auto")
    engine = small_engine()
    writer = Saver(engine, config, {})
    writer.ranks = 2
    train(engine)
    writer.save(1)
    time.sleep(0.3)
    assert names(config) == [".step-000001.partial"]
    assert checkpoint.find(config) is None
    (writer.folder / ".step-000001.partial" / "rank-00001.json").write_text("{}")
    writer.wait()
    assert names(config) == ["step-000001"]
    writer.save(2)
    began = time.monotonic()
    writer.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert 0.5 <= time.monotonic() - began < 2, "the other rank is lost: nobody waits for its part for ever"
    assert [p.name for p in checkpoint.complete(writer.folder)] == ["step-000001"]
    Saver(engine, config, {})
    assert names(config) == ["step-000001"], "what was left of step 2 is removed"
