"""What a GPU does.

The H200's rates are measured with `longalign bench` (docs/benchmarks.md); the others' are the H200's, scaled by their
makers' figures for matrices and memory, and marked so.
"""

from __future__ import annotations

from typing import NamedTuple


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
    """Of torch.cuda.get_device_name's words, as in 'NVIDIA H200' and 'NVIDIA A100-SXM4-80GB'."""
    return next((gpu for gpu in GPUS.values() if all(part in name for part in gpu.name.split("-"))), None)
