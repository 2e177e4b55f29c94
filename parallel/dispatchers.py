"""Where the rows of routed experts go: the one thing that differs between training, joined serving and split serving.

A dispatcher takes the tokens of this rank and what the router decided, and hands back the rows that the experts *here*
must compute, sorted by expert; afterwards it takes those rows and gives every token the weighted sum of its own.

    x_TD, routing  --dispatch-->  rows_RD, counts_E, handle  --experts-->  rows_RD  --combine-->  y_TD

`LocalDispatcher` is one rank with every expert, and the reference: any other must give what it gives.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from expertmesh.kernels.combine import combine_rows, gather_rows
from expertmesh.kernels.routing import Routing, SlotOrder, sort_slots
from expertmesh.parallel.all_to_all import Traffic, all_to_all, remote_share


class ExpertLayer(NamedTuple):
    """Which layer's routed experts are meant, and how many of them there are on all ranks together."""

    layer: int
    num_experts: int


class Dispatched(NamedTuple):
    """What the experts of this rank have to compute."""

    rows_RD: torch.Tensor  # sorted by expert
    counts_E: torch.Tensor  # int64, rows of each expert held here
    handle: Any  # what `combine` of the same dispatcher needs


class Dispatcher(Protocol):
    """Brings rows to experts and results back to tokens."""

    def dispatch(self, x_TD: torch.Tensor, routing: Routing, layer: ExpertLayer) -> Dispatched:
        """Rows for the experts here. Slots of zero-computation experts get no row anywhere."""
        ...

    def combine(self, rows_RD: torch.Tensor, handle: Any) -> torch.Tensor:
        """y_TD: for each token of this rank, the sum of its rows weighted by the router."""
        ...


class LocalHandle(NamedTuple):
    order: SlotOrder
    weights_TK: torch.Tensor


class LocalDispatcher:
    """Every expert is here."""

    def dispatch(self, x_TD: torch.Tensor, routing: Routing, layer: ExpertLayer) -> Dispatched:
        order = sort_slots(routing.experts_TK, layer.num_experts)
        rows_RD = gather_rows(x_TD, order.slots_R, routing.weights_TK.shape[1])
        return Dispatched(rows_RD, order.counts_E, LocalHandle(order, routing.weights_TK))

    def combine(self, rows_RD: torch.Tensor, handle: LocalHandle) -> torch.Tensor:
        return combine_rows(rows_RD, handle.order.slots_R, handle.weights_TK)


class AllToAllHandle(NamedTuple):
    local: LocalHandle
    send_splits: list[int]
    receive_splits: list[int]
    by_expert_R: torch.Tensor  # int64, position among the arrived rows of each row in expert order


class AllToAllDispatcher:
    """Each rank of `group` holds an equal, contiguous part of the experts. Dropless: splits follow the routing."""

    def __init__(self, group: dist.ProcessGroup, traffic: Traffic) -> None:
        self.group, self.traffic = group, traffic
        self._local = LocalDispatcher()

    def dispatch(self, x_TD: torch.Tensor, routing: Routing, layer: ExpertLayer) -> Dispatched:
        ranks = self.group.size()
        rows_RD, counts_E, local = self._local.dispatch(x_TD, routing, layer)

        sent_SE = counts_E.view(ranks, layer.num_experts // ranks)  # [destination, its experts]
        arriving_SE = torch.empty_like(sent_SE)  # [source, experts here]
        dist.all_to_all_single(arriving_SE, sent_SE, group=self.group)
        send_splits, receive_splits = sent_SE.sum(1).tolist(), arriving_SE.sum(1).tolist()
        self._count_saved(x_TD, routing, send_splits)

        rows_RD = all_to_all(rows_RD, send_splits, receive_splits, self.group, self.traffic)
        by_expert_R = _expert_order(arriving_SE)
        handle = AllToAllHandle(local, send_splits, receive_splits, by_expert_R)
        return Dispatched(rows_RD.index_select(0, by_expert_R), arriving_SE.sum(0), handle)

    def combine(self, rows_RD: torch.Tensor, handle: AllToAllHandle) -> torch.Tensor:
        as_arrived_R = torch.empty_like(handle.by_expert_R)
        as_arrived_R[handle.by_expert_R] = torch.arange(len(as_arrived_R), device=as_arrived_R.device)
        rows_RD = rows_RD.index_select(0, as_arrived_R)
        rows_RD = all_to_all(rows_RD, handle.receive_splits, handle.send_splits, self.group, self.traffic)
        return self._local.combine(rows_RD, handle.local)

    def _count_saved(self, x_TD: torch.Tensor, routing: Routing, send_splits: list[int]) -> None:
        kept_slots = routing.experts_TK.numel() - routing.dropped_slots - sum(send_splits)
        crossings = 4 if torch.is_grad_enabled() else 2  # there and back, and their gradients
        row_bytes = x_TD.element_size() * x_TD.shape[1]
        self.traffic.saved += round(kept_slots * remote_share(send_splits, self.group.rank()) * row_bytes * crossings)


def _expert_order(arriving_SE: torch.Tensor) -> torch.Tensor:
    """Rows arrive sorted by (source, expert); the positions that list them by (expert, source), a stable order."""
    sources, experts = arriving_SE.shape
    expert_of_block = torch.arange(experts, device=arriving_SE.device).repeat(sources)
    return torch.argsort(expert_of_block.repeat_interleave(arriving_SE.flatten()), stable=True)
