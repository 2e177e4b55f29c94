"""Experts whose hidden units are split over ranks (expert slicing, DeepSpeed-MoE, arXiv 2201.05596, section 5.2).

Each rank of the group holds F/etp hidden units of the same experts, and tokens of its own. So it computes the rows of
all ranks of the group, and each answer is the sum of what they give:

    rows here [R] --to all--> rows of the group [S] --F/etp--> parts of answers [S] --to whose they are, summed--> [R]

Rows go to all by one uneven all-to-all of copies, and back by its mirror image: as many bytes as an all-gather and a
reduce-scatter, which have no uneven form everywhere.

Legend: R rows of this rank, S rows of all ranks of the group, E experts here, D width, G ranks of the group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from expertmesh.kernels.routing import Routing
from expertmesh.kernels.rows import Rows
from expertmesh.kernels.zero_computation import ZeroComputation
from expertmesh.parallel.all_to_all import Traffic, all_to_all
from expertmesh.parallel.dispatchers import Dispatched, Dispatcher, ExpertLayer
from expertmesh.parallel.whereabouts import inside


class _Visit(NamedTuple):
    """One part of the rows, at all ranks of the group."""

    rows: Rows  # as the dispatcher within gave them
    copies: list[int]  # rows of this rank, for each rank of the group
    arrived: list[int]  # rows of each rank of the group
    by_expert_S: torch.Tensor  # int64, position among the arrived rows of each row in expert order


class ExpertTensorHandle(NamedTuple):
    inner: Any
    layer: int
    visits: list[_Visit]  # so far

    def named(self, what: str) -> str:
        return f"layer {self.layer} {what} among expert tensor ranks"


class ExpertTensorDispatcher:
    """Around the dispatcher that brings rows to the ranks of their experts; `group` holds the same experts."""

    def __init__(self, inner: Dispatcher, group: dist.ProcessGroup, traffic: Traffic) -> None:
        self.inner, self.group, self.traffic = inner, group, traffic

    def dispatch(self, x_TD: torch.Tensor, routing: Routing, layer: ExpertLayer) -> Dispatched:
        arriving, inner = self.inner.dispatch(x_TD, routing, layer)
        handle = ExpertTensorHandle(inner, layer.layer, [])
        return Dispatched(self._of_all(arriving, handle), handle)

    def _of_all(self, arriving: Iterable[Rows], handle: ExpertTensorHandle) -> Iterator[Rows]:
        ranks = self.group.size()
        for rows in arriving:
            rows_RD = rows.gathered()
            arrived_GE = rows.counts_E.new_empty(ranks * len(rows.counts_E))
            with inside(handle.named("counts")):
                dist.all_gather_single(arrived_GE, rows.counts_E, group=self.group)
            arrived_GE = arrived_GE.view(ranks, -1)
            copies, arrived = [len(rows_RD)] * ranks, arrived_GE.sum(1).tolist()
            sent_SD, name = rows_RD.repeat(ranks, 1), handle.named("rows")
            rows_SD = all_to_all(sent_SD, copies, arrived, self.group, self.traffic, name)
            experts = torch.arange(len(rows.counts_E), device=arrived_GE.device).repeat(ranks)
            by_expert_S = experts.repeat_interleave(arrived_GE.flatten()).argsort(stable=True)
            handle.visits.append(_Visit(rows, copies, arrived, by_expert_S))
            yield Rows(rows_SD, by_expert_S, arrived_GE.sum(0))

    def combine(
        self, answers: Iterable[torch.Tensor], handle: ExpertTensorHandle, zero: ZeroComputation | None = None
    ) -> torch.Tensor:
        return self.inner.combine(self._summed(answers, handle), handle.inner, zero)

    def _summed(self, answers: Iterable[torch.Tensor], handle: ExpertTensorHandle) -> Iterator[torch.Tensor]:
        for number, answers_SD in enumerate(answers):
            rows, copies, arrived, by_expert_S = handle.visits[number]
            as_arrived_SD = answers_SD.index_select(0, by_expert_S.argsort())
            name = handle.named("answers")
            parts_RD = all_to_all(as_arrived_SD, arrived, copies, self.group, self.traffic, name)
            yield rows.weighted(parts_RD.unflatten(0, (self.group.size(), -1)).sum(0))
