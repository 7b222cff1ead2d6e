"""Loss and perplexity on the held-out samples of tokenised data: the losses of training, of weights at rest.

No questions are asked. Packs, losses and groups are those of a training run that looks (longalign/train/heldout.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich import box
from rich.table import Table

from longalign.data.plan import Pack, read_columns, read_data
from longalign.errors import UserError
from longalign.evaluate.models import Endpoint, Local
from longalign.model import attention
from longalign.model.load import template_settings
from longalign.model.loss import StepTotals, WeightedLoss
from longalign.preflight import check_tokenizer
from longalign.progress import Bar, warn
from longalign.schema import Config
from longalign.train.breakdown import BUCKETS, Breakdown
from longalign.train.heldout import heldout_packs, weighted_sums
from longalign.train.micro import MicroStep, micro_steps


def prepare(config: Config, model: Local | Endpoint) -> tuple[Dataset, list[Pack]]:
    """The samples and their packs. Raises UserError for an endpoint, data that is not there or not this model's."""
    settings = config.task.heldout
    assert settings is not None
    if isinstance(model, Endpoint):
        raise UserError(
            f"task=heldout needs the model's weights, which model.endpoint={config.model.endpoint} keeps to itself; "
            "set model.endpoint=null and model.path to a folder, or leave the task out"
        )
    key = "data_dir" if settings.path == config.data_dir else "task.heldout.path"
    config = config.model_copy(update={"data_dir": settings.path})
    dataset, packs = heldout_packs(config, settings.limit, key)
    data, template = read_data(config.data_dir)[1], template_settings(config)["template"]
    check_tokenizer(config, data)
    if data["template"] != template:
        warn(
            f"{key}={config.data_dir} was tokenised with template={data['template']}, the model asks with "
            f"{template}: the loss is that of a form it may not know"
        )
    return dataset, packs


def preview(config: Config, model: Local | Endpoint) -> str:
    _, packs = prepare(config, model)
    totals, tokens = StepTotals.of(packs), sum(pack.tokens for pack in packs)
    return f"{totals.sequences:,} samples, {tokens:,} tokens, {totals.targets:,} of them targets"


def measure(config: Config, model: Local | Endpoint) -> dict[str, Any]:
    """{loss, loss_token, perplexity, samples, tokens, targets, by_source, by_length}, see entry(); by_* alike.

    Raises UserError as prepare does, and out of memory.
    """
    dataset, packs = prepare(config, model)
    assert isinstance(model, Local)
    lm, device = model.generator.model, model.generator.device
    breakdown = Breakdown(dataset, per_token=True)
    own_attention = lm.config._attn_implementation
    attention.install(lm, attention.backend_of(config, lm.config, device)[0])
    try:
        with Bar("heldout", StepTotals.of(packs).sequences, "samples") as bar:
            steps = micro_steps(dataset, packs, config, torch.device(device), breakdown)
            _, *losses = weighted_sums(WeightedLoss(lm), counted(steps, bar))
    except torch.OutOfMemoryError:
        longest = max(pack.tokens for pack in packs)
        raise UserError(
            f"out of memory on {longest:,} tokens at once; lower max_length={config.max_length} as far as the longest "
            "sample allows"
        ) from None
    finally:
        lm.set_attn_implementation(own_attention)  # that of the other tasks' questions
    return summarise(losses, packs, breakdown, read_columns(dataset).length)


def counted(steps: Iterable[MicroStep], bar: Bar) -> Iterator[MicroStep]:
    for step in steps:
        yield step
        bar.advance(len(step.batch.n_target))


def summarise(losses: list[float], packs: list[Pack], breakdown: Breakdown, length: np.ndarray) -> dict[str, Any]:
    """losses: loss_sequence and loss_token, of all samples and then of every group."""
    n, totals = len(breakdown.names), StepTotals.of(packs)
    samples, targets = breakdown.counts(packs).view(2, n).tolist()
    columns = (losses[2 : 2 + n], losses[2 + n :], samples, breakdown.sums(packs, length).tolist(), targets)
    groups = [entry(*column) for column in zip(*columns, strict=True)]
    named = lambda names, found: {name: one for name, one in zip(names, found, strict=True) if one["samples"]}
    n_sources = len(breakdown.sources)
    return {
        **entry(losses[0], losses[1], totals.sequences, sum(pack.tokens for pack in packs), totals.targets),
        "by_source": named(breakdown.sources, groups[:n_sources]),
        "by_length": named(BUCKETS, groups[n_sources:]),
    }


def entry(loss: float, loss_token: float, samples: int, tokens: int, targets: int) -> dict[str, float]:
    """loss: the mean over samples of their means over targets; loss_token: over targets; perplexity: exp of that."""
    counts = {"samples": samples, "tokens": tokens, "targets": targets}
    return {"loss": loss, "loss_token": loss_token, "perplexity": math.exp(loss_token), **counts}


def table(summary: dict[str, Any]) -> Table:
    """A row for all samples, each source and each range of lengths."""
    shown = Table(title=f"heldout: loss {summary['loss']:.4f}", title_justify="left", box=box.SIMPLE)
    for column in ("", "", "samples", "tokens", "targets", "loss", "loss_token", "perplexity"):
        shown.add_column(column, justify="right" if column else "left")
    groups = [(key[3:], name, found) for key in ("by_source", "by_length") for name, found in summary[key].items()]
    for kind, name, found in [("all", "", summary), *groups]:
        counts = [f"{found[key]:,}" for key in ("samples", "tokens", "targets")]
        losses = [f"{found[key]:.4f}" for key in ("loss", "loss_token")]
        shown.add_row(kind, name, *counts, *losses, f"{found['perplexity']:.4g}")
    return shown
