"""Checks of tokenised data and its plan: nothing that needs the model's weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from longalign.data.messages import Messages
from longalign.data.mix import epoch_samples
from longalign.data.plan import read_columns
from longalign.data.template import IGNORE, Template
from longalign.files import read_json
from longalign.progress import Bar
from longalign.schema import Mix
from longalign.verify.check import Check, at_most

ROWS_PER_BATCH = 256
RETOKENIZE = "run `longalign tokenize` again"


def check_rows(dataset: Dataset, data: dict[str, Any], stop_ids: list[int], vocab_size: int) -> list[Check]:
    """One pass over every row: columns that agree, ids the model has, answers that end, targets in every source."""
    broken = unknown = 0
    tokens, targets, answers, endless = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    with Bar("verify data", len(dataset), "rows") as bar:
        for table in dataset.with_format("arrow").iter(ROWS_PER_BATCH):
            ids, labels = (_flat(table, name) for name in ("input_ids", "labels"))
            length, n_target = (table[name].to_numpy() for name in ("length", "n_target"))
            row = np.repeat(np.arange(len(table)), ids[1])
            is_target = labels[0] != IGNORE if np.array_equal(ids[1], labels[1]) else np.zeros(0, bool)
            if not len(is_target) or not np.array_equal(ids[1], length):
                broken += len(table)
                continue
            first = np.cumsum(ids[1]) - ids[1]
            counted = np.bincount(row[is_target], minlength=len(table))
            broken += int(np.sum((counted != n_target) | is_target[first]))
            both = np.concatenate([ids[0], labels[0][is_target]])
            unknown += int(np.sum((both < 0) | (both >= vocab_size)))
            # an answer is a run of targets; the last of a row that was cut may lack its stop token
            run_ends = is_target & ~np.append((is_target & (np.arange(len(row)) != first[row]))[1:], False)
            cut = np.zeros(len(row), bool)
            cut[(first + ids[1] - 1)[length >= data["max_length"]]] = True
            lacks = run_ends & ~np.isin(labels[0], stop_ids) & ~cut
            for counter, values in ((tokens, length), (targets, counted)):
                _add(counter, table["source"], values)
            for counter, places in ((answers, run_ends), (endless, lacks)):
                _add(counter, table["source"], np.bincount(row[places], minlength=len(table)))
            bar.advance(len(table))
    share = {source: targets[source] / tokens[source] for source in tokens}
    ends = {source: endless[source] / answers[source] for source in answers if answers[source]}
    worst = max(ends, key=lambda source: ends[source], default="")
    return [
        at_most("rows: columns agree", broken, 0, f"{len(dataset):,} rows", RETOKENIZE),
        at_most(
            "ids: all in the model's vocabulary",
            unknown,
            0,
            f"vocabulary of {vocab_size:,}",
            "the tokenizer is not this model's: set model.tokenizer, tokenize again",
        ),
        at_most(
            "stop token: answers without it, worst source",
            ends.get(worst, 1.0),
            0,
            f"{sum(answers.values()):,} answers; {worst}: {endless[worst]:,} of {answers[worst]:,}",
            f"a model trained on {worst} would not learn to stop: {RETOKENIZE} with the template it is to answer in",
        ),
        Check(
            "targets: share of tokens by source",
            min(share.values(), default=0.0) > 0,
            min(share.values(), default=0.0),
            None,
            ", ".join(f"{source} {value:.1%}" for source, value in share.items()),
            "a source without targets teaches nothing: look at its samples and at truncate=",
        ),
    ]


def _flat(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(all values of a list column, the length of each row)."""
    column = table[name].combine_chunks()
    return column.flatten().to_numpy(), column.value_lengths().to_numpy()


def _add(counter: Counter[str], sources: pa.ChunkedArray, values: np.ndarray) -> None:
    for source, value in zip(sources.to_pylist(), values.tolist(), strict=True):
        counter[source] += value


def check_plan(folder: Path, dataset: Dataset, epochs: int, max_length: int) -> list[Check]:
    """Every sample with a target stands in each epoch once, or as often as the mix says; no pack is too long."""
    columns = read_columns(dataset)
    plan, made_for = pq.read_table(folder / "plan.parquet"), read_json(folder / "manifest.json")["identity"]
    mix = {source: Mix(**entry) for source, entry in made_for["mix"].items()}
    usable = np.flatnonzero(columns.n_target > 0)
    astray = 0
    for epoch in range(epochs):
        packs = plan.filter(pa.compute.equal(plan["epoch"], epoch))["sample_ids"].combine_chunks()
        chosen = usable[epoch_samples(columns.source[usable], columns.sources, mix, made_for["seed"], epoch)]
        planned, wanted = (np.bincount(ids, minlength=len(dataset)) for ids in (packs.flatten().to_numpy(), chosen))
        astray += int(np.abs(planned - wanted).sum())
    lists = plan["sample_ids"].combine_chunks()
    pack = np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy())
    sums = lambda values: np.bincount(pack, values[lists.flatten().to_numpy()], minlength=len(lists))
    tokens, targets = sums(columns.length), sums(columns.n_target)
    wrong = (tokens != plan["tokens"].to_numpy()) | (targets != plan["n_target"].to_numpy())
    too_long = tokens > max_length
    return [
        at_most(
            "plan: samples missing or repeated",
            astray,
            0,
            f"{len(usable):,} samples, {epochs} epochs, {len(plan):,} packs, mix: {', '.join(mix) or 'none'}",
            "delete the plans of data_dir and run `longalign group` again",
        ),
        at_most(
            "plan: packs with wrong counts or over max_length",
            int(np.sum(wrong | too_long)),
            0,
            f"max_length {max_length:,}",
            "delete the plans of data_dir and run `longalign group` again",
        ),
    ]


def check_asking(template: Template, asking: Template) -> Check:
    """Prompts are the ids that training saw: `template` made the data, `asking` is the exported model's."""
    messages: Messages = [
        {"role": role, "content": content}
        for role, content in zip(
            ["user", "assistant"] * 3,
            ["What is </s>?", "A token.\n\n", " 你好 ", "Yes.", "And <|im_end|>?", "So is that."],
            strict=True,
        )
    ]
    rows, differ = template.rows(messages), 0
    for turn, place in enumerate((1, 3, 5)):
        row = rows[turn if len(rows) > 1 else 0]
        prompt = asking.prompt_ids(messages[:place])
        differ += row.input_ids[: len(prompt)] != prompt
    return at_most(
        "asking: prompts that differ from training",
        differ,
        0,
        f"{template.name}, a conversation of three rounds",
        "the exported tokenizer or template is not the one of training: this is a defect, please report it",
    )
