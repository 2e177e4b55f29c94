"""One leg of a token's way to its experts: over one process group, in chunks, there and back.

A hop takes tokens with what the router chose for them, and hands out, on each rank of its group, those that have an
expert there, or behind there. On the way back, the rows of a token are added up where it came from. A dispatcher is a
list of hops: one over all expert ranks; or one between nodes and one inside the node.

    plan      who goes where, agreed by all ranks: counts, and one wait for the device
    depart    the rows of a chunk leave, and with them their choices                           (does not block)
    arrive    they are there
    leave     the answers leave for home                                                       (does not block)
    home      they are there, and summed

Expert ids stay what they are on all hops. A row has K of them wherever it goes; those held elsewhere are passed over.

Legend: T tokens, K choices a token, C chunks, R ranks, U copies that leave, V rows that arrive, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from expertmesh.kernels.zero_computation import ZeroComputation
from expertmesh.parallel.all_gather import AllGather, all_gather
from expertmesh.parallel.all_to_all import AllToAll, Exchange, Flight, Lane, arrive, depart
from expertmesh.parallel.fan_out import FanOut, plan_copies
from expertmesh.parallel.whereabouts import inside
from expertmesh.parallel.wire import NATIVE


class Choices(NamedTuple):
    """What the router decided for some rows, and whence they are."""

    experts_TK: torch.Tensor  # int64
    weights_TK: torch.Tensor  # float32, with a gradient
    origin_T: torch.Tensor  # int64: sorting by it (stable) gives the order of ranks, then tokens


class Decided:
    """The ids and origins that come with the weights of a chunk."""

    experts_VK: torch.Tensor
    origin_V: torch.Tensor

    def read(self, packed_VC: torch.Tensor, source_V: torch.Tensor, sources: int) -> torch.Tensor:
        """Keep them out of what `packed` made, given the rank that each row came from; returns the weights."""
        K = packed_VC.shape[1] // 2
        weights_VK, experts_VK, origin_V1 = packed_VC.split([K, K, 1], dim=1)
        self.experts_VK, self.origin_V = experts_VK.long(), origin_V1[:, 0].long() * sources + source_V
        return weights_VK.contiguous().view(torch.float32)


def packed(weights_TK: torch.Tensor, experts_TK: torch.Tensor, origin_T: torch.Tensor) -> torch.Tensor:
    """int32 [T, 2 K + 1]: what goes with a row, in one message; weights keep their bits."""
    assert weights_TK.dtype is torch.float32, f"router weights are {weights_TK.dtype}"
    return torch.cat([weights_TK.contiguous().view(torch.int32), experts_TK.int(), origin_T[:, None].int()], dim=1)


class Passage:
    """One chunk of layer `layer` on one hop. `lane` carries rows; choices are never narrowed."""

    def __init__(
        self, lane: Lane, fan: FanOut, came: list[int], decided: Decided, rows: Exchange, choices: Exchange, layer: int
    ) -> None:
        self._fan, self._decided = fan, decided
        exact = lane._replace(wire=NATIVE)
        there, home = f"layer {layer} dispatch", f"layer {layer} combine"
        self._rows = Flight(rows, AllToAll(lane, came, fan.splits, after=fan.sums), there)
        self._choices = Flight(choices, AllToAll(exact, came, fan.splits, after=fan.sums), there)
        self._answers = Flight(AllToAll(lane, came, fan.splits), AllToAll(lane, fan.splits, came), home)

    def depart(self, x_TD: torch.Tensor, weights_TK: torch.Tensor) -> None:
        self._weights_TK = weights_TK
        self._tickets = depart(x_TD, self._rows), depart(weights_TK, self._choices)

    def arrive(self) -> tuple[torch.Tensor, Choices]:
        """The rows [V, D] that came, by source rank and token, and their choices."""
        for_rows, for_choices = self._tickets
        x_VD, weights_VK = arrive(for_rows, self._rows), arrive(for_choices, self._choices)
        return x_VD, Choices(self._decided.experts_VK, weights_VK, self._decided.origin_V)

    def leave(self, answers_VD: torch.Tensor) -> None:
        self._ticket = depart(answers_VD, self._answers)

    def home(self, zero: ZeroComputation | None) -> torch.Tensor:
        """[T, D] the sum for each token of the chunk; with the answers of its zero-computation experts."""
        return self._fan.add_up(arrive(self._ticket, self._answers), self._weights_TK, zero)


class Planned(NamedTuple):
    passages: list[Passage]  # of each chunk
    tokens: list[int]  # of each chunk
    slots: int  # choices that go to a rank of the hop
    leaving: int  # copies that go to other ranks


class Hop(Protocol):
    """See the top of this file."""

    crossings_regardless: int
    """Of a row's crossings (there, back, their gradients), those that it makes though no expert wants it."""

    def plan(self, choices: Choices, layer: int, num_experts: int, chunks: int) -> Planned:
        """All ranks of the group call it together, and afterwards use the passages in the same order."""
        ...


class Destinations(NamedTuple):
    """What lies behind each rank of a hop's group, in rank order."""

    edges: tuple[int, ...]  # behind rank d lie the expert ranks from edges[d] up to edges[d + 1]
    ranks: int  # that hold experts, in all
    ranks_per_node: int = 1  # of the group, where its sums have two levels

    def bounds(self, num_experts: int) -> list[int]:
        """The experts behind each: contiguous shards, as of `placement.expert_shard`."""
        return [num_experts * edge // self.ranks for edge in self.edges]


class AllToAllHop:
    """Each row goes where it is wanted, once. Dropless: splits follow the routing."""

    crossings_regardless = 0

    def __init__(self, lane: Lane, to: Destinations) -> None:
        self.lane, self.to = lane, to

    def plan(self, choices: Choices, layer: int, num_experts: int, chunks: int) -> Planned:
        lane, exact = self.lane, self.lane._replace(wire=NATIVE)
        ranks, device = lane.group.size(), choices.experts_TK.device
        each = -(-len(choices.experts_TK) // chunks)
        tokens = chunk_sizes(len(choices.experts_TK), each, chunks)
        bounds = self.to.bounds(num_experts)
        copies = plan_copies(choices.experts_TK, bounds, self.to.ranks_per_node, chunks, each)
        leave_RC = copies.copies_CR.T.contiguous()
        come_RC = torch.empty_like(leave_RC)
        with inside(f"layer {layer} counts"):
            dist.all_to_all_single(come_RC, leave_RC, group=lane.group)
        leave, node_copies, come, slots = _lists(copies.copies_CR, copies.node_copies_C, come_RC.T, copies.slots)

        passages = []
        fans = copies.cut(leave, node_copies, tokens)
        parts = choices.experts_TK.split(tokens), choices.origin_T.split(tokens)
        for fan, came, experts_TK, origin_T in zip(fans, come, *parts, strict=True):
            decided = Decided()
            rows = AllToAll(lane, fan.splits, came, before=fan.copies)

            def pack(weights_TK: torch.Tensor, fan=fan, experts_TK=experts_TK, origin_T=origin_T) -> torch.Tensor:
                return fan.copies(packed(weights_TK, experts_TK, origin_T))

            source_V = torch.arange(ranks, device=device).repeat_interleave(torch.tensor(came, device=device))
            read = partial(decided.read, source_V=source_V, sources=ranks)
            there = AllToAll(exact, fan.splits, came, pack, read)
            passages.append(Passage(lane, fan, came, decided, rows, there, layer))
        return Planned(passages, tokens, slots, _leaving(leave, lane))


class AllGatherHop:
    """All rows go to all ranks, and each keeps what it wants; home comes only what was wanted.

    Choices go to all ranks too, and each works out from them who sends how many rows home. It suits few ranks and many
    choices a token, where most rows are wanted everywhere.
    """

    crossings_regardless = 1

    def __init__(self, lane: Lane, to: Destinations) -> None:
        self.lane, self.to = lane, to

    def plan(self, choices: Choices, layer: int, num_experts: int, chunks: int) -> Planned:
        lane, group, device = self.lane, self.lane.group, choices.experts_TK.device
        T, K = choices.experts_TK.shape
        tokens_R = torch.empty(group.size(), dtype=torch.int64, device=device)
        with inside(f"layer {layer} counts"):
            dist.all_gather_single(tokens_R, torch.tensor([T], device=device), group=group)
        most = int(tokens_R.max())
        each = -(-most // chunks)
        tokens = chunk_sizes(T, each, chunks)

        mine = packed(choices.weights_TK.detach(), choices.experts_TK, choices.origin_T)
        lane.sends([chunks * each] * group.size(), mine.element_size() * mine.shape[1])
        with inside(f"layer {layer} choices"):
            all_RC = all_gather(mine, chunks * each, group)
        all_CRt = all_RC.view(group.size(), chunks, each, 2 * K + 1).transpose(0, 1)
        bounds = self.to.bounds(num_experts)
        first, last = bounds[group.rank()], bounds[group.rank() + 1]
        experts_CRtK = all_CRt[..., K : 2 * K]
        exists_CRt = torch.arange(chunks * each, device=device).view(chunks, 1, each) < tokens_R[:, None]
        wanted_CRt = ((experts_CRtK >= first) & (experts_CRtK < last)).any(3) & exists_CRt
        chunk_V, source_V, token_V = wanted_CRt.nonzero().unbind(1)

        copies = plan_copies(choices.experts_TK, bounds, self.to.ranks_per_node, chunks, each)
        leave, node_copies, come, slots = _lists(
            copies.copies_CR, copies.node_copies_C, wanted_CRt.sum(2), copies.slots
        )
        passages = []
        fans = copies.cut(leave, node_copies, tokens)
        sizes = [sum(came) for came in come]
        of_chunk = all_CRt[chunk_V, source_V, token_V].split(sizes), source_V.split(sizes), token_V.split(sizes)
        for fan, came, packed_V, of_rank_V, place_V in zip(fans, come, *of_chunk, strict=True):
            decided = Decided()
            rows = AllGather(lane, each, of_rank_V * each + place_V)
            here = Here(decided.read(packed_V, of_rank_V, group.size()))
            passages.append(Passage(lane, fan, came, decided, rows, here, layer))
        return Planned(passages, tokens, slots, _leaving(leave, lane))


class Here:
    """An `Exchange` of what has come already."""

    def __init__(self, rows_VD: torch.Tensor) -> None:
        self._rows_VD = rows_VD

    def start(self, rows_RD: torch.Tensor) -> None:
        pass

    def finish(self) -> torch.Tensor:
        return self._rows_VD


def chunk_sizes(tokens: int, each: int, chunks: int) -> list[int]:
    """The tokens of each chunk: `each` as long as there are any."""
    return [min(each, max(0, tokens - chunk * each)) for chunk in range(chunks)]


def _leaving(copies: list[list[int]], lane: Lane) -> int:
    return sum(count for splits in copies for rank, count in enumerate(splits) if rank != lane.group.rank())


def _lists(*tensors: torch.Tensor) -> list[Any]:
    """Each as a list, with one wait for the device."""
    flat = torch.cat([tensor.flatten() for tensor in tensors]).cpu().split([tensor.numel() for tensor in tensors])
    return [values.view(tensor.shape).tolist() for values, tensor in zip(flat, tensors, strict=True)]
