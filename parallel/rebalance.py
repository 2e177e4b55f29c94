"""Experts change ranks between two steps: when that pays, and how weights and optimizer state follow.

The time of a layer goes by its busiest rank. `decide` looks for a placement that gives that rank fewer rows and sets
what this saves against what it costs, both in bytes through the busiest rank's link:

    saved    (rows of the busiest rank before - after) * bytes of a row there and back * steps that are expected of it
    moved    experts that the busiest rank sends or receives * bytes of their weights and state

Compute, which gets evener too, is not counted: where the link is not the bottleneck, moving pays even more. Two kinds
of candidates: the packing of eplb.py with as many experts as possible left where they are, and 1, 2, 3, ... swaps that
each relieve the busiest rank most. With the present placement among them the answer is never worse than that.

What an expert computes does not depend on where it lies, so moving changes no loss but for the order of float sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from expertmesh.parallel.eplb import place_by_load
from expertmesh.parallel.optimizer import AdamState, TrainingOptimizer
from expertmesh.parallel.placement import Placement, expert_shard


@dataclass(frozen=True)
class Prices:
    """What a row and a move cost, in bytes through a rank's link."""

    row_bytes: int
    """Of one row in one step: there and back, and in training their gradients."""
    expert_bytes: int
    """Of all that belongs to one expert: weights, and in training their optimizer state."""
    steps: int
    """How many steps a placement is expected to hold."""


class Decision(NamedTuple):
    """What was found for one layer. `str` tells it in a line for the log."""

    layer: int
    before: Placement
    after: Placement  # `before` itself where nothing better was found, or moving would not pay
    mean_rows: float  # a step and rank
    rows_before: float  # of the busiest rank, a step
    rows_after: float
    moved: int  # experts that some rank has to fetch
    bytes_moved: int  # through the busiest rank's link
    bytes_saved: int  # the same, over the steps that are expected of the placement

    @property
    def moves(self) -> bool:
        return self.after is not self.before

    def __str__(self) -> str:
        busiest = f"layer {self.layer}: the busiest rank has {beside_mean(self.rows_before, self.mean_rows)}"
        if not self.moves:
            return f"{busiest}; no move pays"
        return (
            f"{busiest}; moving {self.moved} experts makes it {beside_mean(self.rows_after, self.mean_rows)}, "
            f"saving {megabytes(self.bytes_saved)} on its link for {megabytes(self.bytes_moved)} of moving"
        )


def beside_mean(rows: float, mean_rows: float) -> str:
    return f"{rows:.0f} rows a step, {rows / max(mean_rows, 1e-9):.2f} times the mean"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB"


def decide(
    layer: int, load_E: Sequence[float], before: Placement, prices: Prices, slots: int | None = None
) -> Decision:
    """The placement that saves most, moving counted.

    Args:
        load_E: rows of each expert a step, as expected from now on.
        slots: how many there may be, of all ranks together; None: as many as now.
    """

    def weigh(after: Placement) -> Decision:
        rows_before, rows_after = max(before.load_of_ranks(load_E)), max(after.load_of_ranks(load_E))
        sent, received = [0] * before.ranks, [0] * before.ranks
        for slot, source in enumerate(sources_of_slots(before, after)):
            there, here = before.rank_of_slot[source], after.rank_of_slot[slot]
            sent[there] += there != here
            received[here] += there != here
        return Decision(
            layer=layer,
            before=before,
            after=after,
            mean_rows=sum(load_E) / before.ranks,
            rows_before=rows_before,
            rows_after=rows_after,
            moved=sum(received),
            bytes_moved=max(sent + received) * prices.expert_bytes,
            bytes_saved=round((rows_before - rows_after) * prices.row_bytes * prices.steps),
        )

    slots, candidates = slots or before.slots, [before, *swaps(load_E, before)]
    if slots % before.ranks == 0:
        candidates.append(settle(place_by_load(load_E, slots, before.ranks), before))
    return max(
        map(weigh, candidates), key=lambda decision: decision.bytes_saved - decision.bytes_moved
    )  # of equals the first


def settle(target: Placement, present: Placement) -> Placement:
    """`target` with its ranks renamed, and its slots in an order, so that much stays where `present` has it.

    Ranks are taken as alike. Pairs of ranks are matched by what they have in common, the most alike first.
    """
    ranks = range(present.ranks)
    wanted, held = [set(target.held(rank)) for rank in ranks], [set(present.held(rank)) for rank in ranks]
    pairs = sorted(((new, old) for new in ranks for old in ranks), key=lambda p: -len(wanted[p[0]] & held[p[1]]))
    becomes: dict[int, int] = {}
    for new, old in pairs:
        if old not in becomes and new not in becomes.values():
            becomes[old] = new
    settled = []
    for rank in ranks:
        here = target.held(becomes[rank])
        kept = {index: expert for index, expert in enumerate(present.held(rank)[: len(here)]) if expert in here}
        others = iter([expert for expert in here if expert not in kept.values()])
        settled.append([kept[index] if index in kept else next(others) for index in range(len(here))])
    return Placement.of_ranks(present.num_experts, settled)


def swaps(load_E: Sequence[float], placement: Placement) -> Iterator[Placement]:
    """What comes of one swap, of two, ..., until none relieves the busiest rank.

    Each swaps an expert of that rank for another rank's, the pair that leaves the busier of these two ranks least.
    """
    each = [load / len(slots) for load, slots in zip(load_E, placement.slots_of_expert, strict=True)]
    experts_P = list(placement.experts_P)
    for _ in range(placement.slots):
        held = [set(placement.held(rank)) for rank in range(placement.ranks)]
        load_R = placement.load_of_ranks(load_E)
        busiest = max(range(placement.ranks), key=lambda rank: load_R[rank])
        best, swap = load_R[busiest] * (1 - 1e-9), None
        for mine in expert_shard(placement.slots, busiest, placement.ranks):
            for other, there in enumerate(placement.rank_of_slot):
                if there == busiest or experts_P[mine] in held[there] or experts_P[other] in held[busiest]:
                    continue
                relief = each[experts_P[mine]] - each[experts_P[other]]
                higher = max(load_R[busiest] - relief, load_R[there] + relief)
                if higher < best:
                    best, swap = higher, (mine, other)
        if swap is None:
            return
        mine, other = swap
        experts_P[mine], experts_P[other] = experts_P[other], experts_P[mine]
        placement = Placement(placement.num_experts, placement.ranks, tuple(experts_P))
        yield placement


def sources_of_slots(before: Placement, after: Placement) -> list[int]:
    """For each slot of `after`, the slot of `before` that it is filled from: one on its own rank if there is one."""
    sources = []
    for slot, expert in enumerate(after.experts_P):
        options = before.slots_of_expert[expert]
        here = [option for option in options if before.rank_of_slot[option] == after.rank_of_slot[slot]]
        sources.append(here[0] if here else options[slot % len(options)])
    return sources


def exchange_slots(held_E: torch.Tensor, before: Placement, after: Placement, group: dist.ProcessGroup) -> torch.Tensor:
    """What this rank's slots hold after the move. A collective of `group`, whose ranks are those of the placements.

    Args:
        held_E: [slots here, ...] what they held before, in the order of `before.held`; any dtype.

    Returns:
        [slots here, ...] in the order of `after.held`.
    """
    me, ranks = group.rank(), range(before.ranks)
    sources = sources_of_slots(before, after)
    first = expert_shard(before.slots, me, before.ranks).start
    leaving = [(after.rank_of_slot[slot], source - first) for slot, source in enumerate(sources)
               if before.rank_of_slot[source] == me]  # fmt: skip
    arriving = [before.rank_of_slot[sources[slot]] for slot in expert_shard(after.slots, me, after.ranks)]
    rows_EX = held_E.flatten(1)
    sent_RX = rows_EX[[index for _, index in leaving]].contiguous()
    received_RX = rows_EX.new_empty(len(arriving), rows_EX.shape[1])
    send_splits = [sum(to == rank for to, _ in leaving) for rank in ranks]
    dist.all_to_all_single(received_RX, sent_RX, [arriving.count(rank) for rank in ranks], send_splits, group=group)
    by_source = sorted(range(len(arriving)), key=lambda slot: arriving[slot])  # stable: by slot within a source
    moved_EX = torch.empty_like(received_RX)
    moved_EX[by_source] = received_RX
    return moved_EX.view(len(arriving), *held_E.shape[1:])


@torch.no_grad()
def move_experts(
    parameters: Iterable[nn.Parameter],
    zero: TrainingOptimizer,
    before: Placement,
    after: Placement,
    group: dist.ProcessGroup,
) -> None:
    """Move the experts of one layer, with all the optimizer knows of them. Every rank of the run calls it.

    Args:
        parameters: [experts here, ...] each; the same on every rank and in the same order. A whole one with its two
            moments, and once more of what arrives, is the memory that this takes.
        zero: made of these parameters, and has made a step.
        group: the ranks that together hold every expert once.
    """
    for parameter in parameters:
        whole = (zero.master(parameter), *zero.state(parameter))
        weight, *moments = (exchange_slots(tensor, before, after, group) for tensor in whole)
        zero.replace(parameter, weight, AdamState(*moments))
