"""The dispatcher that a recipe asks for, over the groups of a rank."""

from __future__ import annotations

import math

import torch.distributed as dist

from expertmesh.parallel.all_to_all import Lane, Traffic
from expertmesh.parallel.dispatch_config import DispatchConfig
from expertmesh.parallel.dispatcher_by_degree import DispatcherByDegree
from expertmesh.parallel.dispatchers import (
    AllGatherDispatcher,
    AllToAllDispatcher,
    Dispatcher,
    HierarchicalDispatcher,
    LocalDispatcher,
)
from expertmesh.parallel.expert_tensor import ExpertTensorDispatcher
from expertmesh.parallel.groups import Groups
from expertmesh.parallel.home_dispatcher import HomeDispatcher
from expertmesh.parallel.nodes import far_ranks, find_ranks_per_node, split_by_node
from expertmesh.parallel.wire import NATIVE, WIRES


def build_dispatcher(groups: Groups, config: DispatchConfig, traffic: Traffic, device: str) -> Dispatcher:
    """What brings tokens to experts that are spread as `groups` says; all ranks call it together.

    Raises:
        ValueError: if `ranks_per_node` does not divide the ranks.
    """
    if groups.expert_size % (config.ranks_per_node or 1):
        raise ValueError(
            f"parallel.dispatch.ranks_per_node={config.ranks_per_node} does not divide "
            f"the {groups.expert_size} expert-parallel ranks"
        )
    dispatcher = _between_shards(groups, config, traffic, device)
    if groups.narrower:
        narrower = {degree: _between_shards(of, config, traffic, device) for degree, of in groups.narrower.items()}
        dispatcher = DispatcherByDegree(narrower | {groups.expert_size: dispatcher}, groups.expert_size)
    if groups.expert_tensor is not None:
        dispatcher = ExpertTensorDispatcher(dispatcher, groups.expert_tensor, traffic)
    return dispatcher


def _between_shards(groups: Groups, config: DispatchConfig, traffic: Traffic, device: str) -> Dispatcher:
    if groups.expert is None:
        return LocalDispatcher()
    group, per_node = groups.expert, _ranks_per_node(groups.expert, config, device)
    wire = WIRES[config.wire]
    if config.kind == "hierarchical":
        nodes = split_by_node(group, per_node)
        return HomeDispatcher(HierarchicalDispatcher(group, nodes, traffic, wire, config.chunks))
    flat = AllGatherDispatcher if config.kind == "all_gather" else AllToAllDispatcher
    return HomeDispatcher(flat(group, traffic, wire, config.chunks, per_node))


def build_weights_lane(group: dist.ProcessGroup, config: DispatchConfig, traffic: Traffic, device: str) -> Lane:
    """What weights of experts travel on between the ranks of `group`; all of them call it together."""
    return Lane(group, NATIVE, traffic, far_ranks(group, _ranks_per_node(group, config, device)))


def _ranks_per_node(group: dist.ProcessGroup, config: DispatchConfig, device: str) -> int:
    """Those of the group alone, which may be smaller than a node."""
    told = config.ranks_per_node
    return find_ranks_per_node(group, device) if told is None else math.gcd(told, group.size())
