"""Predictions against what was measured, and what must hold whatever the numbers are."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from longalign.bench.layouts import lengths
from longalign.forecast import gpus
from longalign.forecast.predict import predict
from longalign.model.activations import Policy

LLAMA2_7B = {
    "layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "kv_heads": 32, "head_dim": 128, "vocab": 32000
}  # fmt: skip
WEIGHTS_AND_GRADIENTS = 4 * 6.74e9  # bytes, bf16
H200 = gpus.H200

LLAMA3_8B = {**LLAMA2_7B, "intermediate": 14336, "kv_heads": 8, "vocab": 128256}

# tokens/s and GiB of `longalign bench` on one H200, docs/performance-log.md; with so many bytes of host memory
MEASURED: list[tuple[str, Policy, float, float, float]] = [
    ("1x65536", "budget", 5857, 132.0, 0),
    ("64x1024", "budget", 14682, 132.0, 0),
    ("mix", "budget", 8657, 132.0, 0),
    ("1x65536", "selective", 5607, 66.0, 0),
    ("64x1024", "selective", 11991, 66.0, 0),
    ("1x65536", "budget", 5738, 129.9, 100e9),
    ("64x1024", "budget", 14880, 130.5, 100e9),
    ("mix", "budget", 8232, 130.1, 100e9),
    ("1x8192", "budget", 12617, 57.7, 100e9),
    ("1x2048", "budget", 12899, 33.5, 100e9),
    ("1x512", "budget", 3747, 27.4, 100e9),
    ("1x65536", "offload", 5526, 36.2, 100e9),
    ("1x393216", "offload", 1133, 64.9, 114e9),
    ("1x32768", "budget", 8709, 118.5, 100e9),
    ("64x1024", "budget", 15213, 130.9, 100e9),
]


def of(
    documents: list[int], policy: Policy, host: float = 0.0, gpu: gpus.Gpu = H200, fixed: float = WEIGHTS_AND_GRADIENTS
):  # type: ignore[no-untyped-def]
    return predict(documents, LLAMA2_7B, gpu, policy, fixed, host)


@pytest.mark.parametrize(("pack", "policy", "tokens_per_s", "peak", "host"), MEASURED)
def test_within_15_percent_of_measurement(
    pack: str, policy: Policy, tokens_per_s: float, peak: float, host: float
) -> None:
    documents = lengths(pack, 65536, np.random.default_rng(42))
    shape, parameters = (LLAMA3_8B, 8.03e9) if pack == "1x393216" else (LLAMA2_7B, 6.74e9)
    found = predict(documents, shape, H200, policy, 4 * parameters, host)
    assert found is not None
    assert sum(documents) / found.seconds == pytest.approx(tokens_per_s, rel=0.15)
    assert found.peak / 2**30 == pytest.approx(peak, rel=0.15)


def test_more_kept_is_faster_and_larger() -> None:
    order: list[Policy] = ["full", "selective", "budget"]
    found = [of([65536], policy) for policy in order]
    assert all(found)
    seconds, peaks = ([getattr(one, key) for one in found] for key in ("seconds", "peak"))
    assert seconds == sorted(seconds, reverse=True)
    assert peaks == sorted(peaks)
    assert of([65536], "budget", host=1e12) == found[-1], "attention outputs fit the device"
    assert of([65536], "budget", fixed=110e9) is None
    on_host = of([65536], "budget", host=1e12, fixed=110e9)
    assert on_host.kept.startswith("attention in host memory")
    assert on_host.seconds < found[0].seconds


def test_a_pack_costs_what_its_documents_cost() -> None:
    """Documents do not see each other: many short ones cost less than a long one, and order does not matter."""
    assert (
        of([1024] * 64, "selective").seconds < of([32768] * 2, "selective").seconds < of([65536], "selective").seconds
    )
    one, other = of([30000, 2000, 5000], "selective"), of([5000, 30000, 2000], "selective")
    assert one.seconds == pytest.approx(other.seconds)


def test_gpus_that_run_a_pack_together_share_its_time_and_memory() -> None:
    """Each needs half the time and half the memory, and a little of both for the exchange; many short documents too."""
    for documents in ([65536], [1024] * 64):
        one, two = (predict(documents, LLAMA2_7B, H200, "selective", 0.0, sequence_parallel=n) for n in (1, 2))
        assert one is not None
        assert two is not None
        assert one.peak / 2 < two.peak < 0.6 * one.peak
        assert one.seconds / 2 < two.seconds < 0.6 * one.seconds
    most = 2**18
    assert predict([most], LLAMA2_7B, H200, "selective", WEIGHTS_AND_GRADIENTS) is None
    assert predict([most], LLAMA2_7B, H200, "selective", WEIGHTS_AND_GRADIENTS, sequence_parallel=4)


def test_slices_of_gpus_that_run_a_pack_together() -> None:
    """Two hold twice the tokens of which everything is kept, so half as many slices."""
    slices = lambda n: predict([1024] * 256, LLAMA2_7B, H200, "budget", WEIGHTS_AND_GRADIENTS, sequence_parallel=n)
    count = lambda found: int(found.kept.split(", ")[-1].split()[0])
    assert count(slices(1)) == pytest.approx(2 * count(slices(2)), abs=1)


def test_what_does_not_fit_is_said() -> None:
    h100 = gpus.GPUS["H100"]
    assert of([65536], "selective", gpu=h100)
    assert of([65536], "selective", gpu=h100, fixed=60e9) is None
    assert of([65536], "offload", gpu=h100, fixed=60e9, host=1e12)
    assert of([65536], "offload", gpu=h100, fixed=60e9, host=1e9) is None, (
        "layer inputs fit neither the host nor, beside the rest, the GPU"
    )


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA H100 NVL", "H100"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("Tesla T4", None),
    ],
)
def test_names_of_gpus(said: str, name: str | None) -> None:
    found = gpus.find(said)
    assert (found.name if found else None) == name


@pytest.mark.parametrize(("said", "name"), [("NVIDIA H100 NVL", "H100"), ("Tesla T4", "Tesla T4")])
def test_the_device_here_has_the_memory_that_it_says(said: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus.here() is None or gpus.torch.cuda.is_available()
    monkeypatch.setattr(gpus.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpus.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpus.torch.cuda, "get_device_name", lambda: said)
    monkeypatch.setattr(gpus.torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=93 * 2**30))
    found = gpus.here()
    assert found is not None
    assert (found.name, found.memory) == (name, 93 * 2**30)
    planned = gpus.planned("auto")
    assert planned == (found if name == "H100" else None), "rates of an unknown kind are not guessed"
    assert gpus.planned("H100") == gpus.GPUS["H100"]
