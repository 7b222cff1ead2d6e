"""The weighted loss of an optimizer step, exact on any layout of packs over ranks and micro-steps.

Let a step hold M sequences and K packs with at least one target, sequence i having N_i targets, pack k having
N_k, and N targets in all. With l_t the cross-entropy of target t, the three averages are

    sequence   1/M sum_i 1/N_i sum_{t in i} l_t     weight of a target 1 / (N_i M)     LongAlign Eq. 2
    pack       1/K sum_k 1/N_k sum_{t in k} l_t     weight of a target 1 / (K N_k)     LongAlign Eq. 3
    token      1/N sum_t l_t                        weight of a target 1 / N

each of them a plain sum of weight * l_t over every target of the step. M, K and N come from the plan, which knows
the whole step, so a rank computes its share of the sum without asking the others, and it does not matter which
rank or micro-step a pack falls to. A pack without targets adds 0. (The reference counts M and K within one
micro-step of one node, which is another loss under gradient accumulation or on several nodes.)
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset

from longalign.data.batch import Batch, load_batch
from longalign.data.plan import Pack

Average = Literal["sequence", "pack", "token"]
CHUNK = 2048  # targets whose logits exist at one time


class StepTotals(NamedTuple):
    """What a whole optimizer step holds, over all ranks."""

    sequences: int  # M
    packs: int  # K
    targets: int  # N

    @classmethod
    def of(cls, packs: list[Pack]) -> StepTotals:
        """What the packs of a step hold together."""
        with_target = sum(pack.n_target > 0 for pack in packs)
        return cls(sum(pack.n_sequences for pack in packs), with_target, sum(pack.n_target for pack in packs))


def token_weights(
    average: Average, n_of_sequence: torch.Tensor, n_of_pack: torch.Tensor, totals: StepTotals
) -> torch.Tensor:
    """The weight of each target. n_of_sequence, n_of_pack: how many targets its sequence and its pack have, [N]."""
    if average == "sequence":
        return 1.0 / (n_of_sequence.double() * totals.sequences)
    if average == "pack":
        return 1.0 / (n_of_pack.double() * totals.packs)
    return torch.full_like(n_of_sequence, 1.0 / totals.targets, dtype=torch.float64)


def batch_weights(average: Average, batch: Batch, pack_of_sample: torch.Tensor, totals: StepTotals) -> torch.Tensor:
    """float32 [N, 3]: per target of the batch its weight in the trained loss, in loss_sequence and in loss_token."""
    n_of_sequence = batch.n_target[batch.target_sample]
    pack_sizes = torch.zeros(int(pack_of_sample.max()) + 1, dtype=torch.int64)
    pack_sizes.index_add_(0, pack_of_sample, batch.n_target)
    n_of_pack = pack_sizes[pack_of_sample[batch.target_sample]]
    columns = [token_weights(a, n_of_sequence, n_of_pack, totals) for a in (average, "sequence", "token")]
    return torch.stack(columns, dim=1).float()


def micro_batch(
    dataset: Dataset, packs: list[Pack], average: Average, totals: StepTotals
) -> tuple[Batch, torch.Tensor]:
    """The packs of one micro-step of one rank, concatenated, and the weights of their targets, float32 [N, 3]."""
    batch = load_batch(dataset, [sample for pack in packs for sample in pack.sample_ids])
    pack_of_sample = torch.repeat_interleave(torch.tensor([len(pack.sample_ids) for pack in packs]))
    return batch, batch_weights(average, batch, pack_of_sample, totals)


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of each target, [N] float32; logits are made for CHUNK targets at a time, twice.

    The weight's gradient is added up over chunks in float32: in bfloat16 every addition would round it once more.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, targets_N: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_ND, targets_N, weight_VD, bias_V)
        losses = [
            F.cross_entropy(F.linear(hidden, weight_VD, bias_V).float(), targets, reduction="none")
            for hidden, targets in zip(hidden_ND.split(CHUNK), targets_N.split(CHUNK), strict=True)
        ]
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        hidden_ND, targets_N, weight_VD, bias_V = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device)
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        for start in range(0, len(targets_N), CHUNK):
            here = slice(start, start + CHUNK)
            hidden, targets = hidden_ND[here], targets_N[here]
            # d loss / d logits = softmax - 1 at the target
            grad_logits = F.linear(hidden, weight_VD, bias_V).float().softmax(-1)
            grad_logits[torch.arange(len(targets), device=targets.device), targets] -= 1
            grad_logits *= grad_N[here, None]
            if grad_bias_V is not None:
                grad_bias_V += grad_logits.sum(0)
            in_dtype = grad_logits.to(weight_VD.dtype)
            torch.mm(in_dtype, weight_VD, out=grad_hidden_ND[here])
            grad_weight_VD += in_dtype.t() @ hidden
        grad_bias = None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype)
        return grad_hidden_ND, None, grad_weight_VD.to(weight_VD.dtype), grad_bias


def token_losses(hidden_ND: torch.Tensor, lm_head: torch.nn.Linear, targets_N: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each target in float32, [N].

    It is one call of the module lm_head: ZeRO-3 gathers a module's weight from all ranks at every call, and ranks have
    unlike numbers of targets, hence of chunks.
    """
    logits_of = lm_head.forward
    losses = lambda hidden: _CrossEntropy.apply(hidden, targets_N, lm_head.weight, lm_head.bias)
    lm_head.forward = losses  # type: ignore[method-assign]
    try:
        return lm_head(hidden_ND)
    finally:
        lm_head.forward = logits_of  # type: ignore[method-assign]


class WeightedLoss(torch.nn.Module):
    """A causal language model and its loss as one module, so that ZeRO-3 gathers every weight inside forward."""

    def __init__(self, model: Any):
        super().__init__()
        self.model: Any = model  # a transformers model: its decoder is .model, its output projection .lm_head

    def forward(self, batch: Batch, weights_NC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch's share of the step's loss (float32 scalar), and of C weighted sums, detached, float32 [C].

        The first column of weights is the trained loss's, then come those of loss_sequence, loss_token and others.
        Only hidden states that predict a target go through lm_head: in long-document tuning about one in twenty.
        """
        hidden_TD = self.hidden(batch)
        losses_N = token_losses(hidden_TD[batch.target_rows], self.model.lm_head, batch.target_ids)
        shares = losses_N @ weights_NC
        return shares[0], shares.detach()

    def hidden(self, batch: Batch) -> torch.Tensor:
        """The decoder's output [T, D]; each document of the batch sees itself alone."""
        return self.model.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
        ).last_hidden_state[0]
