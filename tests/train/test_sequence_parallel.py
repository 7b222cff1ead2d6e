"""Ranks that run a pack together: no document sees another, and whatever memory asks for changes no number.

Losses and gradients on every number of processes, ZeRO stage and loss average are in test_gradients.py; whole runs in
test_layouts.py. Two processes run everything here.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from longalign import commands
from longalign.config import compose_config
from longalign.data.batch import share
from longalign.errors import UserError
from longalign.launch import prepare_run, resolve
from longalign.schema import Config
from tests.model.test_attention import pack
from tests.train.plain import rounded_model
from tests.train.shared_packs import LENGTHS
from tests.train.test_gradients import STRATEGIES, check
from tests.train.test_gradients import config_of as config_of  # a fixture

PARTITIONED = "cluster.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"  # as large weights are
WORKER = [str(Path(__file__).with_name("shared_packs.py"))]
Make = Callable[..., Config]


class Layout(NamedTuple):
    """Of two processes."""

    zero_stage: int
    activations: str
    slice_tokens: int | None  # of a rank; packs have up to 64
    heads: tuple[int, int] = (4, 2)  # query and key-value heads; of 3 the ranks' shares overlap
    together: int = 2  # processes that run a pack; 1: each its own, of unlike lengths
    dtype: str = "float32"

    def __str__(self) -> str:
        return "-".join(str(value).replace(" ", "") for value in self)

    def words(self) -> list[str]:
        return [
            *STRATEGIES["packing"],
            PARTITIONED,
            "cluster.processes=2",
            f"cluster.sequence_parallel={self.together}",
            f"cluster.zero_stage={self.zero_stage}",
            f"activations={self.activations}",
            f"slice_tokens={self.slice_tokens or 'null'}",
        ]


LAYOUTS = [
    Layout(1, "selective", 12),
    Layout(3, "offload", 12),
    Layout(2, "none", None),
    Layout(0, "full", 40, heads=(6, 3)),
    Layout(3, "offload", None, together=1),
    Layout(3, "budget", 12, together=1),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, config_of: Make) -> Path:
    """All runs of this module, held against the truth where they are steps."""
    root = tmp_path_factory.mktemp("shared")
    models = {(6, 3): rounded_model(root / "6", num_attention_heads=6, num_key_value_heads=3, hidden_size=48)}

    def make(folder: Path, layout: Layout) -> Config:
        config = config_of(folder, layout)
        if path := models.get(layout.heads):
            config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(path)})})
        return config

    leak = config_of(root, LAYOUTS[0]).model_copy(update={"output_dir": str(root / "leak")})
    check(LAYOUTS, make, root, WORKER, more=[leak])
    return root


@pytest.mark.slow
def test_documents_do_not_see_each_other(folder: Path) -> None:
    """Another document a moves its own loss and, to the last bit, no other's; without a border it moves its neighbour's."""
    found = load_file(folder / "leak" / "leak.safetensors")
    moved = found["after"] != found["before"]
    own = torch.eye(len(LENGTHS), dtype=torch.bool) & (torch.tensor(LENGTHS) > 1)  # one token has no target to move
    assert torch.equal(moved, own)
    without, with_other = found["joined"]
    assert (without - with_other)[1].abs() > 1e-3
    assert torch.equal(without[2:], with_other[2:])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("lengths", [(1,), (2, 1, 5), (17, 30, 3), (64,)])
def test_ranks_hold_the_pack_between_them(lengths: tuple[int, ...], ranks: int) -> None:
    """In the ranks' order: the pack's tokens and positions, then padding; every target once, beside what predicts it."""
    ids, whole = pack(*lengths)
    weights = torch.rand(len(whole.target_ids), 3)
    pieces = [share(whole, weights, place, ranks) for place in range(ranks)]
    tokens = sum(lengths)
    assert {piece.input_ids.shape[1] for piece, _ in pieces} == {-(-tokens // ranks)}
    joined = torch.cat([piece.input_ids[0] for piece, _ in pieces])
    assert joined[:tokens].tolist() == [token for row in ids for token in row]
    positions = torch.cat([piece.position_ids[0] for piece, _ in pieces])
    padding = len(joined) - tokens
    assert positions.tolist() == [at for n in (*lengths, padding) for at in range(n)]
    for piece, _ in pieces:
        bounds = piece.cu_seqlens.tolist()
        assert [b - a for a, b in pairwise(bounds)] == [*lengths, *([padding] if padding else [])]
        assert bounds[-1] == len(joined)
        assert piece.max_seqlen == max(*lengths, padding)
        assert piece.n_target.tolist() == [n - 1 for n in lengths] + [0] * bool(padding)
    # every token but a document's first is a target (see pack), predicted by the token before it
    predicting = [int(row[at - 1]) for row in ids for at in range(1, len(row))]
    found = [(piece.input_ids[0][piece.target_rows], piece.target_ids) for piece, _ in pieces]
    assert torch.cat([tokens for tokens, _ in found]).tolist() == predicting
    assert torch.cat([targets for _, targets in found]).tolist() == [
        int(row[at]) for row in ids for at in range(1, len(row))
    ]
    assert torch.equal(torch.cat([mine for _, mine in pieces]), weights)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["cluster.processes=4", "cluster.sequence_parallel=3"], "must divide cluster.processes=4 .* 4 query heads; allowed: 1, 2, 4"),
        (["cluster.processes=8", "cluster.sequence_parallel=8"], "=8 must divide .* the model's 4 query heads; allowed: 1, 2, 4"),
        (["cluster.processes=1", "cluster.sequence_parallel=2"], "must divide cluster.processes=1 .*; allowed: 1$"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_out_is_said(words: list[str], told: str, run_config: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        resolve(run_config(tmp_path / "run", *words))


def test_a_dry_run_tells(run_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cluster.processes=4", "cluster.sequence_parallel=2", "strategy=packing", "strategy.packs_per_step=2"]
    _, lines = prepare_run(run_config(tmp_path / "run", *words), dry_run=True)
    assert dict(lines)["cluster"] == "4 x cpu, ZeRO-1, 2 ranks run a pack together (sequence parallelism)"
    assert "idle" not in capsys.readouterr().err, "two packs keep two groups busy"
    prepare_run(run_config(tmp_path / "run", *words, "strategy.packs_per_step=1"), dry_run=True)
    assert "1 packs per step on 2 groups of 2 ranks: 50% of the time is idle" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "chat", "bench"])
def test_commands_of_one_process_say_that_they_share_nothing(command: str, base_words: list[str]) -> None:
    config = compose_config(command, [*base_words, "cluster.sequence_parallel=2"])
    with pytest.raises(UserError, match=f"sequence_parallel=2: {command} runs in one process"):
        getattr(commands, command)(config, dry_run=True)
