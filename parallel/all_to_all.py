"""Rows to the ranks that want them, while this rank does something else; with a gradient, and every byte counted.

An exchange is begun by one call and ended by another, and what lies between runs while rows are on the wire:

    ticket = depart(rows, flight)      begins              backward:  ends the exchange of the gradient
    ...                                experts at work                experts' backward at work
    rows = arrive(ticket, flight)      ends                backward:  begins it

The autograd engine runs what it can of the nodes made last, first. So the backward of a forward that overlaps its
exchanges overlaps them too, mirrored, with nothing to arrange; and all ranks, having made their nodes in one order, run
the collectives of the backward in one order.

The ticket has no numbers. It stands for the rows on the way: no one can read a buffer that is not filled yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from expertmesh.parallel.whereabouts import inside
from expertmesh.parallel.wire import NATIVE, Wire


class Taken(NamedTuple):
    """Bytes since the traffic was last asked."""

    sent: int
    saved: int
    far: int


@dataclass
class Traffic:
    """Bytes of expert rows since the last `take()`: those handed to other ranks, and those that had no need to be.

    `sent`: with what belongs to the rows, such as the router's choices, and with weights and gradients of experts whose
    copies keep rows at home (expert_copies.py). `far`: of these, what went to another node.

    `saved` counts the slots of zero-computation experts. Such a slot stays where its token is; had it gone to an FFN
    expert it would have travelled as often as the slots of this batch that did go to one.
    """

    sent: int = 0
    saved: int = 0
    far: int = 0

    def take(self) -> Taken:
        """Return what was counted and start again from zero."""
        taken = Taken(self.sent, self.saved, self.far)
        self.sent = self.saved = self.far = 0
        return taken


class Lane(NamedTuple):
    """What all exchanges of one group have in common."""

    group: dist.ProcessGroup
    wire: Wire
    traffic: Traffic
    far: tuple[bool, ...]  # of each rank of the group: on another node than this one

    def sends(self, rows: list[int], row_bytes: int) -> None:
        """`rows` of so many bytes leave for each rank; those for this rank do not leave."""
        for rank, (count, far) in enumerate(zip(rows, self.far, strict=True)):
            if rank != self.group.rank():
                self.traffic.sent += count * row_bytes
                self.traffic.far += count * row_bytes if far else 0


class Exchange(Protocol):
    """One collective, in two calls. All ranks of the group make both, also with no rows."""

    def start(self, rows_RD: torch.Tensor) -> None: ...

    def finish(self) -> torch.Tensor: ...


Change = Callable[[torch.Tensor], torch.Tensor]


def unchanged(rows_RD: torch.Tensor) -> torch.Tensor:
    return rows_RD


class AllToAll:
    """The first send_splits[0] rows go to rank 0, the next to rank 1, ...; what comes lies in rank order.

    `before` is done to rows that are about to leave, `after` to those that came.
    """

    def __init__(
        self,
        lane: Lane,
        send_splits: list[int],
        receive_splits: list[int],
        before: Change = unchanged,
        after: Change = unchanged,
    ) -> None:
        self.lane, self.send_splits, self.receive_splits = lane, send_splits, receive_splits
        self.before, self.after = before, after

    def start(self, rows_RD: torch.Tensor) -> None:
        packed_SW = self.lane.wire.pack(self.before(rows_RD))
        came_RW = packed_SW.new_empty(sum(self.receive_splits), packed_SW.shape[1])
        splits = self.receive_splits, self.send_splits
        work = dist.all_to_all_single(came_RW, packed_SW, *splits, group=self.lane.group, async_op=True)
        self.lane.sends(self.send_splits, packed_SW.element_size() * packed_SW.shape[1])
        self._on_the_way = work, packed_SW, came_RW, rows_RD.dtype  # what is sent must live until it has left

    def finish(self) -> torch.Tensor:
        work, _, came_RW, dtype = self._on_the_way
        del self._on_the_way
        work.wait()
        return self.after(self.lane.wire.unpack(came_RW, dtype))


class Flight(NamedTuple):
    """Rows there, and their gradients back."""

    there: Exchange
    back: Exchange
    name: str  # in words, for who looks for a hang


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: torch.Tensor, flight: Flight) -> torch.Tensor:
        ctx.flight = flight
        flight.there.start(rows_RD)
        return rows_RD.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *tickets: torch.Tensor) -> Any:
        with inside(f"{ctx.flight.name} of gradients"):
            return ctx.flight.back.finish(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: torch.Tensor, flight: Flight) -> torch.Tensor:
        ctx.flight = flight
        with inside(flight.name):
            return flight.there.finish()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.flight.back.start(grads[0])
        return grads[0].new_empty(0), None


def depart(rows_RD: torch.Tensor, flight: Flight) -> torch.Tensor:
    """Begin to send; returns the ticket for `arrive`. A flight is used once."""
    return _Depart.apply(rows_RD, flight)


def arrive(ticket: torch.Tensor, flight: Flight) -> torch.Tensor:
    """Wait for the rows that `flight` brings."""
    return _Arrive.apply(ticket, flight)


def all_to_all(
    rows_RD: torch.Tensor,
    send_splits: list[int],
    receive_splits: list[int],
    group: dist.ProcessGroup,
    traffic: Traffic,
    name: str,
) -> torch.Tensor:
    """Send the first send_splits[0] rows to rank 0, the next to rank 1, ...; return what came, in rank order.

    Every rank of `group` calls it, also with no rows, and waits. The gradient goes the same way back.
    `name`: in words, for who looks for a hang.
    """
    lane = Lane(group, NATIVE, traffic, (False,) * group.size())
    flight = Flight(AllToAll(lane, send_splits, receive_splits), AllToAll(lane, receive_splits, send_splits), name)
    return arrive(depart(rows_RD, flight), flight)
