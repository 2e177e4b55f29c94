"""What a pool asks of a cluster, whether there is room for it, and how both are told. Knows no Ray, only what it tells.

A node is what `ray.nodes()` says of it: NodeID, NodeManagerHostname, Resources and Labels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from expertmesh.launch.worker_failed import WorkerFailed


class Wanted(NamedTuple):
    """What a pool asks of a cluster."""

    pool: str
    workers: int
    each: dict[str, float]  # resources of one worker
    where: dict[str, str]  # labels that a node must have
    strategy: str  # of Ray's placement groups
    spares: int = 0  # more of them

    def __str__(self) -> str:
        each = ", ".join(f"{amount:g} {kind}" for kind, amount in self.each.items())
        more = f" and {self.spares} spares" if self.spares else ""
        nodes = f" on nodes with {_listed(self.where)}" if self.where else ""
        together = {"STRICT_SPREAD": ", each on a node of its own", "STRICT_PACK": ", all on one node"}
        asks = f"pool {self.pool} asks for {self.workers} workers{more} of {each}"
        return f"{asks}{nodes}{together.get(self.strategy, '')}"

    def places(self, nodes: list[dict[str, Any]]) -> int:
        """For how many workers there is room on `nodes`, as `ray.nodes()` tells of them, however empty they are."""
        rooms = [
            min(int(node["Resources"].get(kind, 0) // amount) for kind, amount in self.each.items())
            for node in nodes
            if self.where.items() <= node["Labels"].items()
        ]
        if self.strategy == "STRICT_PACK":
            return max(rooms, default=0)
        return sum(min(room, 1) for room in rooms) if self.strategy == "STRICT_SPREAD" else sum(rooms)

    def check_room(self, nodes: list[dict[str, Any]]) -> None:
        """Raise WorkerFailed when `nodes` could not hold it, however empty they were.

        Ray waits silently for what can never be placed.
        """
        if (places := self.places(nodes)) < self.workers + self.spares:
            advice = "; fault.spares=0 does without" if self.spares else ""
            raise WorkerFailed(f"{self}; the cluster has room for {places}: {told_of(nodes)}{advice}")


def _listed(labels: dict[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items())


def told_of(nodes: list[dict[str, Any]], free: dict[str, dict[str, float]] | None = None) -> str:
    """What each of `nodes` has. `free`: what of it nobody holds, by the node's id."""

    def amount(node: dict[str, Any], kind: str) -> str:
        whole = f"{node['Resources'].get(kind, 0):g} {kind}"
        return whole if free is None else f"{free.get(node['NodeID'], {}).get(kind, 0):g} of {whole} free"

    def told(node: dict[str, Any]) -> str:
        labels = _listed({key: value for key, value in node["Labels"].items() if not key.startswith("ray.io/")})
        name = f"{node['NodeManagerHostname']} ({labels})" if labels else node["NodeManagerHostname"]
        return f"{name} has {amount(node, 'CPU')}, {amount(node, 'GPU')}"

    return "; ".join(map(told, nodes))
