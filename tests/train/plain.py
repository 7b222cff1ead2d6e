"""Data with every odd shape of a pack, and what plain transformers make of it: no model or loss code of the project."""

from __future__ import annotations

from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

from longalign.data.template import IGNORE
from longalign.files import write_json
from longalign.model.load import tokenizer_hash
from tests.conftest import TINY, make_model

MAX_LENGTH = 64
# (tokens, targets): one token, the shortest with a target, a whole pack, one target, nothing but targets, ...
SHAPES = [(1, 0), (2, 1), (64, 7), (40, 1), (37, 36), (64, 63), (33, 9), (50, 12), (23, 5), (9, 3), (5, 4)]
SHAPES += [(30, 8), (14, 2), (45, 20), (28, 11), (61, 6), (3, 1), (19, 10), (52, 2)]

Steps = tuple[tuple[tuple[int, ...], ...], ...]  # steps[s][k]: the samples of pack k of step s


def odd_data(folder: Path) -> Path:
    """Tokenised data of SHAPES. A label is any id: it need not be the input's."""
    rng, tokenizer = np.random.default_rng(0), AutoTokenizer.from_pretrained(TINY)
    draw = lambda n: rng.integers(len(tokenizer), size=n)
    labels = []
    for length, n_target in SHAPES:
        row = np.full(length, IGNORE)
        row[1 + rng.permutation(length - 1)[:n_target]] = draw(n_target)
        labels.append(row)
    columns = {
        "input_ids": [draw(length) for length, _ in SHAPES],
        "labels": labels,
        "length": [length for length, _ in SHAPES],
        "n_target": [n_target for _, n_target in SHAPES],
        "sample_id": range(len(SHAPES)),
        "source": ["odd"] * len(SHAPES),
    }
    Dataset.from_dict(columns).save_to_disk(str(folder))
    manifest = {"fingerprint": "odd", "tokenizer": str(TINY), "tokenizer_hash": tokenizer_hash(tokenizer)}
    write_json(folder / "manifest.json", {**manifest, "model_shape": None})
    return folder


def rounded_model(folder: Path, **changes: Any) -> Path:
    """The tests' model with weights that bfloat16 can hold, so that a float32 and a bfloat16 run train the same ones."""
    model = AutoModelForCausalLM.from_pretrained(make_model(folder, **changes), dtype=torch.bfloat16)
    model.float().save_pretrained(folder)
    return folder


def losses_alone(model: Any, row: dict[str, list[int]]) -> torch.Tensor:
    """The cross-entropy of each target of one sample, run alone: float64 [N]."""
    ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
    places = torch.nonzero(labels != IGNORE)[:, 0]
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[places - 1].double(), labels[places], reduction="none")


def averages(packs: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The paper's Eq. 2 and Eq. 3 and the mean over targets; packs[k][i] are the losses of sample i of pack k."""
    sequences = [losses for pack in packs for losses in pack if len(losses)]
    whole_packs = [torch.cat(pack) for pack in packs]
    return {
        "sequence": torch.stack([losses.mean() for losses in sequences]).mean(),
        "pack": torch.stack([losses.mean() for losses in whole_packs if len(losses)]).mean(),
        "token": torch.cat(sequences).mean(),
    }


@cache
def plain(
    path: str, data_dir: str, steps: Steps, average: str, dtype: torch.dtype, attention: str
) -> dict[str, torch.Tensor]:
    """What gradients.py should find (see there), from plain transformers in `dtype`, every sample run alone.

    Losses are averaged and gradients added up in float64. In a float64 model transformers still computes norms,
    softmax and rotary angles in float32.
    """
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention, dtype=dtype)
    dataset, parameters = load_from_disk(data_dir), dict(model.named_parameters())
    found: dict[str, torch.Tensor] = {}
    for number, packs in enumerate(steps):
        losses = [[losses_alone(model, dataset[sample]) for sample in pack] for pack in packs]
        # Differentiating the average gives each target's weight, then every sample is run backward on its own.
        leaves = [[sample.detach().requires_grad_() for sample in pack] for pack in losses]
        average_of = averages(leaves)
        average_of[average].backward()
        gradients = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in parameters.items()}
        for sample, leaf in zip(chain(*losses), chain(*leaves), strict=True):
            if len(sample):
                made = torch.autograd.grad(sample, list(parameters.values()), leaf.grad)
                for name, gradient in zip(parameters, made, strict=True):
                    gradients[name] += gradient
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        scalars = {f"loss_{name}": average_of[name].detach() for name in ("sequence", "token")}
        scalars |= {"loss": average_of[average].detach(), "grad_norm": norm}
        found |= {f"{number}/{name}": value for name, value in {**gradients, **scalars}.items()}
    return found
