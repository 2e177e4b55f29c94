"""Dispatch to experts that lie where a placement says, by any dispatcher: it is handed slots in place of experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch

from expertmesh.kernels.routing import Routing
from expertmesh.kernels.zero_computation import ZeroComputation
from expertmesh.parallel.dispatchers import Dispatched, Dispatcher, ExpertLayer
from expertmesh.parallel.placement import Placement, place_slots


class Choice(Protocol):
    """Which copy of an expert serves each choice; `place_slots` and `place_on_fewest` are such functions."""

    def __call__(self, experts_TK: torch.Tensor, placement: Placement, source: int) -> torch.Tensor: ...


class PlacedDispatcher:
    """`inner`, which knows contiguous experts only, for experts that lie as `placements[layer]` says.

    A layer without a placement goes through unchanged. `source`: the rank of these tokens, for the choice of copies.
    `placements` may be changed between passes, never between a dispatch and its combine.
    """

    def __init__(
        self,
        inner: Dispatcher,
        placements: Mapping[int, Placement],
        source: int,
        choice: Choice = place_slots,
    ) -> None:
        self.inner, self.placements, self.source, self.choice = inner, placements, source, choice

    def dispatch(self, x_TD: torch.Tensor, routing: Routing, layer: ExpertLayer) -> Dispatched:
        placement = self.placements.get(layer.layer)
        if placement is None:
            return self.inner.dispatch(x_TD, routing, layer)
        assert placement.num_experts == layer.num_experts, f"{layer} is not placed by {placement}"
        placed = place_routing(routing, placement, self.source, self.choice)
        copied = tuple(placement.slots_of_expert[expert][0] for expert in layer.copied)
        return self.inner.dispatch(x_TD, placed, layer._replace(num_experts=placement.slots, copied=copied))

    def combine(
        self, answers: Iterable[torch.Tensor], handle: Any, zero: ZeroComputation | None = None
    ) -> torch.Tensor:
        return self.inner.combine(answers, handle, zero)


def place_routing(routing: Routing, placement: Placement, source: int, choice: Choice = place_slots) -> Routing:
    """`routing` with slots for experts. Logits and probabilities stay those of experts: losses read the original."""
    chosen_TK = choice(routing.chosen_TK, placement, source)
    if routing.chosen_TK is routing.experts_TK:  # nothing can be dropped, which is told by their being one tensor
        return routing._replace(experts_TK=chosen_TK, chosen_TK=chosen_TK)
    serves_TK = routing.experts_TK == routing.chosen_TK
    dropped_TK = routing.experts_TK + placement.slots - placement.num_experts
    return routing._replace(experts_TK=torch.where(serves_TK, chosen_TK, dropped_TK), chosen_TK=chosen_TK)
