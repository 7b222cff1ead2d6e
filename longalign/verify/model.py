"""Checks of the model: ours over packs against plain transformers over every document alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from longalign.data.batch import Batch, concatenate
from longalign.data.template import IGNORE
from longalign.model.loss import Average, StepTotals, WeightedLoss, micro_batch, token_losses
from longalign.verify.check import Check, at_most, not_run
from longalign.verify.probe import Probe

LOSSES = ("trained", "sequence", "token")  # what a step returns: strategy.average's, and two that are always logged
LOSS_ADVICE = "the loss is not the one that strategy.average names: this is a defect, please report it"
LOGITS_KEPT = 512  # targets whose logits are compared, [LOGITS_KEPT, vocabulary] in float32
# Relative errors that rounding makes, by precision. A leak, a wrong position or a wrong weight is far above them.
LEAK = {torch.float32: 1e-6, torch.bfloat16: 1e-3}
LOGITS = 1e-4
WEIGHTS = 1e-5
LOSS = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
ROUNDINGS = 3 * 2**0.5  # standard deviations of a loss's rounding: three, and both sides of a comparison are rounded
LOSS_AT_MOST = 2e-2  # however few targets there are, and however much rounding moves them
# In bfloat16 five probes of 430 targets were off by 0.2% to 2.4%. A wrong scale is a whole factor: of ranks, of packs.
GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass
class Seen:
    """What a model made of the probe."""

    losses: dict[str, float]  # the step's, by LOSSES; run alone, by average
    nll: torch.Tensor  # of each target, float64 on the CPU
    logits: torch.Tensor  # float32 on the CPU, those of `kept` targets
    inv_freq: list[torch.Tensor]  # one per rotary module, on the CPU
    grad_norm: float | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)  # of each target in a loss, by average, float64


def kept(probe: Probe) -> torch.Tensor:
    """Places, among all targets of the probe in order, of those whose logits are compared."""
    n_targets = sum(pack.n_target for pack in probe.packs)
    return torch.from_numpy(np.unique(np.linspace(0, n_targets - 1, LOGITS_KEPT).astype(np.int64)))


class _Recording(WeightedLoss):
    """Keeps the hidden states that predict targets, so that the loss and they come of one forward."""

    def __init__(self, model: Any):
        super().__init__(model)
        self.rows: list[torch.Tensor] = []

    def hidden(self, batch: Batch) -> torch.Tensor:
        made = super().hidden(batch)
        self.rows.append(made[batch.target_rows])
        return made


@torch.no_grad()
def packed(model: Any, probe: Probe, average: Average) -> Seen:
    """Ours: packs through packed attention, each target weighted from the whole step."""
    device, dataset = next(model.parameters()).device, probe.dataset()
    totals = StepTotals.of(probe.packs)
    ours, losses, nll = _Recording(model), torch.zeros(3, dtype=torch.float64), []
    for pack in probe.packs:
        batch, weights = micro_batch(dataset, [pack], average, totals)
        batch = batch.to(device)
        losses += ours(batch, weights.to(device))[1].double().cpu()
        nll.append(token_losses(ours.rows[-1], model.lm_head, batch.target_ids).double().cpu())
    logits = model.lm_head(torch.cat(ours.rows)[kept(probe).to(device)]).float().cpu()
    found = dict(zip(LOSSES, losses.tolist(), strict=True))
    return Seen(found, torch.cat(nll), logits, list(_inv_freq(model)))


def separate(model: Any, probe: Probe, average: Average, backward: bool) -> Seen:
    """Plain transformers, one document at a time, the averages as the paper writes them (Eq. 2, Eq. 3)."""
    device = next(model.parameters()).device
    n_targets = [int(np.sum(labels != IGNORE)) for _, labels in probe.rows]
    n_sequences = sum(n > 0 for n in n_targets)
    of_pack = {row: sum(n_targets[r] for r in pack.sample_ids) for pack in probe.packs for row in pack.sample_ids}
    n_packs = sum(any(n_targets[row] for row in pack.sample_ids) for pack in probe.packs)
    weights: dict[str, list[torch.Tensor]] = {"sequence": [], "pack": [], "token": []}
    nlls, logits, wanted, start = [], [], kept(probe), 0
    for row, (ids, labels) in enumerate(probe.rows):
        if not n_targets[row]:
            continue
        targets = torch.from_numpy(np.flatnonzero(labels != IGNORE))
        with torch.set_grad_enabled(backward):
            made = model(
                input_ids=torch.from_numpy(ids.astype(np.int64))[None].to(device),
                attention_mask=_causal(model, len(ids)),
                logits_to_keep=(targets - 1).to(device),  # the logits that predict them: one place earlier
                use_cache=False,
            ).logits[0]
            nll = F.cross_entropy(
                made.float(), torch.from_numpy(labels[targets].astype(np.int64)).to(device), reduction="none"
            )
            weight = {
                "sequence": 1 / n_targets[row] / n_sequences,
                "pack": 1 / of_pack[row] / n_packs,
                "token": 1 / sum(n_targets),
            }
            if backward:
                (nll.sum() * weight[average]).backward()
        nlls.append(nll.detach().double().cpu())
        for name, value in weight.items():
            weights[name].append(torch.full_like(nlls[-1], value))
        mine = wanted[(wanted >= start) & (wanted < start + n_targets[row])] - start
        logits.append(made.detach()[mine.to(device)].float().cpu())
        start += n_targets[row]
    # in float64: a float32 sum of the squares of so many is off by 1e-4 on a CPU
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in model.parameters() if p.grad is not None]
    norm = float(torch.stack(norms).norm()) if backward else None
    nll, of_targets = torch.cat(nlls), {name: torch.cat(found) for name, found in weights.items()}
    losses = {name: float(nll @ found) for name, found in of_targets.items()}
    return Seen(losses, nll, torch.cat(logits), list(_inv_freq(model)), norm, of_targets)


def _causal(model: Any, n_tokens: int) -> torch.Tensor | None:
    """float32 [1, 1, n_tokens, n_tokens], for grouped queries in float32; else None, and transformers makes its own.

    Without a mask transformers leaves groups to SDPA, which has but one kernel for them in float32: that which holds
    the scores of every head, 128 GiB at 32 heads and 32,768 tokens. With one it repeats keys and values.
    """
    text = model.config.get_text_config()
    grouped = getattr(text, "num_key_value_heads", None) not in (None, text.num_attention_heads)
    if model.dtype != torch.float32 or not grouped or getattr(text, "sliding_window", None):
        return None  # a sliding window has a mask already, which this one would replace
    return torch.full((n_tokens, n_tokens), -torch.inf, device=model.device).triu_(1)[None, None]


def _inv_freq(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        if isinstance(inv_freq := getattr(module, "inv_freq", None), torch.Tensor):
            yield inv_freq.detach().cpu()


# -- checks -----------------------------------------------------------------------------------------------


@torch.no_grad()
def check_leak(model: Any, probe: Probe) -> Check:
    """Another first document moves no token of the others, to the last bit or nearly; joined to it, it does."""
    name, rows = "leak: other documents move by", [ids for ids, _ in probe.rows]
    if len(rows) < 2:
        return not_run(name, "the probe has one document; raise verify.packs")
    parameter, vocab = next(model.parameters()), model.config.get_text_config().vocab_size
    other = (rows[0] + 7) % vocab

    def run(documents: list[np.ndarray]) -> torch.Tensor:
        """Hidden states of the tokens behind the first document."""
        batch = concatenate(documents, [np.full(len(ids), IGNORE) for ids in documents])
        return WeightedLoss(model).hidden(batch.to(parameter.device)).float()[len(other) :]

    moved = lambda before, after: float(((after - before).norm(dim=-1) / before.norm(dim=-1)).max())
    leaked = moved(run(rows), run([other, *rows[1:]]))
    joined = moved(run([np.concatenate(rows[:2])]), run([np.concatenate([other, rows[1]])]))
    tolerance = LEAK[parameter.dtype]
    if joined <= tolerance:
        return Check(name, False, joined, tolerance, "even joined to it nothing moves: this model attends to nothing")
    detail = f"{len(rows)} documents, {probe.tokens:,} tokens; joined to the first, the second moves by {joined:.1e}"
    advice = "documents of a pack see each other: do not train; try model.attention=sdpa and report the model's name"
    return at_most(name, leaked, tolerance, detail, advice)


def check_rope(ours: Seen, exported: Seen, rope: dict[str, Any], exported_config: Any) -> Iterator[Check]:
    """inv_freq in float32 and of the wanted base, in training as in what is exported.

    For the default kind the frequencies of d rotated dimensions are theta^(-2i/d) (RoFormer, Eq. 15); others are
    compared with those that plain transformers makes of the exported config.
    """
    name, advice = "rope: inv_freq as configured", "positions would be wrong: check model.rope and config.json"
    if not ours.inv_freq:
        yield not_run(name, "the model has no rotary embedding")
        return
    kind, theta = rope.get("rope_type", "default"), rope.get("rope_theta")
    worst = 0.0
    for mine, theirs in zip(ours.inv_freq, exported.inv_freq, strict=True):
        wanted = theirs.double()
        if kind == "default" and theta:
            wanted = float(theta) ** -(torch.arange(len(mine), dtype=torch.float64) / len(mine))
        for found in (mine, theirs):
            worst = max(worst, float(((found.double() - wanted) / wanted).abs().max()))
    yield at_most(name, worst, 1e-5, f"{kind}, base {theta}, {ours.inv_freq[0].dtype}", advice)
    told = exported_config.get_text_config().rope_parameters
    yield Check("rope: exported config says the same", told == rope, detail=str(told), advice=advice)


def check_reload(ours: Seen, reloaded: Seen) -> Check:
    difference = float((ours.logits - reloaded.logits).abs().max())
    return at_most(
        "save, reload: logits differ by",
        difference,
        0,
        f"{len(ours.logits)} targets, packed",
        "the exported folder is not the model that trains: this is a defect, please report it",
    )


def check_packed(ours: Seen, alone: Seen, truth: Seen | None) -> Check:
    """float32: the worst target's relative error. bfloat16: our error over that of documents run alone."""
    advice = "packing changes what the model computes: try model.attention=sdpa and report the model's name"
    if truth is None:
        error = (ours.logits - alone.logits).norm(dim=-1) / alone.logits.norm(dim=-1)
        detail = f"logits of {len(error)} targets, the worst"
        return at_most("packed = every document alone", float(error.max()), LOGITS, detail, advice)
    packed_error, alone_error = (float((x.logits - truth.logits).norm() / truth.logits.norm()) for x in (ours, alone))
    detail = f"logits against float32: packed {packed_error:.1e}, alone {alone_error:.1e}"
    return at_most("packed = every document alone", packed_error / alone_error, 2.0, detail, advice)


def check_gradient(norm: float, alone: Seen, dtype: torch.dtype, where: str) -> Check:
    assert alone.grad_norm is not None
    return at_most(
        "gradient norm = plain transformers",
        relative(norm, alone.grad_norm),
        GRADIENT[dtype],
        f"{norm:.6f} and {alone.grad_norm:.6f}, {where}",
        "gradients are scaled wrongly, which Adam would hide: this is a defect, please report it",
    )


def _named(losses: dict[str, float], average: str) -> Iterator[tuple[str, float, str]]:
    """Each of LOSSES, its value and its average."""
    for name, value in losses.items():
        yield name, value, average if name == "trained" else name


def check_weights(ours: Seen, alone: Seen, average: str) -> Check:
    """Each loss is what the paper's Eq. 2, Eq. 3 or a mean over targets makes of the targets' own, in any precision."""
    wanted = {name: float(ours.nll @ alone.weights[mean]) for name, _, mean in _named(ours.losses, average)}
    error = {name: relative(value, wanted[name]) for name, value in ours.losses.items()}
    name = worst(error, dict.fromkeys(error, WEIGHTS))
    detail = f"{name}: {ours.losses[name]:.6f} and {wanted[name]:.6f} of {len(ours.nll)} targets"
    return at_most("loss: every target's weight", error[name], WEIGHTS, detail, LOSS_ADVICE)


def check_losses(
    ours: dict[str, float], alone: Seen, truth: Seen | None, average: str, dtype: torch.dtype, where: str
) -> Check:
    """All of LOSSES.

    bfloat16 with few targets: what rounding moves a loss by is told by the targets, run alone, against float32.
    """
    error, limit, advice = {}, {}, LOSS_ADVICE
    for name, value, mean in _named(ours, average):
        error[name], limit[name] = relative(value, alone.losses[mean]), LOSS[dtype]
        if truth is not None:
            rounding = float(((alone.nll - truth.nll) * alone.weights[mean]).norm())  # as if of one another independent
            limit[name] = max(limit[name], ROUNDINGS * relative(rounding, 0, alone.losses[mean]))
            if limit[name] > LOSS_AT_MOST:
                limit[name], advice = LOSS_AT_MOST, f"{LOSS_ADVICE}, unless more verify.tokens or verify.packs mend it"
    name = worst(error, limit)
    detail = f"{average}: {ours['trained']:.6f} and {alone.losses[average]:.6f}; worst: {name}"
    return at_most(f"loss = plain transformers ({where})", error[name], limit[name], detail, advice)


def relative(value: float, wanted: float, of: float | None = None) -> float:
    """How far value is from what is wanted, in parts of it or of `of`."""
    return abs(value - wanted) / max(abs(wanted if of is None else of), 1e-30)


def worst(error: dict[str, float], limit: dict[str, float]) -> str:
    """Which error is the largest part of its limit; a NaN before all others."""
    return max(error, key=lambda name: (math.isnan(error[name]), error[name] / limit[name]))
