"""Packs do not leak, and packed attention is attention."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from longalign.data.batch import Batch, concatenate
from longalign.errors import UserError
from longalign.model import attention


def pack(*lengths: int, vocab: int = 500, seed: int = 0) -> tuple[list[np.ndarray], Batch]:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(4, vocab, n) for n in lengths]
    labels = [np.concatenate([[-100], row[1:]]) for row in ids]
    return ids, concatenate(ids, labels)


def logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
            use_cache=False,
        ).logits[0]


@pytest.fixture(scope="module")
def model(model_dir: Path) -> torch.nn.Module:
    made = AutoModelForCausalLM.from_pretrained(model_dir)
    attention.install(made, "sdpa")
    return made


def test_packed_equals_every_document_alone(model: torch.nn.Module, model_dir: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager")
    ids, batch = pack(1, 17, 64, 3)
    together = logits(model, batch)
    for start, row in zip(batch.cu_seqlens.tolist(), ids, strict=False):
        with torch.no_grad():
            alone = plain(input_ids=torch.from_numpy(row)[None]).logits[0]
        difference = (together[start : start + len(row)] - alone).norm() / alone.norm()
        assert difference < 1e-6


def test_documents_do_not_see_each_other(model: torch.nn.Module) -> None:
    """Other content in document 1 leaves every later document's logits equal to the last bit, and moves its own."""
    ids, batch = pack(20, 33, 7)
    before = logits(model, batch)
    other = concatenate([(ids[0] + 11) % 400 + 4, *ids[1:]], [np.concatenate([[-100], r[1:]]) for r in ids])
    after = logits(model, other)
    assert torch.equal(before[20:], after[20:])
    assert not torch.allclose(before[:20], after[:20])


def test_a_leak_would_be_seen(model: torch.nn.Module) -> None:
    """The probe above is not blind: as one document, the same tokens do influence what follows."""
    ids, _ = pack(20, 33)
    as_one = lambda first: concatenate([np.concatenate([first, ids[1]])], [np.array([-100] + [5] * 52)])
    before, after = logits(model, as_one(ids[0])), logits(model, as_one((ids[0] + 11) % 400 + 4))
    assert not torch.allclose(before[20:], after[20:])


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (8, 2, 64), (6, 1, 128)])
def test_backend_against_float64(heads: int, kv_heads: int, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 13, 40]
    draw = lambda h: torch.randn(sum(lengths), h, head_dim, generator=generator)
    q, k, v = draw(heads), draw(kv_heads), draw(kv_heads)
    cu = torch.tensor([0, 1, 14, 54], dtype=torch.int32)
    out = attention.packed_attention(q, k, v, cu, 40, head_dim**-0.5, "sdpa")
    for start, stop in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        for head in range(heads):
            group = head // (heads // kv_heads)
            q1, k1, v1 = q[start:stop, head].double(), k[start:stop, group].double(), v[start:stop, group].double()
            scores = (q1 @ k1.T) * head_dim**-0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            torch.testing.assert_close(out[start:stop, head].double(), scores.softmax(-1) @ v1, rtol=1e-5, atol=1e-5)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.attention=varlen cannot run here"):
        attention.choose_backend("varlen", "cpu", torch.bfloat16, 64)
    assert attention.choose_backend("auto", "cpu", torch.float32, 64)[0] == "sdpa"
    from transformers import GraniteConfig, GraniteForCausalLM, MistralConfig, MistralForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sliding = MistralForCausalLM(MistralConfig(vocab_size=50, num_key_value_heads=2, sliding_window=8, **small))
    with pytest.raises(UserError, match="sliding window of 8"):
        attention.install(sliding, "sdpa")
    sliding.config.sliding_window = None
    attention.install(sliding, "sdpa")
    scaled = GraniteForCausalLM(GraniteConfig(vocab_size=50, num_key_value_heads=2, logits_scaling=8.0, **small))
    with pytest.raises(UserError, match=r"granite has logits_scaling=8.0, .* model.config.logits_scaling=1.0"):
        attention.install(scaled, "sdpa")


def test_what_is_installed_decides_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    choose = lambda *more: attention.choose_backend("auto", "cuda", torch.bfloat16, 128, *more)
    has = lambda *names: monkeypatch.setattr(attention, "is_installed", lambda name: name.startswith(names))
    has("flash_attn.", "cutlass", "torch")
    assert choose()[0] == "flash4"
    has("flash_attn.", "torch")  # flash-attn 2 alone, which brings a folder flash_attn/cute
    assert choose() == (
        "flash2",
        "flash-attn 2; no flash4: cutlass is not installed; no flash3: flash_attn_interface is not installed",
    )
    has("torch")
    assert choose()[0] == "varlen"
    with pytest.raises(UserError, match="added in any order, against deterministic=true; use deterministic=false"):
        choose(True)
    assert attention.choose_backend("auto", "cpu", torch.float32, 128, True)[0] == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["flash4", "flash3", "flash2", "varlen"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(8, 8, 64), (8, 2, 64), (9, 3, 64), (8, 8, 128), (8, 1, 128)]
)
@pytest.mark.parametrize("lengths", [[1, 100, 900], [1001]])
def test_backends_equal_sdpa_on_a_gpu(
    backend: attention.Backend, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, lengths: list[int]
) -> None:
    if problem := attention.why_not(backend, "cuda", dtype, head_dim):
        pytest.skip(f"{backend}: {problem}")
    draw = lambda h: torch.randn(1001, h, head_dim, device="cuda", dtype=dtype, requires_grad=True)
    q, k, v = draw(heads), draw(kv_heads), draw(kv_heads)
    cu = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device="cuda")
    results = []
    for name in (backend, "sdpa"):
        inputs = (q, k, v) if name == backend else tuple(x.detach().double().requires_grad_() for x in (q, k, v))
        out = attention.packed_attention(*inputs, cu, max(lengths), head_dim**-0.5, name)  # type: ignore[arg-type]
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() / b.norm() < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fused_kernels_equal_transformers_own_on_a_gpu(tmp_path: Path) -> None:
    """Gradients of a bfloat16 model with Liger's kernels and flash attention, against float64 without."""
    pytest.importorskip("liger_kernel")
    code = Path(__file__).with_name("fused.py")  # a process of its own: the rotary embedding is replaced in a module
    done = subprocess.run([sys.executable, str(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "RoPE" in done.stdout
