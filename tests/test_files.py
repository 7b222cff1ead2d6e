"""Folders appear whole or not at all; what is in the way or too big is refused with advice."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from longalign.errors import UserError
from longalign.files import fresh_folder, human, require_disk, write_text
from longalign.preflight import count_parameters, disk_needs, memory_needs, settle_offload
from longalign.schema import Config


def test_a_failed_block_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with fresh_folder(target, ("marker",), overwrite=False) as folder:
        (folder / "marker").write_text("first")
    with pytest.raises(ZeroDivisionError), fresh_folder(target, ("marker",), overwrite=True) as folder:
        (folder / "marker").write_text(str(1 // 0))
    assert (target / "marker").read_text() == "first"
    with fresh_folder(target, ("marker",), overwrite=True) as folder:
        (folder / "marker").write_text("third")
    assert (target / "marker").read_text() == "third"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_swept_away(tmp_path: Path) -> None:
    dead = tmp_path / "out.partial-999999999-abc"
    dead.mkdir()
    with fresh_folder(tmp_path / "out", ("marker",), overwrite=False) as folder:
        (folder / "marker").touch()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(UserError, match="is a file"), fresh_folder(tmp_path / "out", ("marker",), overwrite=True):
        pass
    with (
        pytest.raises(UserError, match="cannot write"),
        fresh_folder(tmp_path / "out" / "sub", ("marker",), overwrite=True),
    ):
        pass


def test_room(tmp_path: Path) -> None:
    require_disk(tmp_path / "not" / "yet" / "there", 1000, "output_dir")
    with pytest.raises(UserError, match=r"needs about 1\.0 EiB|needs about .* TiB but its disk has"):
        require_disk(tmp_path, 2.0**60, "output_dir")
    assert human(1536) == "1.5 KiB"


def test_memory_of_the_papers_run(tmp_path: Path, run_config: Callable[..., Config]) -> None:
    """7e9 parameters, ZeRO-3 on 8 GPUs in bf16: weights of 2 bytes shared out, 20 bytes of states in host memory."""
    config = run_config(tmp_path, "cluster=8gpu", "cluster.offload_optimizer=true")
    assert memory_needs(config, 7_000_000_000) == (pytest.approx(7e9 * 2 / 8), pytest.approx(7e9 * 20))
    config = run_config(tmp_path, "cluster=8gpu", "cluster.offload_optimizer=true", "cluster.offload_param=true")
    assert memory_needs(config, 7_000_000_000) == (0, pytest.approx(7e9 * 22))
    config = run_config(tmp_path, "cluster=8gpu", "cluster.offload_optimizer=false")
    assert memory_needs(config, 7_000_000_000) == (pytest.approx(7e9 * 18 / 8), 0)


@pytest.mark.parametrize(
    ("dtype", "stage", "offload", "device", "host"),
    [
        ("float32", 0, False, 16, 0),  # the weights are the master weights
        ("float32", 1, False, 20, 0),
        ("bfloat16", 1, False, 18, 0),
        ("bfloat16", 1, True, 6, 18),
        ("bfloat16", 2, True, 6, 18),
        ("bfloat16", 3, True, 2, 20),
        ("float32", 1, True, 8, 20),
        ("float32", 2, True, 4, 24),
        ("float32", 3, True, 4, 20),
    ],
)
def test_memory_by_stage(
    run_config: Callable[..., Config], tmp_path: Path, dtype: str, stage: int, offload: bool, device: int, host: int
) -> None:
    """Bytes a parameter on one GPU, as counted in DeepSpeed 0.19.8 after a step of two micro-steps."""
    words = [f"model.dtype={dtype}", f"cluster.zero_stage={stage}", f"cluster.offload_optimizer={offload}"]
    assert memory_needs(run_config(tmp_path, "cluster=1gpu", *words), 1000) == (1000 * device, 1000 * host)


def test_states_go_to_the_host_where_a_gpu_would_have_little_room(
    tmp_path: Path, run_config: Callable[..., Config]
) -> None:
    settled = lambda gpu_bytes, *words: (
        settle_offload(run_config(tmp_path, *words), gpu_bytes).cluster.offload_optimizer
    )
    needs = 18.0 * count_parameters(run_config(tmp_path))  # bf16, on one GPU
    words = ("cluster=1gpu", "model.dtype=bfloat16")
    assert settled(needs / 0.74, *words) is False
    assert settled(needs / 0.76, *words) is True
    shared = ("cluster=8gpu", "model.dtype=bfloat16")
    assert settled(needs / 8 / 0.74, *shared) is False
    assert settled(needs / 8 / 0.76, *shared) is True
    assert settled(needs / 0.76, *words, "cluster.offload_optimizer=false") is False
    assert settled(needs / 0.74, *words, "cluster.offload_optimizer=true") is True
    assert settled(1.0) is False, "on a CPU there is nowhere else"


def test_disk_that_a_run_needs(tmp_path: Path, run_config: Callable[..., Config]) -> None:
    """12 bytes a parameter a checkpoint, one more than are kept while it is written, and float32 weights at the end."""

    def needs(steps: int, *words: str) -> float:
        return disk_needs(run_config(tmp_path, *words), steps, 1_000_000) / 1_000_000

    assert needs(100, "save_every=5", "keep_last=3") == 12 * 4 + 4
    assert needs(12, "save_every=5", "keep_last=3") == 12 * 3 + 4  # 5, 10, and where it may be interrupted
    assert needs(100, "save_every=5", "keep_last=3", "keep_every=20") == 12 * (3 + 4 + 1) + 4  # and 20 to 80
    assert needs(100, "save_every=null") == 12 + 4


def test_too_little_memory_is_refused_or_only_warned_of(
    tmp_path: Path, run_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:

    from longalign import launch, preflight

    monkeypatch.setattr(preflight, "free_host_memory", lambda: 10_000)
    with pytest.raises(UserError, match=r"9\.8 KiB are free here.*preflight=false starts anyway"):
        preflight.check_memory(launch.resolve(run_config(tmp_path)), parameters=100_000)
    warned: list[str] = []
    monkeypatch.setattr(preflight, "warn", warned.append)
    preflight.check_memory(launch.resolve(run_config(tmp_path, "preflight=false")), parameters=100_000)
    assert len(warned) == 1
    assert "9.8 KiB" in warned[0]


def test_write_text_replaces_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")
    write_text(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.slow
def test_full_disk_while_training(tmp_path: Path, base_words: list[str], data_dir: Path) -> None:
    """A limit on the size of files stands for a full disk: the checkpoint cannot be written, and nothing half-written stays."""
    words = [
        *base_words,
        f"data_dir={data_dir}",
        "output_dir=run",
        "save_every=1",
        "max_steps=2",
        "strategy.packs_per_step=2",
    ]
    command = [str(Path(sys.executable).with_name("longalign")), "train", *words]
    limited = ["bash", "-c", 'ulimit -f 200; exec "$@"', "bash", *command]  # blocks of 1 KiB
    done = subprocess.run(limited, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "the disk (or a quota) is full" in done.stderr
    assert "change output_dir" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
