"""Where the rows of routed experts go: the one thing that differs between training, joined serving and split serving.

A dispatcher takes the tokens of this rank and what the router decided, and hands back the rows that the experts *here*
must compute, sorted by expert; afterwards it takes their answers and gives every token the weighted sum of its own.

    x_TD, routing  --dispatch-->  rows, handle  --experts-->  answers_RD  --combine-->  y_TD

`Rows` says where each row lies, so that no dispatcher makes a sorted copy for the experts.

`LocalDispatcher` is one rank with every expert, and the reference: any other must give what it gives.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from expertmesh.kernels.combine import combine_rows
from expertmesh.kernels.routing import Routing, SlotOrder, sort_slots
from expertmesh.kernels.rows import Rows, gather_rows
from expertmesh.kernels.zero_computation import ZeroComputation
from expertmesh.parallel.all_to_all import Traffic, all_to_all, remote_share


class ExpertLayer(NamedTuple):
    """Which layer's routed experts are meant, and how many of them there are on all ranks together."""

    layer: int
    num_experts: int


class Dispatched(NamedTuple):
    """What the experts of this rank have to compute."""

    rows: Rows
    handle: Any  # what `combine` of the same dispatcher needs


class Dispatcher(Protocol):
    """Brings rows to experts and results back to tokens."""

    def dispatch(self, x_TD: torch.Tensor, routing: Routing, layer: ExpertLayer) -> Dispatched:
        """Rows for the experts here. Slots of zero-computation experts get no row anywhere."""
        ...

    def combine(self, answers_RD: torch.Tensor, handle: Any, zero: ZeroComputation | None = None) -> torch.Tensor:
        """y_TD: for each token of this rank, the sum of its rows' answers weighted by the router.

        `zero`: the zero-computation experts of these tokens, whose answers are added.
        """
        ...


class LocalHandle(NamedTuple):
    order: SlotOrder
    weights_TK: torch.Tensor
    weigh: bool  # the answers come without their weights


class LocalDispatcher:
    """Every expert is here."""

    def dispatch(self, x_TD: torch.Tensor, routing: Routing, layer: ExpertLayer) -> Dispatched:
        order = sort_slots(routing.experts_TK, layer.num_experts)
        index_R = order.slots_R // routing.weights_TK.shape[1]
        # Weighed by the experts, answers need not be kept for the weights' gradient. Without gradients they are weighed
        # here, as where they come from afar: so in bfloat16 too a served model says the same joined and split.
        by_experts = torch.is_grad_enabled()
        weights_R = routing.weights_TK.flatten()[order.slots_R] if by_experts else None
        handle = LocalHandle(order, routing.weights_TK, weigh=not by_experts)
        return Dispatched(Rows(x_TD, index_R, order.counts_E, weights_R), handle)

    def combine(
        self, answers_RD: torch.Tensor, handle: LocalHandle, zero: ZeroComputation | None = None
    ) -> torch.Tensor:
        return combine_rows(answers_RD, handle.order.slots_R, handle.weights_TK, handle.weigh, zero)


def rows_to_send(x_TD: torch.Tensor, routing: Routing, layer: ExpertLayer) -> tuple[torch.Tensor, LocalHandle]:
    """A row for each slot of a routed expert, by expert, to be sent away; the weights stay here."""
    order = sort_slots(routing.experts_TK, layer.num_experts)
    rows_RD = gather_rows(x_TD, order.slots_R // routing.weights_TK.shape[1])
    return rows_RD, LocalHandle(order, routing.weights_TK, weigh=True)


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
        rows_RD, local = rows_to_send(x_TD, routing, layer)

        sent_SE = local.order.counts_E.view(ranks, layer.num_experts // ranks)  # [destination, its experts]
        arriving_SE = torch.empty_like(sent_SE)  # [source, experts here]
        dist.all_to_all_single(arriving_SE, sent_SE, group=self.group)
        send_splits, receive_splits = sent_SE.sum(1).tolist(), arriving_SE.sum(1).tolist()
        self._count_saved(x_TD, routing, send_splits)

        rows_RD = all_to_all(rows_RD, send_splits, receive_splits, self.group, self.traffic)
        by_expert_R = _expert_order(arriving_SE)
        handle = AllToAllHandle(local, send_splits, receive_splits, by_expert_R)
        return Dispatched(Rows(rows_RD, by_expert_R, arriving_SE.sum(0)), handle)

    def combine(
        self, answers_RD: torch.Tensor, handle: AllToAllHandle, zero: ZeroComputation | None = None
    ) -> torch.Tensor:
        as_arrived_R = torch.empty_like(handle.by_expert_R)
        as_arrived_R[handle.by_expert_R] = torch.arange(len(as_arrived_R), device=as_arrived_R.device)
        answers_RD = answers_RD.index_select(0, as_arrived_R)
        answers_RD = all_to_all(answers_RD, handle.receive_splits, handle.send_splits, self.group, self.traffic)
        return self._local.combine(answers_RD, handle.local, zero)

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
