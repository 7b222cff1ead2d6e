"""A run outlives those who read what it says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from longalign.train.metrics import read_metrics
from tests.train.test_resume import wait_for_step

SAY = """
import sys, warnings
from longalign.streams import outlive_readers
outlive_readers()
print("heard", "ünd", flush=True)
print("heard too", file=sys.stderr)
sys.stdin.readline()
for _ in range(3):
    print("x" * 100_000)
    print("unheard", file=sys.stderr, flush=True)
warnings.warn("unheard")
from longalign.progress import warn
warn("unheard")
sys.exit(7)
"""


@pytest.mark.timeout(120)
def test_writes_to_nobody_raise_nothing() -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", SAY], stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8")
    assert process.stdin
    assert process.stdout
    assert process.stderr
    assert (process.stdout.readline(), process.stderr.readline()) == ("heard ünd\n", "heard too\n")
    process.stdout.close()
    process.stderr.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait(60) == 7


@pytest.mark.timeout(120)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_writes_to_a_full_disk_raise_nothing() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", SAY], input="\n", stdout=full, stderr=full, text=True, timeout=60)
    assert done.returncode == 7


@pytest.mark.slow
def test_ctrl_c_that_kills_tee_first_saves(tmp_path: Path, base_words: list[str], data_dir: Path) -> None:
    """`longalign train 2>&1 | tee log`: what rank 0 and the launcher say then meets a broken pipe."""
    words = [*base_words, f"data_dir={data_dir}", "strategy.packs_per_step=4", "cluster.processes=2", "epochs=100"]
    words += ["save_every=null", "output_dir=run", "cluster.zero_stage=2"]
    command = [str(Path(sys.executable).with_name("longalign")), "train", *words]
    read, write = os.pipe()
    process = subprocess.Popen(command, cwd=tmp_path, stdout=write, stderr=write)
    os.close(write)
    wait_for_step(tmp_path / "run", 2)
    os.close(read)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    steps = len(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert steps < 900
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:06d}").is_dir(), "the very last step was saved"
