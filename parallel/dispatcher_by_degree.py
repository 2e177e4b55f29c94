"""Dispatch for a model whose layers have several expert-parallel degrees: each by a dispatcher over its own ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from expertmesh.kernels.routing import Routing
from expertmesh.kernels.zero_computation import ZeroComputation
from expertmesh.parallel.dispatchers import Dispatched, Dispatcher, ExpertLayer
from expertmesh.parallel.sizes import expert_degree


class Handle(NamedTuple):
    dispatcher: Dispatcher  # of this layer
    inner: Any


class DispatcherByDegree:
    """`by_degree`: for experts over that many of `ep` ranks."""

    def __init__(self, by_degree: Mapping[int, Dispatcher], ep: int) -> None:
        self.by_degree, self.ep = by_degree, ep

    def dispatch(self, x_TD: torch.Tensor, routing: Routing, layer: ExpertLayer) -> Dispatched:
        dispatcher = self.by_degree[expert_degree(layer.num_experts, self.ep)]
        arriving, inner = dispatcher.dispatch(x_TD, routing, layer)
        return Dispatched(arriving, Handle(dispatcher, inner))

    def combine(
        self, answers: Iterable[torch.Tensor], handle: Handle, zero: ZeroComputation | None = None
    ) -> torch.Tensor:
        return handle.dispatcher.combine(answers, handle.inner, zero)
