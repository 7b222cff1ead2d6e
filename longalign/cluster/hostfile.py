"""The hosts of a run: a file in DeepSpeed's format, and what it says of cluster.nodes and cluster.processes."""

from __future__ import annotations

import re
from pathlib import Path

from longalign.errors import UserError
from longalign.schema import Cluster


def read_hostfile(path: str) -> dict[str, int]:
    """Host -> processes, of lines `HOST slots=N` as DeepSpeed takes them. Raises UserError naming the line."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"cluster.hostfile={path} does not exist; it has lines like `node1 slots=8`")
    slots: dict[str, int] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"([\w.][\w.@:-]*)\s+slots\s*=\s*([1-9]\d*)", text)
        if not found:
            raise UserError(f"{path}, line {number}: {text!r} is no `HOST slots=N`")
        host, count = found[1], int(found[2])
        if host in slots:
            raise UserError(f"{path}, line {number}: {host} stands there twice")
        if slots and count != (first := next(iter(slots.values()))):
            raise UserError(f"{path}, line {number}: slots={count}, and {first} above; every host needs as many")
        slots[host] = count
    if not slots:
        raise UserError(f"cluster.hostfile={path} names no host; it has lines like `node1 slots=8`")
    return slots


def hosts_of(cluster: Cluster) -> list[str]:
    """The hosts of the hostfile that take part: the first cluster.nodes."""
    return list(read_hostfile(cluster.hostfile))[: None if cluster.nodes == "auto" else cluster.nodes]


def count_nodes(cluster: Cluster) -> Cluster:
    """The cluster with `nodes`, and with a hostfile `processes`, as numbers. Raises UserError."""
    if cluster.launcher != "hostfile":
        if cluster.nodes == "auto":
            raise UserError("cluster.nodes=auto counts the hosts of a hostfile (cluster=multinode); give the number")
        return cluster
    slots = read_hostfile(cluster.hostfile)
    there = next(iter(slots.values()))
    nodes = len(slots) if cluster.nodes == "auto" else cluster.nodes
    processes = there if cluster.processes == "auto" else cluster.processes
    if nodes > len(slots):
        raise UserError(f"cluster.nodes={nodes} but {cluster.hostfile} names {len(slots)} host(s)")
    if processes > there:
        raise UserError(f"cluster.processes={processes} but {cluster.hostfile} has slots={there}")
    return cluster.model_copy(
        update={"nodes": nodes, "processes": processes, "hostfile": str(Path(cluster.hostfile).absolute())}
    )
