"""A run outlives those who read what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


END = """
import atexit, os, sys, threading
print("said at first, ", end="")
atexit.register(lambda: print("said at exit"))
from longalign.streams import outlive_readers
from longalign.train.worker import end
outlive_readers()
class Late:
    def __del__(self):
        os.write(2, b"taken down")
late = Late()
threading.Thread(target=threading.Event().wait, daemon=True).start()
end(int(sys.argv[1]))
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("code", [0, 2])
@pytest.mark.parametrize("closed", ["", ">&- 2>&-"])
def test_a_rank_ends_with_all_said_and_its_code(code: int, closed: str) -> None:
    """What was written and what is registered for the end still happens, but Python is not taken down."""
    words = ["sh", "-c", f'"$0" -c "$1" {code} {closed}', sys.executable, END]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == code
    assert done.stdout == ("" if closed else "said at first, said at exit\n")
    assert "taken down" not in done.stderr
