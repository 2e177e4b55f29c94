"""Tokens of experts that every rank has a copy of stay at home, by any dispatcher for the others."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch

from expertmesh.kernels.combine import combine_rows
from expertmesh.kernels.routing import Routing, sort_slots
from expertmesh.kernels.zero_computation import ZeroComputation
from expertmesh.parallel.dispatchers import Dispatched, Dispatcher, ExpertLayer, LocalHandle, rows_here


class HomeHandle(NamedTuple):
    inner: Any
    home: LocalHandle | None  # None: the layer has no copies


class HomeDispatcher:
    """`inner` is handed what chose other experts. Rows of copies come first: they can be computed while others travel.

    For `inner` a slot that stays at home is like a dropped one: it has no row, and is not among the bytes saved by
    zero-computation experts.
    """

    def __init__(self, inner: Dispatcher) -> None:
        self.inner = inner

    def dispatch(self, x_TD: torch.Tensor, routing: Routing, layer: ExpertLayer) -> Dispatched:
        if not layer.copied:
            arriving, inner = self.inner.dispatch(x_TD, routing, layer)
            return Dispatched(arriving, HomeHandle(inner, None))
        copies, num_experts = len(layer.copied), layer.num_experts
        copy_E = _copy_of_expert(layer.copied, num_experts, routing.experts_TK.device)
        home_TK = copy_E[routing.experts_TK.clamp(max=num_experts)]
        away_TK = routing.experts_TK.masked_fill(home_TK < copies, num_experts)
        arriving, inner = self.inner.dispatch(x_TD, routing._replace(experts_TK=away_TK), layer)
        rows, home = rows_here(x_TD, sort_slots(home_TK, copies), routing.weights_TK)
        return Dispatched(chain((rows,), arriving), HomeHandle(inner, home))

    def combine(
        self, answers: Iterable[torch.Tensor], handle: HomeHandle, zero: ZeroComputation | None = None
    ) -> torch.Tensor:
        if handle.home is None:
            return self.inner.combine(answers, handle.inner, zero)
        order, weights_TK, weigh = handle.home
        answers = iter(answers)
        home_TD = combine_rows(next(answers), order.slots_R, weights_TK, weigh)
        return home_TD + self.inner.combine(answers, handle.inner, zero)


@lru_cache(maxsize=4096)
def _copy_of_expert(copied: tuple[int, ...], num_experts: int, device: torch.device) -> torch.Tensor:
    """int64 [E + 1]: the number of each expert's copy; as many as there are for one without, and for what is none."""
    copy_E = torch.full((num_experts + 1,), len(copied), device=device)
    copy_E[list(copied)] = torch.arange(len(copied), device=device)
    return copy_E
