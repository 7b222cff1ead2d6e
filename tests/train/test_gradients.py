"""For one plan, a step's losses and every parameter's gradient are the same on every layout: those of the paper.

The truth is plain transformers in float64, every sample alone (plain.py). What is held against it comes from the
worker's own train_step (gradients.py), in one launch per number of processes. By default the layouts are a subset with
every pair of values of two factors; `pytest -m grid` runs them all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from longalign.data.plan import Plan, read_data
from longalign.launch import prepare_run
from longalign.schema import Config
from tests.conftest import launch_all
from tests.train.gradients import FILE, SCALARS, checked_steps
from tests.train.plain import MAX_LENGTH, SHAPES, odd_data, plain, rounded_model

WORKER = [str(Path(__file__).with_name("gradients.py"))]
TOLERANCE = 1e-5  # float32 against float64
STRATEGIES = {
    "naive": ["strategy=naive", "strategy.batch_size=5"],
    "sorted": ["strategy=sorted", "strategy.batch_size=6", "strategy.group_size=3"],
    "packing": ["strategy=packing", "strategy.packs_per_step=5"],
    "packing+weighting": ["strategy=packing+weighting", "strategy.packs_per_step=5"],
    "balanced": ["strategy=balanced", "strategy.packs_per_step=4", "strategy.strata=2"],
    "token": ["strategy=packing+weighting", "strategy.packs_per_step=5", "strategy.average=token"],
}
PROCESSES = (1, 2, 4)
TOGETHER = (1, 2, 4)  # values of cluster.sequence_parallel; four ranks outnumber the model's two key-value heads
# Of so small a model ZeRO-3 would fetch all weights at once. With a window of a layer it fetches and frees them in turn.
FETCHING = (
    "{stage3_param_persistence_threshold: 0, stage3_prefetch_bucket_size: 2000, "
    "stage3_max_live_parameters: 20000, stage3_max_reuse_distance: 20000}"
)
CPU_BACKENDS = ("sdpa",)  # values of model.attention that run on a CPU


class Layout(NamedTuple):
    processes: int
    sequence_parallel: int
    packs_per_micro_step: int
    zero_stage: int
    strategy: str
    backend: str
    dtype: str = "float32"

    def __str__(self) -> str:
        processes, together, packs, stage, *names = self
        return "-".join([f"{processes}x{packs}", f"by{together}", f"zero{stage}", *names])

    def words(self) -> list[str]:
        return [
            *STRATEGIES[self.strategy],
            f"cluster.processes={self.processes}",
            f"cluster.sequence_parallel={self.sequence_parallel}",
            f"cluster.packs_per_micro_step={self.packs_per_micro_step}",
            f"cluster.zero_stage={self.zero_stage}",
            f"model.attention={self.backend}",
            f"model.dtype={self.dtype}",
            *(["activations=budget"] if self.zero_stage else []),  # as on GPUs, see gradients.keep_as_on_gpus
            *([f"cluster.deepspeed={{zero_optimization: {FETCHING}}}"] if self.zero_stage == 3 else []),
        ]


FACTORS = (PROCESSES, TOGETHER, (1, 2, 4), (0, 1, 2, 3), STRATEGIES, CPU_BACKENDS)
GRID = [Layout(*values) for values in itertools.product(*FACTORS) if values[1] <= values[0]]


def pairs(layout: Layout) -> set[Any]:
    """Every two (factor, value) of a layout."""
    return set(itertools.combinations(enumerate(layout), 2))


def covering(grid: Sequence[Layout]) -> list[Layout]:
    """A subset with every pair of values that the grid has: always the layout that adds most, the first of equals."""
    missing, chosen = set().union(*map(pairs, grid)), []
    while missing:
        chosen.append(max(grid, key=lambda layout: len(pairs(layout) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


@pytest.fixture(scope="module")
def config_of(tmp_path_factory: pytest.TempPathFactory, run_config: Callable[..., Config]) -> Callable[..., Config]:
    """config_of(folder, layout) -> the Config of a run of the odd data on that layout."""
    root = tmp_path_factory.mktemp("odd")
    common = [f"data_dir={odd_data(root / 'data')}", f"model.path={rounded_model(root / 'model')}"]
    common += [f"max_length={MAX_LENGTH}", "epochs=1", "grad_clip=0.5"]
    return lambda folder, layout: run_config(folder / str(layout), *common, *layout.words())


def reference(config: Config, dtype: torch.dtype, attention: str) -> dict[str, torch.Tensor]:
    steps = tuple(tuple(tuple(pack.sample_ids) for pack in packs) for packs in checked_steps(config))
    return plain(config.model.path, config.data_dir, steps, config.strategy.average, dtype, attention)


def differences(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of each tensor the norm of the difference over the norm."""
    assert found.keys() == truth.keys()
    return {key: float((found[key].double() - truth[key]).norm() / truth[key].norm()) for key in truth}


def of_all_steps(errors: dict[str, float]) -> dict[str, float]:
    """The same with the errors of a number's steps as their root mean square: one of them may be nil by luck."""
    squares = {name: [errors[key] ** 2 for key in errors if key.partition("/")[2] == name] for name in SCALARS}
    tensors = {key: error for key, error in errors.items() if key.partition("/")[2] not in SCALARS}
    return tensors | {name: (sum(values) / len(values)) ** 0.5 for name, values in squares.items()}


def check(
    layouts: Sequence[Any],
    config_of: Callable[..., Config],
    folder: Path,
    worker: Sequence[str] = WORKER,
    more: Sequence[Config] = (),
) -> None:
    """Run the layouts, which have one number of processes, and hold everything that they yield against the truth.

    more: what the same launch runs beside.

    float32: every relative error is at most 1e-5. bfloat16: at most twice that of plain transformers in bfloat16, one
    sample at a time, on torch's own attention (transformers' eager one rounds more and would allow more).
    """
    configs = [config_of(folder, layout) for layout in layouts]
    assert launch_all([*configs, *more], folder, worker=worker) == 0
    rows: list[tuple[float, float, str]] = []  # relative error, allowed, of what
    for layout, config in zip(layouts, configs, strict=True):
        truth = reference(config, torch.float64, "eager")
        assert truth["0/grad_norm"] > (config.grad_clip or 0), "clipping must take part"
        errors = differences(load_file(Path(config.output_dir or "") / FILE), truth)
        allowed = dict.fromkeys(errors, TOLERANCE)
        if layout.dtype == "bfloat16":
            errors = of_all_steps(errors)
            unpacked = of_all_steps(differences(reference(config, torch.bfloat16, "sdpa"), truth))
            allowed = {key: 2 * error for key, error in unpacked.items()}
        rows += [(errors[key], allowed[key], f"{layout} {key}") for key in errors]
    show(rows)
    assert not [row for row in rows if not row[0] <= row[1]]  # a NaN is wrong too


def show(rows: list[tuple[float, float, str]]) -> None:
    """Print how many comparisons there were, and which came closest to what is allowed."""
    for dtype, scalar in itertools.product(("float32", "bfloat16"), (True, False)):
        mine = [row for row in rows if dtype in row[2] and row[2].endswith(SCALARS) == scalar]
        if not mine:
            continue
        error, allowed, name = max(mine, key=lambda row: row[0] / row[1])
        kind = "losses and norms" if scalar else "gradients"
        print(f"{len(mine):6} {kind:16} {error:.1e} <= {allowed:.1e} at most, in {name}")


def with_bfloat16(layouts: Sequence[Layout], processes: int) -> list[Layout]:
    """The layouts of so many processes; those that pack are run in bfloat16 too (DeepSpeed cannot without ZeRO)."""
    mine = [layout for layout in layouts if layout.processes == processes]
    packed = [layout for layout in mine if layout.strategy.startswith("packing") and layout.zero_stage]
    return mine + [layout._replace(dtype="bfloat16") for layout in packed]


# -- tests --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("processes", PROCESSES)
def test_some_layouts(processes: int, config_of: Callable[..., Config], tmp_path: Path) -> None:
    check(with_bfloat16(covering(GRID), processes), config_of, tmp_path)


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("processes", PROCESSES)
def test_all_layouts(processes: int, config_of: Callable[..., Config], tmp_path: Path) -> None:
    check(with_bfloat16(GRID, processes), config_of, tmp_path)


@pytest.mark.slow
@pytest.mark.grid
def test_states_on_the_host(config_of: Callable[..., Config], tmp_path: Path) -> None:
    """DeepSpeed compiles its Adam for the CPU, which takes minutes the first time."""

    def on_host(folder: Path, layout: Layout) -> Config:
        config = config_of(folder, layout)
        cluster = config.cluster.model_copy(update={"offload_optimizer": True})
        return config.model_copy(update={"cluster": cluster})

    dtypes = ("float32", "bfloat16")
    layouts = [Layout(2, 1, 1, stage, "packing", "sdpa", dtype) for stage in (1, 2, 3) for dtype in dtypes]
    check(layouts, on_host, tmp_path)


def test_the_subset_has_every_pair() -> None:
    values = range(len(FACTORS))
    wanted = {((i, a), (j, b)) for i, j in itertools.combinations(values, 2) for a in FACTORS[i] for b in FACTORS[j]}
    wanted -= {((0, p), (1, n)) for p in PROCESSES for n in TOGETHER if n > p}
    got = {((i, some[i]), (j, some[j])) for some in covering(GRID) for i, j in itertools.combinations(values, 2)}
    assert got == wanted
    assert len(covering(GRID)) < len(GRID) / 4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_plans_hold_the_odd_shapes(strategy: str, config_of: Callable[..., Config], tmp_path: Path) -> None:
    config, _ = prepare_run(config_of(tmp_path, Layout(1, 1, 1, 1, strategy, "sdpa")), dry_run=False)
    plan = Plan(Path(config.output_dir or "") / "plan", read_data(config.data_dir)[1])
    steps = [plan.step(step) for step in range(1, plan.n_steps + 1)]
    planned = sorted(sample for packs in steps for pack in packs for sample in pack.sample_ids)
    assert planned == [sample for sample, (_, n_target) in enumerate(SHAPES) if n_target]  # not the one-token sample
    assert [SHAPES.index((MAX_LENGTH, 7))] in [pack.sample_ids for packs in steps for pack in packs]
    for ranks in (2, 4):
        assert any(len(packs) % ranks for packs in checked_steps(config)), "no rank without a pack"
