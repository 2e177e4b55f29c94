"""Where the rows of routed experts go: the one thing that differs between training, joined serving and split serving.

A dispatcher takes the tokens of this rank and what the router decided, and hands back the rows that the experts *here*
must compute, sorted by expert; afterwards it takes their answers and gives every token the weighted sum of its own.

    x_TD, routing  --dispatch-->  rows, handle  --experts-->  answers_RD  --combine-->  y_TD

Rows may come in several parts: to ask for one lets the next set out, and `combine` asks as soon as it has sent the
answers to the part before. So experts work while rows are on their way in both directions, and the layer says no more
than `combine((experts(rows) for rows in arriving), handle)`.

`Rows` says where each row lies, so that no dispatcher makes a sorted copy for the experts.

`LocalDispatcher` is one rank with every expert, and the reference: any other must give what it gives, added up in
another order. Among those that send rows to other ranks that order is one and the same: which road the rows take
changes no bit of an answer or a gradient (chunks and narrow wires do).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from expertmesh.kernels.combine import combine_rows
from expertmesh.kernels.routing import Routing, SlotOrder, sort_slots
from expertmesh.kernels.rows import Rows
from expertmesh.kernels.zero_computation import ZeroComputation
from expertmesh.parallel.all_to_all import Lane, Traffic
from expertmesh.parallel.hops import AllGatherHop, AllToAllHop, Choices, Destinations, Hop, Passage, Planned
from expertmesh.parallel.nodes import Nodes, far_ranks
from expertmesh.parallel.placement import expert_shard
from expertmesh.parallel.wire import NATIVE, Wire


class ExpertLayer(NamedTuple):
    """Which layer's routed experts are meant, and how many of them there are on all ranks together."""

    layer: int
    num_experts: int
    width: float = 1.0
    """Share of their hidden units that is to answer, where they are nested."""
    copied: tuple[int, ...] = ()
    """Experts that every rank has a copy of (expert_copies.py). Their rows are the first part, in this order."""


class Dispatched(NamedTuple):
    """What the experts of this rank have to compute."""

    arriving: Iterable[Rows]  # to be gone through once
    handle: Any  # what `combine` of the same dispatcher needs


class Dispatcher(Protocol):
    """Brings rows to experts and results back to tokens."""

    def dispatch(self, x_TD: torch.Tensor, routing: Routing, layer: ExpertLayer) -> Dispatched:
        """Rows for the experts here. Slots of zero-computation experts get no row anywhere."""
        ...

    def combine(
        self, answers: Iterable[torch.Tensor], handle: Any, zero: ZeroComputation | None = None
    ) -> torch.Tensor:
        """y_TD: for each token of this rank, the sum of its rows' answers weighted by the router.

        `answers`: answers_RD to each of the rows that arrived, in turn; best given by a generator that computes them.
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
        rows, handle = rows_here(x_TD, sort_slots(routing.experts_TK, layer.num_experts), routing.weights_TK)
        return Dispatched((rows,), handle)

    def combine(
        self, answers: Iterable[torch.Tensor], handle: LocalHandle, zero: ZeroComputation | None = None
    ) -> torch.Tensor:
        (answers_RD,) = answers
        return combine_rows(answers_RD, handle.order.slots_R, handle.weights_TK, handle.weigh, zero)


def rows_here(x_TD: torch.Tensor, order: SlotOrder, weights_TK: torch.Tensor) -> tuple[Rows, LocalHandle]:
    """Of tokens that are where their experts are."""
    # Weighed by the experts, answers need not be kept for the weights' gradient. Without gradients they are weighed
    # afterwards, as where they come from afar: so in bfloat16 too a served model says the same joined and split.
    by_experts = torch.is_grad_enabled()
    weights_R = weights_TK.flatten()[order.slots_R] if by_experts else None
    rows = Rows(x_TD, order.slots_R // weights_TK.shape[1], order.counts_E, weights_R)
    return rows, LocalHandle(order, weights_TK, weigh=not by_experts)


@dataclass
class _Journey:
    """The chunks of one pass through one layer, while they travel."""

    first: list[Passage]  # of each chunk
    later: list[list[Passage]] = field(default_factory=list)  # the other hops of each chunk that has arrived
    here: list[LocalHandle] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # of each chunk


class HopDispatcher:
    """Tokens go to the ranks that hold their experts, in chunks, one hop after another, and are summed on the way home.

    Every expert rank holds a contiguous shard (`placement.expert_shard`), whatever the number of experts: layers may
    differ, and a layer of fewer experts than ranks leaves some ranks without. Weights travel with the tokens, so that
    one sum comes back from each rank; in float32 nothing else differs from `LocalDispatcher` but that its terms are
    added rank by rank.

    Of several hops, the later ones of a chunk are waited for; it is the first whose exchange overlaps the experts.
    """

    def __init__(self, hops: list[Hop], rank: int, ranks: int, chunks: int, wire: Wire, traffic: Traffic) -> None:
        """`rank` of `ranks` that hold experts. All of them must agree on everything else."""
        self.hops, self.chunks, self.wire, self.traffic = hops, chunks, wire, traffic
        self.rank, self.ranks = rank, ranks

    def dispatch(self, x_TD: torch.Tensor, routing: Routing, layer: ExpertLayer) -> Dispatched:
        choices = Choices(routing.experts_TK, routing.weights_TK, torch.zeros_like(routing.experts_TK[:, 0]))
        planned = self.hops[0].plan(choices, layer.layer, layer.num_experts, self.chunks)
        self._count_saved(x_TD, routing, planned)
        journey = _Journey(planned.passages, tokens=planned.tokens)
        chunks = list(zip(_cut(x_TD, planned.tokens), _cut(routing.weights_TK, planned.tokens), strict=True))
        journey.first[0].depart(*chunks[0])
        return Dispatched(self._arrivals(journey, chunks, layer), journey)

    def _arrivals(
        self, journey: _Journey, chunks: list[tuple[torch.Tensor, torch.Tensor]], layer: ExpertLayer
    ) -> Iterator[Rows]:
        for number, passage in enumerate(journey.first):
            if number + 1 < len(chunks):
                journey.first[number + 1].depart(*chunks[number + 1])
            x_VD, choices = passage.arrive()
            journey.later.append([])
            for hop in self.hops[1:]:
                (onward,) = hop.plan(choices, layer.layer, layer.num_experts, 1).passages
                onward.depart(x_VD, choices.weights_TK)
                x_VD, choices = onward.arrive()
                journey.later[-1].append(onward)
            rows, handle = rows_here(x_VD, self._order(choices, layer.num_experts), choices.weights_TK)
            journey.here.append(handle)
            yield rows

    def combine(
        self, answers: Iterable[torch.Tensor], handle: _Journey, zero: ZeroComputation | None = None
    ) -> torch.Tensor:
        for number, answers_RD in enumerate(answers):
            here = handle.here[number]
            sums_VD = combine_rows(answers_RD, here.order.slots_R, here.weights_TK, here.weigh)
            for onward in reversed(handle.later[number]):
                onward.leave(sums_VD)
                sums_VD = onward.home(None)
            handle.first[number].leave(sums_VD)
        zeros = [None] * len(handle.first) if zero is None else _cut_zero(zero, handle.tokens)
        parts = [passage.home(part) for passage, part in zip(handle.first, zeros, strict=True)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _order(self, choices: Choices, num_experts: int) -> SlotOrder:
        """The slots of the experts held here; within one by the rank that a row is from, then by its token."""
        shard = expert_shard(num_experts, self.rank, self.ranks)
        experts_VK, K = choices.experts_TK, choices.experts_TK.shape[1]
        here_VK = (experts_VK >= shard.start) & (experts_VK < shard.stop)
        local_VK = torch.where(here_VK, experts_VK - shard.start, len(shard))
        if len(self.hops) == 1:  # one exchange delivers in that order
            return sort_slots(local_VK, len(shard))
        by_origin_V = choices.origin_T.argsort(stable=True)
        order = sort_slots(local_VK[by_origin_V], len(shard))
        return SlotOrder(by_origin_V[order.slots_R // K] * K + order.slots_R % K, order.counts_E)

    def _count_saved(self, x_TD: torch.Tensor, routing: Routing, planned: Planned) -> None:
        """By the first hop: on the others there are no tokens without an expert."""
        kept_slots = routing.experts_TK.numel() - routing.dropped_slots - planned.slots
        copies_a_slot = planned.leaving / planned.slots if planned.slots else 1 - 1 / self.ranks
        crossings = (4 if torch.is_grad_enabled() else 2) - self.hops[0].crossings_regardless  # gradients cross too
        row_bytes = self.wire.row_bytes(x_TD.shape[1], x_TD.dtype)
        self.traffic.saved += round(kept_slots * copies_a_slot * row_bytes * crossings)


class _StraightDispatcher(HopDispatcher):
    """One hop, over all ranks."""

    hop: type[AllToAllHop] | type[AllGatherHop]

    def __init__(
        self,
        group: dist.ProcessGroup,
        traffic: Traffic,
        wire: Wire = NATIVE,
        chunks: int = 1,
        ranks_per_node: int | None = None,
    ) -> None:
        """`ranks_per_node`: None where all ranks of `group` are on one."""
        ranks, per_node = group.size(), ranks_per_node or group.size()
        lane = Lane(group, wire, traffic, far_ranks(group, per_node))
        hop = self.hop(lane, Destinations(tuple(range(ranks + 1)), ranks, per_node))
        super().__init__([hop], group.rank(), ranks, chunks, wire, traffic)


class AllToAllDispatcher(_StraightDispatcher):
    """Each rank sends a token to the ranks that hold its experts, once to each."""

    hop = AllToAllHop


class AllGatherDispatcher(_StraightDispatcher):
    """Each rank sends its tokens to all ranks; what comes back is only what experts answered."""

    hop = AllGatherHop


class HierarchicalDispatcher(HopDispatcher):
    """A token goes once to each node that it has experts on, to the rank at the place of its own, and from there on.

    Home the same way: the ranks of a node add up first, and one sum crosses between nodes.
    """

    def __init__(
        self, group: dist.ProcessGroup, nodes: Nodes, traffic: Traffic, wire: Wire = NATIVE, chunks: int = 1
    ) -> None:
        rank, ranks, per_node = group.rank(), group.size(), nodes.ranks_per_node
        hops: list[Hop] = []
        if nodes.between is not None:
            edges = tuple(range(0, ranks + 1, per_node))
            lane = Lane(nodes.between, wire, traffic, (True,) * nodes.between.size())
            hops.append(AllToAllHop(lane, Destinations(edges, ranks)))
        if nodes.inside is not None:
            first = rank - rank % per_node
            lane = Lane(nodes.inside, wire, traffic, (False,) * per_node)
            hops.append(AllToAllHop(lane, Destinations(tuple(range(first, first + per_node + 1)), ranks)))
        super().__init__(hops, rank, ranks, chunks, wire, traffic)


def _cut(tensor: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    return tensor.split(sizes) if len(sizes) > 1 else (tensor,)


def _cut_zero(zero: ZeroComputation, tokens: list[int]) -> list[ZeroComputation]:
    parts = zip(_cut(zero.x_TD, tokens), _cut(zero.experts_TK, tokens), strict=True)
    return [zero._replace(x_TD=x_TD, experts_TK=experts_TK) for x_TD, experts_TK in parts]
