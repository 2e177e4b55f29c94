"""How a recipe chooses the road of expert rows, and the dispatcher that is built from it."""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist
from pydantic import Field

from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.dispatchers import (
    AllGatherDispatcher,
    AllToAllDispatcher,
    Dispatcher,
    HierarchicalDispatcher,
    LocalDispatcher,
)
from expertmesh.parallel.nodes import find_ranks_per_node, split_by_node
from expertmesh.parallel.recipe_section import RecipeSection
from expertmesh.parallel.wire import WIRES, WireName


class DispatchConfig(RecipeSection):
    """Between expert-parallel ranks. No `kind` changes a bit of what is computed; `wire` rounds, `chunks` regroups."""

    kind: Literal["all_to_all", "all_gather", "hierarchical"] = Field(
        "all_to_all", description="straight to the ranks wanted; to all ranks; or once to each node, and on from there"
    )
    wire: WireName = Field("native", description="what rows and their gradients are rounded to on their way")
    chunks: int = Field(1, ge=1, description="parts of a rank's tokens: one is computed while the next is on its way")
    ranks_per_node: int | None = Field(None, ge=1, description="expert-parallel ranks of a node; null: those of a host")


def build_dispatcher(
    group: dist.ProcessGroup | None, config: DispatchConfig, traffic: Traffic, device: str
) -> Dispatcher:
    """The dispatcher of one rank; all ranks of `group`, which together hold every expert once, call it together.

    Raises:
        ValueError: if `ranks_per_node` does not divide the ranks.
    """
    if group is None:
        return LocalDispatcher()
    per_node = config.ranks_per_node or find_ranks_per_node(group, device)
    if group.size() % per_node:
        raise ValueError(
            f"parallel.dispatch.ranks_per_node={per_node} does not divide the {group.size()} expert-parallel ranks"
        )
    wire = WIRES[config.wire]
    if config.kind == "hierarchical":
        return HierarchicalDispatcher(group, split_by_node(group, per_node), traffic, wire, config.chunks)
    flat = AllGatherDispatcher if config.kind == "all_gather" else AllToAllDispatcher
    return flat(group, traffic, wire, config.chunks, per_node)
