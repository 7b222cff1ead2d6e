"""Which samples share a pack, and which packs share an optimizer step.

    tokenised data -> packs of each epoch (packing.py) -> steps -> plan.parquet

A plan knows nothing of GPUs: the packs of a step are dealt to however many ranks there are when it is trained on, and
the loss does not depend on how (see model/loss.py). Every sample with a target stands in one pack of every epoch, or
as often as the mix says (mix.py).
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_from_disk

from longalign.data.mix import check_names, epoch_samples, loss_weights
from longalign.data.packing import Packs, balance, epoch_packs, pack_tokens, packs_per_step
from longalign.errors import UserError
from longalign.files import fresh_folder, read_json, write_json
from longalign.model.cost import Cost, cost_of
from longalign.schema import Config

SCHEMA = pa.schema(
    [
        ("epoch", pa.int32()),
        ("step", pa.int32()),
        ("pack", pa.int64()),
        ("sample_ids", pa.list_(pa.int64())),
        ("tokens", pa.int64()),
        ("n_sequences", pa.int32()),
        ("n_target", pa.int64()),
        ("cost", pa.float64()),
    ]
)
ROWS_PER_GROUP = 16384
RANKS = (2, 8, 64)  # whose balance a manifest tells
OURS = ("plan.parquet", "manifest.json")
LAYOUT = 2  # of manifest.json; 1 had no loss_weight


# -- the command ------------------------------------------------------------------------------------------


def read_data(data_dir: str) -> tuple[Dataset, dict[str, Any]]:
    """Tokenised data and its manifest. Raises UserError if there is none."""
    folder = Path(data_dir)
    if not (folder / "manifest.json").is_file():
        raise UserError(f"data_dir={data_dir} holds no tokenised data; run `longalign tokenize` first")
    try:
        return load_from_disk(str(folder)), read_json(folder / "manifest.json")  # type: ignore[return-value]
    except Exception as error:
        raise UserError(f"data_dir={data_dir} is damaged ({error}); run `longalign tokenize` again") from None


class Columns(NamedTuple):
    """What a plan needs to know of n samples, without their tokens."""

    length: np.ndarray  # int32 [n]
    n_target: np.ndarray  # int32 [n]
    sample_id: np.ndarray  # int64 [n]
    source: np.ndarray  # int32 [n], places in `sources`
    sources: list[str]  # in alphabetical order

    def where(self, chosen: np.ndarray) -> Columns:
        """The samples that a bool or integer array chooses."""
        length, n_target, sample_id, source = (values[chosen] for values in self[:4])
        return Columns(length, n_target, sample_id, source, self.sources)


def read_columns(dataset: Dataset) -> Columns:
    """The columns of tokenised data that stay small: 20 bytes a sample."""
    table = dataset.select_columns(["length", "n_target", "sample_id", "source"]).with_format("arrow")[:]
    source = table["source"].combine_chunks().dictionary_encode()
    names = source.dictionary.to_pylist()
    place = np.argsort(np.argsort(names)).astype(np.int32)
    length, n_target, sample_id = (table[name].to_numpy() for name in ("length", "n_target", "sample_id"))
    return Columns(length, n_target, sample_id, place[source.indices.to_numpy()], sorted(names))


def lengths_of(dataset: Dataset) -> np.ndarray:
    """Tokens by sample id, int64."""
    columns = read_columns(dataset)
    lengths = np.zeros(int(columns.sample_id.max()) + 1, dtype=np.int64)
    lengths[columns.sample_id] = columns.length
    return lengths


def identity(config: Config, data: dict[str, Any]) -> dict[str, Any]:
    """What a plan depends on: a plan with another identity is stale."""
    return {
        "data": data["fingerprint"],
        "strategy": config.strategy.model_dump(),
        "max_length": config.max_length,
        "seed": config.seed,
        "shuffle": config.shuffle,
        "epochs": config.epochs,
        "mix": {source: mix.model_dump() for source, mix in config.mix.items()},
    }


def group(config: Config, output: Path) -> dict[str, Any]:
    """Write plan.parquet and manifest.json into `output`; returns the manifest. Raises UserError."""
    dataset, data = read_data(config.data_dir)
    everything = read_columns(dataset)
    check_names(config.mix, everything.sources)
    samples = everything.where(everything.n_target > 0)
    keeps_order = config.strategy.name == "naive" or (
        config.strategy.name not in ("sorted", "balanced") and config.strategy.packer == "next_fit"
    )
    if not config.shuffle and not keeps_order:
        raise UserError("shuffle=false keeps the order of samples: use strategy=naive or strategy.packer=next_fit")
    if not len(samples.length):
        raise UserError(f"data_dir={config.data_dir} has no sample with a target")
    if samples.length.max() > config.max_length:
        raise UserError(
            f"data_dir={config.data_dir} has a sample of {samples.length.max()} tokens, "
            f"max_length={config.max_length}; raise max_length or tokenize again with it"
        )
    strategy = config.strategy
    if samples.length.max() > pack_tokens(strategy, config.max_length):
        raise UserError(
            f"strategy.pack_tokens={strategy.pack_tokens} is less than the longest sample, "
            f"{samples.length.max()} tokens; raise it, or null for max_length={config.max_length}"
        )
    if strategy.name == "balanced" and strategy.packs_per_step % strategy.strata:
        raise UserError(
            f"strategy.strata={strategy.strata} does not divide strategy.packs_per_step={strategy.packs_per_step}"
        )
    cost = cost_of(data["model_shape"]) if data["model_shape"] else Cost(1.0, 0.0)
    if strategy.cost:
        cost = Cost(*strategy.cost)
    epochs: list[dict[str, Any]] = []
    first_step, first_pack = 1, 0
    with fresh_folder(output, OURS, overwrite=True) as folder:
        with pq.ParquetWriter(folder / "plan.parquet", SCHEMA) as writer:
            for epoch in range(config.epochs):
                chosen = epoch_samples(samples.source, samples.sources, config.mix, config.seed, epoch)
                if not len(chosen):
                    raise UserError(f"mix leaves no sample for epoch {epoch}; raise a weight")
                mine = samples.where(chosen)
                packs = epoch_packs(mine.length, strategy, config.max_length, config.seed, epoch, config.shuffle, cost)
                table = _table(packs, mine, cost, epoch, first_step, first_pack, packs_per_step(strategy))
                writer.write_table(table, row_group_size=ROWS_PER_GROUP)
                attention = np.add.reduceat(np.square(mine.length[packs.samples], dtype=np.float64), packs.offsets[:-1])
                per_step, n_sources = packs_per_step(strategy), len(mine.sources)
                weights = loss_weights(packs, mine.n_target, mine.source, n_sources, strategy.average, per_step)
                epochs.append({**_statistics(table, attention, config), "sources": _by_source(mine, weights)})
                first_step += epochs[-1]["steps"]
                first_pack += len(table)
        manifest = {
            "layout": LAYOUT,
            "identity": identity(config, data),
            "steps": first_step - 1,
            "packs": first_pack,
            "samples_without_target": len(everything.length) - len(samples.length),
            "epochs": epochs,
        }
        write_json(folder / "manifest.json", manifest)
    return manifest


def _table(
    packs: Packs, samples: Columns, cost: Cost, epoch: int, first_step: int, first_pack: int, per_step: int
) -> pa.Table:
    """One epoch's rows of plan.parquet; packs hold places in `samples`."""
    starts, n = packs.offsets[:-1], len(packs.offsets) - 1
    total = lambda values: np.add.reduceat(values[packs.samples], starts)
    sample_ids = pa.array(samples.sample_id[packs.samples].astype(np.int64))
    return pa.table(
        [
            np.full(n, epoch, np.int32),
            (first_step + np.arange(n) // per_step).astype(np.int32),
            first_pack + np.arange(n),
            pa.ListArray.from_arrays(packs.offsets.astype(np.int32), sample_ids),
            total(samples.length.astype(np.int64)),
            np.diff(packs.offsets).astype(np.int32),
            total(samples.n_target.astype(np.int64)),
            total(cost(samples.length)),
        ],
        schema=SCHEMA,
    )


def _by_source(samples: Columns, weights: np.ndarray) -> dict[str, dict[str, float]]:
    """What an epoch holds of each source, and its weight in the loss."""
    count = lambda weights=None: np.bincount(samples.source, weights, len(samples.sources)).astype(int).tolist()
    columns = (count(), count(samples.length), count(samples.n_target), weights.round(6).tolist())
    keys = ("samples", "tokens", "targets", "loss_weight")
    rows = zip(samples.sources, *columns, strict=True)
    return {source: dict(zip(keys, row, strict=True)) for source, *row in rows}


def _statistics(table: pa.Table, attention: np.ndarray, config: Config) -> dict[str, Any]:
    """Figures of an epoch. attention: what it costs in each pack.

    balance: for so many ranks, the mean over ranks over the slowest, at every micro-step (packing.balance).
    """
    tokens, cost, step = (table[c].to_numpy() for c in ("tokens", "cost", "step"))
    per_step = packs_per_step(config.strategy)
    return {
        "steps": int(step[-1] - step[0] + 1),
        "packs": len(table),
        "tokens": int(tokens.sum()),
        "fill_ratio": round(float(tokens.sum() / (len(table) * pack_tokens(config.strategy, config.max_length))), 4),
        "sequences_per_pack": round(float(table["n_sequences"].to_numpy().mean()), 2),
        "tokens_per_step": round(float(tokens.sum() / (step[-1] - step[0] + 1))),
        "cost_max_over_mean": round(float(cost.max() / cost.mean()), 2),
        "balance": {str(ranks): round(balance(cost, per_step, ranks), 4) for ranks in RANKS},
        "attention_balance": {str(ranks): round(balance(cost, per_step, ranks, attention), 4) for ranks in RANKS},
    }


def steps_to_train(planned: int, config: Config) -> int:
    """The steps of a plan, or max_steps if that ends the run earlier."""
    return min(planned, config.max_steps or planned)


def is_fresh(folder: Path, wanted: dict[str, Any]) -> bool:
    try:
        manifest = read_json(folder / "manifest.json")
        return manifest["identity"] == wanted and manifest["layout"] == LAYOUT
    except (OSError, ValueError, KeyError):
        return False


def prepare_plan(config: Config, run: Path) -> tuple[dict[str, Any], str]:
    """Put the plan of a run into RUN/plan: the grouped one if it is fresh, else a new one. Returns (manifest, how).

    A run keeps its own copy, so that another run that groups the same data differently cannot change it.
    """
    shared, mine = Path(config.data_dir) / "plans" / config.strategy.name, run / "plan"
    wanted = identity(config, read_data(config.data_dir)[1])
    if is_fresh(mine, wanted):
        return read_json(mine / "manifest.json"), "the run's own"
    if is_fresh(shared, wanted):
        _copy(shared, mine)
        return read_json(mine / "manifest.json"), str(shared)
    how = "stale, grouped again" if (shared / "manifest.json").exists() else "missing, grouped now"
    manifest = group(config, mine)
    with contextlib.suppress(OSError, UserError):  # a convenience: data_dir may be read-only, or a sweep writes it too
        _copy(mine, shared)
    return manifest, f"{shared} ({how})"


def _copy(plan: Path, to: Path) -> None:
    with fresh_folder(to, OURS, overwrite=True) as folder:
        shutil.copytree(plan, folder, dirs_exist_ok=True)


# -- reading ----------------------------------------------------------------------------------------------


class Pack(NamedTuple):
    sample_ids: list[int]
    tokens: int
    n_sequences: int
    n_target: int
    cost: float


class Plan:
    """plan.parquet, read a row group at a time.

    Raises UserError if the plan was made for other data than `data`, the tokenised data's manifest.
    """

    def __init__(self, folder: Path, data: dict[str, Any]):
        self.manifest = read_json(folder / "manifest.json")
        if self.manifest["identity"]["data"] != data["fingerprint"]:
            raise UserError(f"the plan in {folder} was made for other data; run `longalign group` again")
        self.file = pq.ParquetFile(folder / "plan.parquet")
        head = self.file.read(columns=["step", "epoch"])
        steps = head["step"].to_numpy()
        self.n_steps: int = self.manifest["steps"]
        self.first_row = np.searchsorted(steps, np.arange(1, self.n_steps + 2))
        self.epochs = head["epoch"].to_numpy()[self.first_row[:-1]]
        sizes = [self.file.metadata.row_group(g).num_rows for g in range(self.file.num_row_groups)]
        self.group_starts = np.cumsum([0, *sizes])
        self.loaded: tuple[int, list[dict[str, Any]]] = (-1, [])

    def step(self, step: int) -> list[Pack]:
        """The packs of optimizer step `step`, from 1."""
        packs = []
        for row in range(self.first_row[step - 1], self.first_row[step]):
            number = int(np.searchsorted(self.group_starts, row, side="right")) - 1
            if self.loaded[0] != number:
                self.loaded = (number, self.file.read_row_group(number).to_pylist())
            found = self.loaded[1][row - int(self.group_starts[number])]
            packs.append(Pack(*(found[name] for name in Pack._fields)))
        return packs

    def epoch(self, step: int) -> int:
        return int(self.epochs[step - 1])
