"""Checkpoints as shards, read and written one at a time: memory holds about one shard, whatever the model's size."""

from __future__ import annotations

import contextlib
import itertools
import json
import pickle
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from longalign.errors import UserError
from longalign.files import fresh_folder, read_json, require_disk, write_json

OURS = ("config.json", "generation_config.json", "model*.safetensors*", "original_*", "tokenizer*")
UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, AttributeError, pickle.UnpicklingError, SafetensorError)
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
Entries = dict[str, list[torch.Tensor]]  # a tensor to write, as blocks of rows one below the other


def stacked(shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of blocks of rows one below the other."""
    shapes = list(shapes)
    return sum(shape[0] for shape in shapes), *shapes[0][1:]


def survey(folder: Path, expected: dict[str, tuple[int, ...]], ignore: str = "") -> dict[Path, list[str]]:
    """The shards with the names of their tensors. Raises UserError unless each of `expected` is there, once, alone."""
    paths: list[Path] = []
    for name in ("pytorch_model.bin", "model.safetensors"):  # the later wins, as in transformers
        if (index := folder / f"{name}.index.json").is_file():
            paths = [folder / shard for shard in sorted(set(read_json(index)["weight_map"].values()))]
        if (folder / name).is_file():
            paths = [folder / name]
    if not paths:
        raise UserError(f"{folder} holds no model.safetensors, no pytorch_model.bin and no index of either's shards")
    tensors = [(path, name, tensor.shape, tensor.dtype) for path in paths for name, tensor in read_shard(path).items()]
    count = Counter(name for _, name, _, _ in tensors)
    faults = {
        "missing": [name for name in expected if name not in count],
        "surplus": [name for name in count if name not in expected and name != ignore],
        "twice": [name for name, n in count.items() if n > 1],
        "wrong": [
            f"{name} {dtype} {list(shape)} instead of {list(expected.get(name, shape))}"
            for _, name, shape, dtype in tensors
            if tuple(shape) != expected.get(name, tuple(shape)) or dtype not in DTYPES
        ],
    }
    if any(faults.values()):
        said = [f"{kind}: {', '.join(f[:6])}{' ...' * (len(f) > 6)} ({len(f)})" for kind, f in faults.items() if f]
        raise UserError(f"{folder}: the tensors are not those of its config.json; {'; '.join(said)}")
    return {path: [name for file, name, _, _ in tensors if file == path] for path in paths}


def read_shard(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a shard, mapped from its file: memory holds what is touched, until they are let go."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        read = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
        return {name: tensor for name, tensor in read.items() if isinstance(tensor, torch.Tensor)}
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read: {next(iter(str(error).splitlines()), repr(error))}") from None


@contextlib.contextmanager
def checkpoint_folder(
    folder: Path, output: Path, overwrite: bool, setting: str, shards: list[Path], entries: Callable[[Path], Entries]
) -> Iterator[Path]:
    """The folder to become `output`, with tokenizer.model and one safetensors file per shard of `folder` in it."""
    if output.resolve() == folder.resolve():
        raise UserError(f"{setting}={output} is the checkpoint itself; give another folder")
    require_disk(output, sum(path.stat().st_size for path in shards), setting)
    with fresh_folder(output, OURS, overwrite, setting) as partial:
        if (folder / "tokenizer.model").is_file():
            shutil.copyfile(folder / "tokenizer.model", partial / "tokenizer.model")
        weight_map, size = {}, 0
        for i, shard in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            tensors = entries(shard)
            weight_map.update(dict.fromkeys(tensors, name))
            size += _write(partial / name, tensors)
            del tensors  # before the next shard is mapped
        if len(shards) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            write_json(partial / "model.safetensors.index.json", index)
        yield partial


def _write(path: Path, tensors: Entries) -> int:
    """A safetensors file written block by block (save_file would copy the shard); gives the bytes of the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, blocks in tensors.items():
        start, end = end, end + sum(block.nbytes for block in blocks)
        if len({block.dtype for block in blocks}) > 1:
            raise UserError(f"{name} would have rows of several dtypes; save the model in one")
        shape = stacked(block.shape for block in blocks)
        header[name] = {"dtype": DTYPES[blocks[0].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in itertools.chain.from_iterable(tensors.values()):
            file.write(block.detach().contiguous().view(torch.uint8).numpy().data)
    return end
