"""What DeepSpeed's own sequence parallelism for transformers does to packs and gradients, on two gloo processes.

    DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 bench/deepspeed_ulysses.py

1. Leak: how far the hidden states of a pack's second document move if the first one changes, under
   UlyssesSPAttentionHF around SDPA with position ids that restart at each document.
2. Scale: each rank backpropagates the loss of its own targets. The sum of both ranks' gradients over what DeepSpeed
   leaves in the parameters, for every ZeRO stage, told of sequence parallelism (mpu) and not.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, where Python would find tokenize.py in place of its own module

import contextlib
import io
import logging
import warnings

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed.utils import safe_get_full_grad
from transformers import LlamaConfig, LlamaForCausalLM

warnings.filterwarnings("ignore")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo", verbose=False)
rank, ranks = dist.get_rank(), dist.get_world_size()
FIRST, SECOND = 24, 40  # tokens of two documents


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa")
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # else attention is so flat that a leak would hardly move anything
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    return model


def mine(row: torch.Tensor) -> torch.Tensor:
    return row.chunk(ranks)[rank][None]


def hidden(model: LlamaForCausalLM, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return model.model(input_ids=mine(ids), position_ids=mine(positions), use_cache=False).last_hidden_state[0]


def say(*words: object) -> None:
    if rank == 0:
        print(*words, flush=True)


ids = torch.randint(100, (FIRST + SECOND,), generator=torch.Generator().manual_seed(1))
positions = torch.cat([torch.arange(FIRST), torch.arange(SECOND)])
model = make_model()
mpu = UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", ranks, micro_batch_size=1)

with torch.no_grad():
    other = torch.cat([(ids[:FIRST] + 7) % 100, ids[FIRST:]])
    before, after = (hidden(model, row, positions) for row in (ids, other))
    second = mine(torch.arange(len(ids)) >= FIRST)[0]
    moved = ((before - after).norm(dim=-1) / before.norm(dim=-1))[second].max()
    dist.all_reduce(moved, dist.ReduceOp.MAX)
say(f"leak: the second document moves by {moved:.1e}")

target = torch.randint(100, (FIRST + SECOND,), generator=torch.Generator().manual_seed(2))


def loss_of(model: LlamaForCausalLM) -> torch.Tensor:
    """The summed loss of this rank's targets."""
    out = hidden(model, ids, torch.arange(len(ids)))
    return torch.nn.functional.cross_entropy(model.lm_head(out), mine(target)[0], reduction="sum")


class Loss(torch.nn.Module):
    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def forward(self) -> torch.Tensor:
        return loss_of(self.model)


loss_of(model).backward()
wanted = {}
for name, parameter in model.named_parameters():
    dist.all_reduce(parameter.grad)
    wanted[name] = parameter.grad.clone()

for told in (False, True):  # in this order: DeepSpeed remembers an mpu
    for stage in (0, 1, 2, 3):
        for scatter in (True, False) if stage == 3 else (True,):
            config = {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "zero_optimization": {"stage": stage, "reduce_scatter": scatter},
                "steps_per_print": 10**9,
                "zero_allow_untested_optimizer": True,
            }
            module = Loss(make_model())
            optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
            kwargs = {"mpu": mpu} if told else {}
            with contextlib.redirect_stdout(io.StringIO()):
                engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, **kwargs)
            engine.backward(engine())
            found = {name: safe_get_full_grad(p).clone() for name, p in engine.module.model.named_parameters()}
            factors = torch.stack([(found[n] * wanted[n]).sum() / wanted[n].square().sum() for n in wanted])
            factor = f"{factors.min():.4f} to {factors.max():.4f}"
            say(f"ZeRO-{stage} reduce_scatter={scatter} mpu={told}: {factor} of the sum")
            engine.destroy()
dist.destroy_process_group()
