"""What a GPU does.

The H200's rates are measured with `longalign bench` (docs/benchmarks.md); the others' are the H200's, scaled by their
makers' figures for matrices and memory, and marked so. A device that is here has the memory that it says.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    name: str
    memory: float  # bytes
    matmul: float  # bf16 FLOP/s of a large matrix product
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to another GPU of the host, one way
    host: float  # bytes/s to the host's memory
    measured: bool = False

    @property
    def linear(self) -> float:
        """FLOP/s of a model's matrices."""
        return 0.96 * self.matmul

    def attention(self, length: float) -> tuple[float, float]:
        """FLOP/s forward, and backward counted as twice the forward, within documents of this length."""
        full = length / (length + 1024)  # a tile's worth of a document is masked
        return 0.97 * self.matmul * full, 0.72 * self.matmul * full


H200 = Gpu("H200", 139.8 * 2**30, 684e12, 4.8e12, 450e9, 50e9, measured=True)
GPUS = {
    gpu.name: gpu
    for gpu in (
        H200,
        H200._replace(name="H100", memory=79.1 * 2**30, bandwidth=3.35e12, measured=False),
        H200._replace(
            name="A100-80GB",
            memory=79.1 * 2**30,
            matmul=684e12 * 312 / 989,
            bandwidth=2.0e12,
            link=300e9,
            host=25e9,
            measured=False,
        ),
        H200._replace(
            name="B200", memory=178.0 * 2**30, matmul=684e12 * 2250 / 989, bandwidth=8.0e12, link=900e9, measured=False
        ),
    )
}


def find(name: str) -> Gpu | None:
    """The kind that torch.cuda.get_device_name tells, as in 'NVIDIA H200' and 'NVIDIA A100-SXM4-80GB'.

    None for kinds not in the table. Whole words count: a GH200 is no H200, and a MIG slice has not its GPU's rates.
    """
    words = set(re.split(r"[\s-]+", name))
    if "MIG" in words:
        return None
    return next((gpu for gpu in GPUS.values() if words >= set(gpu.name.split("-"))), None)


def here() -> Gpu | None:
    """This process' CUDA device with its own memory, None without one; an unknown kind has the H200's rates."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    kind = find(name) or H200._replace(name=name, measured=False)
    return kind._replace(memory=float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory))


def planned(name: str) -> Gpu | None:
    """The GPU of plan.gpu=name; for auto the one here, None if there is none or its kind is unknown."""
    if name != "auto":
        return GPUS[name]
    return here() if torch.cuda.is_available() and find(torch.cuda.get_device_name()) else None
