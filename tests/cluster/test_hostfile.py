from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from longalign.cluster.hostfile import read_hostfile
from longalign.errors import UserError
from longalign.launch import resolve
from longalign.schema import Config

GOOD = "# the cluster\nnode1 slots=8\n\nme@10.0.0.2  slots = 8  # the second\nnode-3.lan slots=8\n"


def test_deepspeeds_format(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text(GOOD)
    assert read_hostfile(str(tmp_path / "hostfile")) == {"node1": 8, "me@10.0.0.2": 8, "node-3.lan": 8}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node1 slots=8\nnode2 slot=8\n", r"hostfile, line 2: 'node2 slot=8' is no `HOST slots=N`"),
        ("node1\n", "line 1: 'node1' is no"),
        ("node1 slots=0\n", "line 1: 'node1 slots=0' is no"),
        ("-oProxyCommand=x slots=1\n", "line 1"),
        ("node1 slots=8\n\n# twice\nnode1 slots=8\n", "line 4: node1 stands there twice"),
        ("node1 slots=8\nnode2 slots=4\n", "line 2: slots=4, and 8 above"),
        ("# nobody\n", "names no host"),
        (None, "hostfile does not exist"),
    ],
)
def test_wrong_lines_are_named(text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "hostfile").write_text(text)
    with pytest.raises(UserError, match=said):
        read_hostfile(str(tmp_path / "hostfile"))


def test_layout(tmp_path: Path, run_config: Callable[..., Config]) -> None:
    (tmp_path / "hostfile").write_text(GOOD)
    words = ["cluster=multinode", f"cluster.hostfile={tmp_path}/hostfile"]
    layout = lambda *more: resolve(run_config(tmp_path / "run", *words, *more)).cluster
    assert (layout().nodes, layout().processes, layout().ranks, layout().device) == (3, 8, 24, "cuda")
    assert layout("cluster.nodes=2", "cluster.processes=4").ranks == 8
    for wrong, said in (
        ("cluster.nodes=4", "names 3 host"),
        ("cluster.processes=9", "has slots=8"),
        ("cluster=1gpu cluster.nodes=2", "cluster.nodes=2 needs cluster=multinode"),
        ("cluster=slurm cluster.nodes=auto", "give the number"),
    ):
        with pytest.raises(UserError, match=said):
            layout(*wrong.split())
