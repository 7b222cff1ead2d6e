"""Stages of results.py: what each needs and leaves, and running them, several at a time where there are GPUs for it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from results_collect import machine, note

ROOT = Path(__file__).parent.parent
Words = list[str]
CLI = [sys.executable, "-m", "longalign.cli"]
PARTS = 4  # of a GPU, so many evaluations run on one at a time: each waits for the host most of the time
TAIL = 3000  # characters of a failed stage's log that are shown


@dataclass(frozen=True)
class Stage:
    name: str
    done: Path  # exists once the stage is finished
    command: Callable[[], Words]  # made when the stage begins: some depend on what earlier stages wrote
    record: Path  # the folder that keeps the command, its seconds and the machine
    needs: tuple[Path, ...] = ()  # exist before it can begin
    input: Path | None = None  # what the command reads
    output: Path | None = None  # what it prints
    gpus: int = 1
    parts: int = PARTS  # of each GPU that it takes; one that is timed takes all


class Running:
    """A stage's process. logs: others run at the same time; it sees its own GPUs, and what it says goes there."""

    def __init__(self, stage: Stage, gpus: list[str], logs: Path | None):
        self.stage, self.gpus, self.log = stage, gpus, None
        words = stage.command()
        shown = shlex.join(["longalign", *words[3:]] if words[:3] == CLI else words)
        self.shown = shown.replace(sys.executable, "python") + (f" < {stage.input}" if stage.input else "")
        print(f"\n[{stage.name}]\n$ {self.shown}", flush=True)
        stage.record.mkdir(parents=True, exist_ok=True)
        if logs:
            logs.mkdir(parents=True, exist_ok=True)
            self.log = logs / f"{stage.name.replace(':', '-').replace('/', '-')}.log"
        self.partial = stage.output and stage.output.with_name(stage.output.name + ".partial")
        read = open(stage.input, "rb") if stage.input else None
        said = open(self.log, "wb") if self.log else None
        output = open(self.partial, "wb") if self.partial else said
        seen = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if logs else {}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.began = time.monotonic()
        env = {**os.environ, **seen, "PYTHONPATH": path}
        self.process = subprocess.Popen(words, stdin=read, stdout=output, stderr=said, env=env)
        for file in filter(None, {read, output, said}):
            file.close()

    def finish(self) -> None:
        """Keep what it made and how, or show how it failed."""
        seconds, code = time.monotonic() - self.began, self.process.returncode
        if code:
            said = self.log.read_text(encoding="utf-8", errors="replace")[-TAIL:] if self.log else ""
            print(f"{said}\n[{self.stage.name}] failed with exit code {code}", flush=True)
            return
        if self.partial and self.stage.output:
            self.partial.replace(self.stage.output)
        of = f"{len(self.gpus)} of " if self.log else ""
        note(self.stage.record, self.stage.name, self.shown, seconds, of + machine())
        print(f"[{self.stage.name}] done in {seconds:,.0f} s", flush=True)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", metavar="STAGE", default=["*"], help="these stages: 'train:full/*/1' data")
    parser.add_argument("--until", type=float, metavar="SECONDS", default=1e9, help="stop after so many seconds")
    parser.add_argument("--gpus", type=int, default=1, help="stages at a time; with more there are runs on more, too")
    parser.add_argument("--list", action="store_true", help="show the stages, and which are finished")


def choose(stages: list[Stage], options: Namespace, parser: ArgumentParser) -> list[Stage]:
    """Those of --only. --list shows them and ends; from then on a SIGTERM ends the stages with this process."""
    for pattern in options.only:
        if not any(fnmatch(stage.name, pattern) for stage in stages):
            parser.error(f"--only {pattern}: no such stage; --list shows them")
    chosen = [stage for stage in stages if any(fnmatch(stage.name, pattern) for pattern in options.only)]
    if options.list:
        for stage in chosen:
            print("done " if stage.done.exists() else "to do", stage.name)
        sys.exit()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return chosen


def run_all(stages: list[Stage], logs: Path, gpus: int = 1, seconds: float = 1e9) -> int:
    """Run the stages that are not done, in order; returns the first failure's exit code, 2 if a need is missing, or 0.

    With several GPUs each stage has its own, or parts of one, and a log, and those run at the same time whose needs are
    there. A failure ends what needs the stage, not the rest. When the seconds are over the running stages get SIGTERM:
    training saves.
    """
    deadline, code = time.monotonic() + seconds, 0
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",")[:gpus] if given else [str(gpu) for gpu in range(gpus)]
    beside = logs if len(names) > 1 else None
    free = dict.fromkeys(names, PARTS)  # parts of each GPU
    taken = lambda stage: stage.parts if beside else PARTS
    waiting = [stage for stage in stages if not stage.done.exists()]
    running: list[Running] = []
    try:
        while time.monotonic() < deadline:
            held = False  # a stage that could begin waits for whole GPUs: none that shares one comes before it
            for stage in list(waiting):
                made = all(path.exists() for path in stage.needs)
                if not made or any(one.stage.done in stage.needs for one in running):
                    continue
                roomy = sorted((gpu for gpu in free if free[gpu] >= taken(stage)), key=lambda gpu: -free[gpu])
                if len(roomy) < stage.gpus:
                    held = held or stage.gpus <= len(free)
                elif taken(stage) == PARTS or not held:
                    waiting.remove(stage)
                    running.append(Running(stage, roomy[: stage.gpus], beside))
                    for gpu in running[-1].gpus:
                        free[gpu] -= taken(stage)
            ended = [one for one in running if one.process.poll() is not None]
            for one in ended:
                one.finish()
                running.remove(one)
                for gpu in one.gpus:
                    free[gpu] += taken(one.stage)
                code = code or one.process.returncode
            if not running and not ended:
                break
            time.sleep(0.05)
    except KeyboardInterrupt:  # which the stages have got, too
        codes = [one.process.wait() for one in running]
        sys.exit(next(filter(None, codes), 130))
    except BaseException:
        for one in running:
            one.process.terminate()
            one.process.wait()
        raise
    for one in running:
        one.process.send_signal(signal.SIGTERM)
    for one in running:
        if one.process.wait():
            print(f"\nout of time in {one.stage.name}: the same command goes on from there", flush=True)
        else:
            one.finish()
    if running:
        return code
    for stage in waiting:
        missing = ", ".join(str(path) for path in stage.needs if not path.exists())
        print(f"[{stage.name}] was not run: it needs {missing or f'{stage.gpus} GPUs'}", flush=True)
    return code or (2 if waiting else 0)
