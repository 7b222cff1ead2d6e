"""Whether a pack fits, what each activation policy would cost there, and what to change where it does not fit."""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple, get_args

import numpy as np
import psutil
from rich import box
from rich.table import Table

from longalign.data.packing import deal
from longalign.data.plan import Plan, lengths_of, read_data
from longalign.forecast import gpus
from longalign.forecast.predict import Pass, estimate
from longalign.model.activations import MARGIN, Policy, resolve_policy
from longalign.model.cost import shape_of
from longalign.model.load import load_config
from longalign.model.offload import SHARE, free_host_memory
from longalign.preflight import count_parameters, memory_needs, settle_offload
from longalign.schema import Config

GIB = 2**30
Change = dict[str, Any]  # keys of the config and their new values


class Site(NamedTuple):
    """A run on GPUs: its settings, its model, and the GPU and host that it is predicted for."""

    config: Config  # device and processes settled
    shape: dict[str, int]
    parameters: int
    gpu: gpus.Gpu
    host: float  # bytes of a host's memory, for optimizer states and activations

    @staticmethod
    def of(config: Config, parameters: int, gpu: gpus.Gpu) -> Site:
        """With plan.host_gib of host memory, or as much as this machine has."""
        host = config.plan.host_gib * GIB if config.plan.host_gib else float(psutil.virtual_memory().total)
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"device": "cuda"})})
        config = settle_offload(config, gpu.memory)
        return Site(config, shape_of(load_config(config)), parameters, gpu, host)

    @property
    def policy(self) -> Policy:
        return resolve_policy(self.config, "cuda")

    @property
    def fixed(self) -> float:
        """Bytes of weights, gradients and states on a GPU."""
        return memory_needs(self.config, self.parameters)[0]

    @property
    def here(self) -> int:
        """Ranks of a host."""
        return min(int(self.config.cluster.processes), 8)

    @property
    def states(self) -> float:
        """Bytes that stand in a host's memory."""
        cluster = self.config.cluster
        return memory_needs(self.config, self.parameters)[1] / int(cluster.processes) * self.here

    @property
    def room(self) -> float:
        """Bytes of the host's memory for the activations of one rank."""
        return max(0.0, SHARE * (self.host - self.states) / self.here)

    @property
    def usable(self) -> float:
        """Bytes of the GPU that a run may fill."""
        return self.gpu.memory * (1 - MARGIN)

    def estimate(self, documents: Any, policy: Policy | None = None) -> Pass:
        """Of a micro-step of these documents (lengths in tokens). policy: None is the config's."""
        cluster = self.config.cluster
        return estimate(
            documents,
            self.shape,
            self.gpu,
            policy or self.policy,
            self.fixed,
            self.room,
            cluster.sequence_parallel,
            slices=cluster.ranks == cluster.sequence_parallel,  # as worker.train_step
        )

    def predict(self, documents: Any) -> Pass | None:
        """The same; None if it does not fit."""
        found = self.estimate(documents)
        return found if self.fits(found) else None

    def fits(self, found: Pass) -> bool:
        return found.peak <= self.usable

    def changed(self, change: Change) -> Site:
        inner = {key.removeprefix("cluster."): value for key, value in change.items() if key.startswith("cluster.")}
        outer = {key: value for key, value in change.items() if not key.startswith("cluster.")}
        cluster = self.config.cluster.model_copy(update=inner)
        return self._replace(config=self.config.model_copy(update={"cluster": cluster, **outer}))


# -- what policies cost -----------------------------------------------------------------------------------


def policies(site: Site, documents: np.ndarray, factor: float = 1.0) -> list[dict[str, Any]]:
    """A row for every activation policy: memory, seconds (times factor) and tokens/s of a pack, and whether it fits."""
    rows = []
    for policy in get_args(Policy):
        found = site.estimate(documents, policy)
        rows.append(
            {
                "activations": policy,
                "chosen": policy == site.policy,
                "fits": site.fits(found),
                "peak_gib": found.peak / GIB,
                "host_gib": (found.host * site.here + site.states) / GIB,
                "seconds": found.seconds * factor,
                "tokens_per_s": float(documents.sum()) / (found.seconds * factor),
                "kept": found.kept,
            }
        )
    return rows


def policy_table(site: Site, documents: np.ndarray, rows: list[dict[str, Any]]) -> Table:
    what = f"worst pack, {documents.sum():,} tokens in {len(documents):,} documents, forward and backward"
    made = Table(title=what, title_justify="left", box=box.SIMPLE)
    made.add_column("activations")
    for column in ("peak GiB", f"in {site.gpu.memory / GIB:.0f}", "host GiB", "seconds", "tokens/s"):
        made.add_column(column, justify="right")
    made.add_column("kept")
    for row in rows:
        name = row["activations"] + " (chosen)" * row["chosen"]
        numbers = f"{row['host_gib']:.0f}", f"{row['seconds']:,.2f}", f"{row['tokens_per_s']:,.0f}"
        fits = "fits" if row["fits"] else "does not fit"
        made.add_row(name, f"{row['peak_gib']:.1f}", fits, *numbers, row["kept"])
    return made


def told(config: Config, parameters: int, plan: Plan) -> str:
    """A run's activation policy and, with a known GPU, what it keeps and takes in the plan's costliest micro-step."""
    device = config.cluster.device
    gpu = gpus.planned(config.plan.gpu) if device == "cuda" or config.plan.gpu != "auto" else None
    if gpu is None:
        return resolve_policy(config, device)
    site, cluster = Site.of(config, parameters, gpu), config.cluster
    lengths = lengths_of(read_data(config.data_dir)[0])
    costliest = int(np.argmax(plan.file.read(columns=["cost"])["cost"].to_numpy()))
    packs = plan.step(int(np.searchsorted(plan.first_row, costliest, side="right")))
    groups = cluster.ranks // cluster.sequence_parallel
    joined = deal([pack.cost for pack in packs], groups, cluster.packs_per_micro_step)[0][0]
    documents = lengths[[sample for number in joined for sample in packs[number].sample_ids]]
    found = site.estimate(documents)
    takes = f"{found.peak / GIB:.1f} of the {gpu.name}'s {gpu.memory / GIB:.1f} GiB"
    host = f" and {found.host * site.here / GIB:.0f} GiB of its host" if found.host else ""
    end = f"{documents.sum() / found.seconds:,.0f} tokens/s" if site.fits(found) else "which does not fit"
    step = f"costliest micro-step ({documents.sum():,} tokens)"
    return f"{site.policy}; predicted for the {step}: {takes}{host}, {end}; kept: {found.kept}"


# -- what to change ---------------------------------------------------------------------------------------


def changes(site: Site) -> list[Change]:
    """Settings that take less of a GPU and are not in force: the nearest first, but last what the host cannot hold."""
    cluster = site.config.cluster
    states: list[Change] = [{}, {"cluster.zero_stage": 3}] if cluster.zero_stage < 3 else [{}]
    if not cluster.offload_optimizer:
        states += [{**change, "cluster.offload_optimizer": True} for change in states if change or cluster.zero_stage]
    lower = {"none": ["budget", "offload"], "offload": []}.get(site.policy, ["offload"])
    kept: list[Change] = [{}, *({"activations": policy} for policy in lower)]
    most, now = gcd(site.shape["heads"], int(cluster.processes)), cluster.sequence_parallel
    shared = [{}, *({"cluster.sequence_parallel": n} for n in range(now + 1, most + 1) if most % n == 0)]
    alone: list[Change] = [{}, {"cluster.packs_per_micro_step": 1}] if cluster.packs_per_micro_step > 1 else [{}]
    every = [{**a, **b, **c, **d} for d in shared for b in states for c in kept for a in alone]
    return sorted(every[1:], key=lambda one: (other := site.changed(one)).states > other.host)


def words(change: Change) -> str:
    return " ".join(f"{key}={str(value).lower()}" for key, value in change.items())


def with_change(site: Site, change: Change, documents: np.ndarray) -> Pass:
    if "cluster.packs_per_micro_step" in change:  # then the longest run of documents that one pack may have
        limit, ends = site.config.strategy.pack_tokens or site.config.max_length, np.cumsum(documents)
        pack = (ends - 1) // max(limit, 1)
        documents = max((documents[pack == number] for number in np.unique(pack)), key=lambda some: some.sum())
    return site.changed(change).estimate(documents)


def shorter(site: Site, documents: np.ndarray, share: float = 31 / 32) -> str:
    """A length that fits by prediction, at most `share` of these documents, as a setting; '' if none does."""
    config, length = site.config, int(share * documents.sum())
    while length := length - length % (1024 if length > 16384 else 64):
        if site.predict(np.array([length])):
            key = "strategy.pack_tokens" if config.strategy.pack_tokens and documents.max() <= length else "max_length"
            return f"{key}={length // config.cluster.packs_per_micro_step}"
        length = length * 31 // 32
    return ""


def does_not_fit(site: Site, documents: np.ndarray) -> str:
    """What to change so that a micro-step of these documents fits, the least first."""
    joined = site.config.cluster.packs_per_micro_step
    what = "a pack" if joined == 1 else f"a micro-step (cluster.packs_per_micro_step={joined})"
    head = f"{what} of {documents.sum():,} tokens does not fit one {site.gpu.name}"
    for change in changes(site):
        if site.fits(with_change(site, change, documents)):
            return f"{head}; it would with {words(change)}"
    cluster = site.config.cluster
    more = f"cluster.processes={cluster.processes} cluster.sequence_parallel={cluster.sequence_parallel}"
    less = shorter(site, documents)
    return f"{head}, whatever is offloaded; use more GPUs ({more}), or {less or 'a smaller model'}"


# -- after a GPU ran out of memory ------------------------------------------------------------------------


def advice(config: Config, documents: list[int] | None) -> str:
    """What to change after a GPU ran out of memory on a micro-step of these documents, or (None) before the first."""
    gpu, cluster = gpus.here(), config.cluster
    if gpu is None:
        ways = {
            "activations=offload": resolve_policy(config, cluster.device) != "offload",
            "cluster.zero_stage=3": cluster.zero_stage < 3,
            "cluster.offload_optimizer=true": not cluster.offload_optimizer,
        }
        return f"set {', '.join([way for way, is_new in ways.items() if is_new] + ['a smaller max_length'])}"
    site = Site.of(config, count_parameters(config), gpu)
    # In a micro-step the states stand in the host's memory already.
    site = site._replace(host=float(free_host_memory()) + (site.states if documents else 0.0))
    if documents is None:
        return _lighter(site)
    pack = np.array(documents)
    found = site.predict(pack)
    if found is None:
        return does_not_fit(site, pack)
    less = (one for one in changes(site) if with_change(site, one, pack).peak < 0.95 * found.peak)
    nearest, length = words(next(less, {})), shorter(site, pack, share=0.75) or "a smaller max_length"
    more = f"more GPUs{' with cluster.zero_stage=3' * (cluster.zero_stage < 3)} or cluster.sequence_parallel"
    return (
        f"{found.peak / GIB:.1f} of this {gpu.name}'s {gpu.memory / GIB:.1f} GiB were predicted, so prediction and "
        f"reality disagree (or others use this GPU too); {more}{f', or {length},' * bool(nearest)} would take less; "
        f"nearest setting: {nearest or length}"
    )


def _lighter(site: Site) -> str:
    """What to change so that weights, gradients and optimizer states take less."""
    have, need, cluster = site.gpu.memory, site.fixed, site.config.cluster
    head = (
        f"weights, gradients and optimizer states need {need / GIB:.1f} of this {site.gpu.name}'s {have / GIB:.1f} GiB"
    )
    if need <= site.usable:
        head += ", so prediction and reality disagree (or others use this GPU too)"
    least = {"cluster.zero_stage": 3, "cluster.offload_optimizer": True, "cluster.offload_param": True}
    is_new = lambda key: getattr(cluster, key.removeprefix("cluster.")) != least[key]
    for change in [*changes(site), {key: least[key] for key in least if is_new(key)}]:
        other = site.changed(change)
        if other.fixed < need and other.fixed <= site.usable:
            return f"{head}; {other.fixed / GIB:.1f} with {words(change)}"
    more = f"more GPUs than cluster.processes={cluster.processes}, with cluster.zero_stage=3"
    return f"{head}; use {more}, or a smaller model"
