"""Run by test_attention.py on a GPU: fused bfloat16 kernels against transformers' own in float64."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longalign.data.batch import concatenate
from longalign.model import attention, kernels
from longalign.model.activations import Activations
from longalign.model.loss import StepTotals, WeightedLoss, batch_weights

shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3, "vocab_size": 1000}
config = LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=2, head_dim=128)
torch.manual_seed(0)
exact = LlamaForCausalLM(config).double().cuda()
states = {name: tensor.clone() for name, tensor in exact.state_dict().items()}
rng = np.random.default_rng(0)
ids = [rng.integers(0, 1000, n) for n in (1, 300, 4, 700)]
batch = concatenate(ids, [np.concatenate([[-100], row[1:]]) for row in ids])
totals = StepTotals(4, 1, int(batch.n_target.sum()))
weights = batch_weights("sequence", batch, torch.zeros(4, dtype=torch.int64), totals).cuda()
batch = batch.to("cuda")


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    WeightedLoss(model.train())(batch, weights)[0].backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def furthest(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    return max(float((found[name] - truth[name]).norm() / truth[name].norm()) for name in truth)


attention.install(exact, "sdpa")
truth = gradients(exact)
plain = LlamaForCausalLM(config).to(torch.bfloat16).cuda()
plain.load_state_dict(states)
attention.install(plain, "varlen")
unfused = furthest(gradients(plain), truth)

model = LlamaForCausalLM(config).to(torch.bfloat16).cuda()
model.load_state_dict(states)
attention.install(model, attention.choose_backend("auto", "cuda", torch.bfloat16, 128)[0])
print(kernels.install(model), attention.choose_backend("auto", "cuda", torch.bfloat16, 128)[0])
activations = Activations(model, "selective")
kept = gradients(model)
print(f"largest error of a gradient in bfloat16: {unfused:.2e} unfused, {furthest(kept, truth):.2e} fused")
assert furthest(kept, truth) < 1.5 * unfused
activations.with_matmuls = 3
again = gradients(model)
print(f"with matmuls kept: {furthest(again, truth):.2e}; against selective {furthest(again, kept):.2e}")
assert furthest(again, kept) < unfused / 2  # backward passes add in any order
