"""Writing checkpoints beside training.

    save    every rank copies the pieces it owns into host memory (training waits for this alone), and a thread
            writes and checksums them: rank-N.bin, then rank-N.json
    publish rank 0's thread waits for every rank's json, writes checkpoint.json and gives the folder its name

A folder has its name when it is whole. Ranks meet in no collective but a barrier before the first byte.
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
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from longalign.files import disk_errors, write_json
from longalign.model.offload import Host
from longalign.progress import warn
from longalign.schema import Config
from longalign.train import state
from longalign.train.checkpoint import LAYOUT, complete, name, remove, step_of, write_record

AFTER_ERROR_S = 20.0


def flush_names(folder: Path) -> None:
    """Let the names in a folder outlive a loss of power, as fsync does for a file's content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Saver:
    """Of one run. plan: its plan's identity, which a resumed run must have in common with this one.

    Leaving a `with` block waits for what is being written: to its end, or after an error for 20 s at most, since the
    part of a rank that was lost never comes.
    """

    def __init__(self, config: Config, engine: Any, plan: dict[str, Any], saved: int = 0):
        assert config.output_dir is not None
        self.folder, self.config, self.engine, self.plan = Path(config.output_dir, "checkpoints"), config, engine, plan
        self.saved = saved  # the last step whose checkpoint stands
        self.host = Host()
        self.thread: threading.Thread | None = None
        self.writing: Path | None = None  # which is there once all ranks have written
        self.error: BaseException | None = None
        if dist.get_rank() == 0:
            for left in self.folder.glob(".step-*.partial"):  # by a killed run
                shutil.rmtree(left, ignore_errors=True)

    def save(self, step: int) -> None:
        """Save the state after optimizer step `step`; called by every rank. The one before is finished first.

        Raises UserError on a full disk, now or at a later call. Training waits for the disk if there is no host memory
        for a copy.
        """
        self.finish()
        partial = self.folder / f".{name(step)}.partial"
        if dist.get_rank() == 0:
            with disk_errors(partial, "output_dir"):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        dist.barrier()
        owned = state.owned(self.engine)
        index: list[list[Any]] = []
        floats = 0
        for piece in owned:
            index.append([piece.name, piece.start, piece.stop, floats])
            floats += len(state.KINDS) * (piece.stop - piece.start)
        about = {"step": step, "updates": state.updates(self.engine), "layout": LAYOUT, "plan": self.plan}
        if 4 * floats > self.host.room():
            if not self.saved:
                gib = 4 * floats / 2**30
                warn(f"no host memory for a copy of {gib:.1f} GiB: training waits while checkpoints are written")
            blocks = (tensor.cpu() for piece in owned for tensor in state.tensors(self.engine, piece))
            self._write(partial, index, blocks, about)
            self.finish()
            return
        copy = self._copy(owned, floats)
        self.writing = self.folder / name(step)
        self.thread = threading.Thread(target=self._write, args=(partial, index, copy.split(2**24), about), daemon=True)
        self.thread.start()

    def poll(self) -> None:
        """Raises UserError if the last save could not be written."""
        if self.error:
            raise self.error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.finish()
            return
        deadline = time.monotonic() + AFTER_ERROR_S
        while self.writing and not self.error and not self.writing.exists() and time.monotonic() < deadline:
            time.sleep(0.05)

    def finish(self) -> None:
        """Wait until the last save stands. Raises UserError if it could not be written."""
        if self.thread:
            self.thread.join()
            self.thread = None
        self.poll()

    def keep(self, step: int) -> None:
        """Have the state after `step`, which the engine holds, stand in a checkpoint before this returns."""
        self.finish()
        if step > self.saved:
            self.save(step)
            self.finish()

    def _copy(self, owned: list[state.Piece], floats: int) -> torch.Tensor:
        like = owned[0].flat if owned else torch.empty(0)
        copy, at = self.host.buffer((0, 0), (floats,), like), 0
        for piece in owned:
            for tensor in state.tensors(self.engine, piece):
                copy[at : at + tensor.numel()].copy_(tensor, non_blocking=True)
                at += tensor.numel()
        if like.is_cuda:
            torch.cuda.synchronize()
        return copy

    def _write(self, partial: Path, index: list[Any], blocks: Iterable[torch.Tensor], about: dict[str, Any]) -> None:
        """This rank's files, and rank 0's publishing. Keeps an error for `finish`."""
        try:
            with disk_errors(partial, "output_dir"):
                path, checksum = partial / f"rank-{dist.get_rank():05d}.bin", xxhash.xxh3_128(repr(index).encode())
                with open(path, "wb") as file:
                    for block in blocks:
                        data = block.numpy().data.cast("B") if block.numel() else b""
                        checksum.update(data)
                        file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                about_file = {"pieces": index, "checksum": checksum.hexdigest(), "bytes": path.stat().st_size}
                write_json(path.with_suffix(".json"), about_file)
                if dist.get_rank() > 0 or self._publish(partial, about):
                    self.saved = about["step"]
        except BaseException as error:
            if dist.get_rank() > 0 and not partial.is_dir():
                return  # rank 0 has failed, and tells why
            self.error = error
            with contextlib.suppress(OSError):
                (partial / f"failed-{dist.get_rank():05d}").touch()
        if dist.get_rank() == 0 and self.saved != about["step"]:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room

    def _publish(self, partial: Path, about: dict[str, Any]) -> bool:
        """Whether the checkpoint stands; not if another rank failed, which tells why."""
        while len(list(partial.glob("rank-*.json"))) < dist.get_world_size():
            if list(partial.glob("failed-*")):
                return False
            time.sleep(0.05)
        files: dict[str, int] = {}
        for path in sorted(partial.glob("rank-*.json")):
            index = path.read_bytes()  # which tells its rank's size: another host's view of that file may be older
            files |= {path.with_suffix(".bin").name: json.loads(index)["bytes"], path.name: len(index)}
        write_record(partial, {**about, "files": files})
        flush_names(partial)
        final = self.folder / name(about["step"])
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        flush_names(self.folder)
        milestone = lambda path: self.config.keep_every and step_of(path) % self.config.keep_every == 0
        for old in [path for path in complete(self.folder) if not milestone(path)][: -self.config.keep_last]:
            remove(old)
        return True
