"""Writing checkpoints beside training, each whole or not at all.

    save(step)   every rank copies what it holds to memory of its own; training goes on
    threads      rank-N.safetensors, flushed to the disk, then its mark rank-N.json with size and checksum
    rank 0's     waits for the marks of all ranks, writes checkpoint.json, renames .step-000200.partial to step-000200,
                 removes old checkpoints

No rank asks another from a thread: they meet in files alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from longalign.files import disk_errors, read_json, write_json
from longalign.schema import Config
from longalign.train.checkpoint import CHECKSUM, CHUNK, complete, name, remove, step_of, sweep, write_record
from longalign.train.fragments import KINDS, share, sizes, updates

POLL_S = 0.05


def write_tensors(path: Path, numels: dict[str, int], tensors: Iterable[torch.Tensor]) -> dict[str, Any]:
    """Write float32 tensors [numel] as a safetensors file, through to the disk; returns its size and checksum.

    safetensors' own writer wants all of them in memory and would have the file read again for the checksum.
    """
    header, at = {}, 0
    for key, numel in numels.items():
        header[key] = {"dtype": "F32", "shape": [numel], "data_offsets": [at, at + 4 * numel]}
        at += 4 * numel
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()
    with open(path, "wb") as file:

        def put(data: Any) -> None:
            digest.update(data)  # as write, this lets other threads run meanwhile
            file.write(data)

        put(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            data: Any = tensor.numpy().view("uint8")
            for start in range(0, len(data), CHUNK):
                put(data[start : start + CHUNK])
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, CHECKSUM: digest.hexdigest()}


def flush_folder(folder: Path) -> None:
    """Make the names in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Saver:
    """`with Saver(engine, config, plan) as saver: saver.save(step)`; made and called by every rank.

    plan: the plan's identity. Leaving the block waits for what is being written; after an error, up to grace_s.
    """

    def __init__(self, engine: Any, config: Config, plan: dict[str, Any]):
        assert config.output_dir is not None
        self.engine, self.config, self.folder = engine, config, Path(config.output_dir) / "checkpoints"
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        layout = {"processes": self.ranks, "zero_stage": engine.zero_optimization_stage()}
        self.about = {"plan": plan, "parameters": sizes(engine), "layout": layout}
        self.numels = {f"{kind}/{f.name}@{f.start}": f.numel for f in share(engine) for kind in KINDS}
        self.buffer: torch.Tensor | None = None
        if config.save_every and config.save_async:
            self.buffer = torch.empty(sum(self.numels.values()), dtype=torch.float32)
            if config.cluster.device == "cuda":  # page-locked: torch's own allocator would round up to a power of two
                status = torch.cuda.cudart().cudaHostRegister(self.buffer.data_ptr(), self.buffer.nbytes, 0)
                assert status.value == 0, f"cudaHostRegister failed: {status}"
        self.thread: threading.Thread | None = None
        self.final = self.folder  # what is being written; a folder that exists, as long as nothing is
        self.error: BaseException | None = None
        self.give_up = threading.Event()
        if self.rank == 0:
            with disk_errors(self.folder, "output_dir"):
                self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
        dist.barrier()

    def save(self, step: int, wait: bool = False) -> None:
        """Save the state after optimizer step `step`, once the checkpoint before is written.

        With `wait`, or without the memory for a copy (save_async=false), the files are written before this returns.
        Raises UserError on a full disk, of this checkpoint or the one before.
        """
        self.wait()
        optimizer, mine = self.engine.basic_optimizer, share(self.engine)
        views = (f.view(optimizer, kind) for f in mine for kind in KINDS)
        about = {"step": step, "updates": updates(self.engine), **self.about}
        self.final = self.folder / name(step)
        if wait or self.buffer is None:
            self._run(about, (view.float().cpu() for view in views))
            self.poll()
            return
        copies = self.buffer.split(list(self.numels.values()))
        for copy, view in zip(copies, views, strict=True):
            copy.copy_(view, non_blocking=True)
        if self.config.cluster.device == "cuda":
            torch.cuda.synchronize()
        self.thread = threading.Thread(target=self._run, args=(about, copies), daemon=True)
        self.thread.start()

    def poll(self) -> None:
        """Raise what went wrong in the background, if anything did."""
        if self.error is not None:
            raise self.error

    def wait(self) -> None:
        """Wait until this rank's files, on rank 0 the whole checkpoint, are written. Raises what went wrong."""
        if self.thread is not None:
            self.thread.join()
        self.poll()

    def _run(self, about: dict[str, Any], tensors: Iterable[torch.Tensor]) -> None:
        partial = self.final.with_name(f".{self.final.name}.partial")
        file = partial / f"rank-{self.rank:05d}.safetensors"
        try:
            with disk_errors(self.final, "output_dir, or lower keep_last"):
                partial.mkdir(exist_ok=True)
                try:
                    written = write_tensors(file, self.numels, tensors)
                    write_json(file.with_suffix(".json"), {file.name: written})
                except BaseException:  # make room again
                    file.unlink(missing_ok=True)
                    with contextlib.suppress(OSError):
                        partial.rmdir()
                    raise
                if self.rank == 0:
                    self._commit(partial, about)
        except BaseException as error:
            self.error = error

    def _commit(self, partial: Path, about: dict[str, Any]) -> None:
        marks = [partial / f"rank-{rank:05d}.json" for rank in range(self.ranks)]
        while not all(mark.is_file() for mark in marks):
            if self.give_up.wait(POLL_S):
                return
        files = {key: value for mark in marks for key, value in read_json(mark).items()}
        write_record(partial, {**about, "files": files})
        for mark in marks:
            mark.unlink()
        flush_folder(partial)
        shutil.rmtree(self.final, ignore_errors=True)  # no checkpoint, or `abandon_after` had renamed it
        partial.rename(self.final)
        flush_folder(self.folder)
        for old in complete(self.folder)[: -self.config.keep_last]:
            if not self.config.keep_every or step_of(old) % self.config.keep_every:
                remove(old)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
            else:  # of a checkpoint that this rank has written, others may still be writing their part
                deadline = time.monotonic() + self.config.grace_s
                while self.error is None and not self.final.exists() and time.monotonic() < deadline:
                    time.sleep(POLL_S)
        finally:
            self.give_up.set()
            if self.buffer is not None and self.config.cluster.device == "cuda":
                torch.cuda.cudart().cudaHostUnregister(self.buffer.data_ptr())
