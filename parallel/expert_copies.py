"""Copies of hot experts on every rank of an expert-parallel group, for as long as one pass needs them.

The rank that holds an expert stays its only owner. In each pass it sends the weights to all ranks, which answer their
own tokens with them, and gets back the sum of their gradients (shadowed experts: FasterMoE, He et al., PPoPP 2022). So
copies are equal, a gradient is what it is without them but for the order of a sum, and neither the optimizer nor a
checkpoint knows of any.

    set_out         weights leave for all ranks      backward:  the sums of gradients are there
    ...             router, rows that set out                   theirs
    first rows      weights are there                backward:  gradients leave for the owners

Weights travel as they are, whatever the wire of rows. Bytes are counted as a broadcast and a reduction need them at
least: each rank but the owner is handed the weights once, and hands its gradient on once.

Legend: H experts held here, C copies, X the other dimensions of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call

from expertmesh.kernels.rows import Rows
from expertmesh.parallel.all_to_all import Flight, Lane, arrive, depart
from expertmesh.parallel.placement import Placement, expert_shard

Answer = Callable[[Rows, Any], torch.Tensor]
"""From rows, and the context of a pass, to their answers."""


class Home(NamedTuple):
    """Where an expert is held."""

    rank: int
    place: int  # among the experts of that rank


def homes_of(experts: tuple[int, ...], placement: Placement) -> list[Home]:
    """Of experts that `placement` has once each."""
    homes = []
    for expert in experts:
        (slot,) = placement.slots_of_expert[expert]
        rank = placement.rank_of_slot[slot]
        homes.append(Home(rank, slot - expert_shard(placement.slots, rank, placement.ranks).start))
    return homes


class _Broadcast:
    """An `Exchange`: from a parameter [H, X] of experts held here, [C, X] of those copied."""

    def __init__(self, homes: list[Home], lane: Lane) -> None:
        self.homes, self.lane = homes, lane

    def start(self, held_HX: torch.Tensor) -> None:
        group, copies_CX = self.lane.group, held_HX.new_empty(len(self.homes), *held_HX.shape[1:])
        works = []
        for home, copy_X in zip(self.homes, copies_CX, strict=True):
            if home.rank == group.rank():
                copy_X.copy_(held_HX[home.place])
                self.lane.sends([1] * group.size(), copy_X.nbytes)
            works.append(dist.broadcast(copy_X, group=group, group_src=home.rank, async_op=True))
        self._on_the_way = works, copies_CX

    def finish(self) -> torch.Tensor:
        works, copies_CX = self._on_the_way
        del self._on_the_way
        for work in works:
            work.wait()
        return copies_CX


class _Reduce:
    """An `Exchange`: from gradients [C, X] of the copies here, [H, X] of experts held here; of others' experts 0."""

    def __init__(self, homes: list[Home], held: int, lane: Lane) -> None:
        self.homes, self.held, self.lane = homes, held, lane

    def start(self, grads_CX: torch.Tensor) -> None:
        group, grads_CX = self.lane.group, grads_CX.contiguous()
        works = []
        for home, grad_X in zip(self.homes, grads_CX, strict=True):
            self.lane.sends([int(rank == home.rank) for rank in range(group.size())], grad_X.nbytes)
            works.append(dist.reduce(grad_X, group=group, group_dst=home.rank, async_op=True))
        self._on_the_way = works, grads_CX

    def finish(self) -> torch.Tensor:
        works, grads_CX = self._on_the_way
        del self._on_the_way
        for work in works:
            work.wait()
        sums_HX = grads_CX.new_zeros(self.held, *grads_CX.shape[1:])
        for home, grad_X in zip(self.homes, grads_CX, strict=True):
            if home.rank == self.lane.group.rank():
                sums_HX[home.place] = grad_X
        return sums_HX


@dataclass(frozen=True)
class ExpertCopies:
    """Of one layer; the same on every rank of the lane's group, whose experts lie as `placement` says."""

    layer: int
    experts: tuple[int, ...]
    placement: Placement
    lane: Lane

    def set_out(self, held: nn.Module) -> Answer:
        """Begin to send the weights of `held`, the experts here: each parameter has them in its first dimension.

        Returns what answers rows of the copies; it waits for their weights. Every rank calls both.
        """
        homes, here = homes_of(self.experts, self.placement), len(self.placement.held(self.lane.group.rank()))
        name = f"layer {self.layer} copies of experts"
        flights, tickets = {}, {}
        for key, parameter in held.named_parameters():
            there, back = _Broadcast(homes, self.lane), _Reduce(homes, here, self.lane)
            flights[key] = Flight(there, back, name)
            tickets[key] = depart(parameter, flights[key])

        def copies(rows: Rows, context: Any) -> torch.Tensor:
            weights = {key: arrive(tickets[key], flight) for key, flight in flights.items()}
            answers_RD: torch.Tensor = functional_call(held, weights, (rows, context))
            return answers_RD

        return copies
