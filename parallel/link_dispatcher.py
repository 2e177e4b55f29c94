"""The dispatcher of split serving: rows leave for the FFN pool, and other micro-batches compute until they are back.

Zero-computation experts send nothing, and a worker none of whose experts were chosen is not asked. FFN worker f of F
holds shard f of every layer (placement.expert_shard).

Legend: T tokens, U tokens sent to one worker, K choices a token, E FFN experts of a layer, F workers, R rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from expertmesh.kernels.combine import combine_rows
from expertmesh.kernels.routing import Routing, SlotOrder, sort_slots
from expertmesh.kernels.zero_computation import ZeroComputation
from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.dispatchers import Dispatched, Dispatcher, ExpertLayer
from expertmesh.parallel.exchange import FORMS, Answered, BroadcastParts, Layout, RoutedParts, hear_answer
from expertmesh.parallel.link import LastingLink, naming
from expertmesh.parallel.placement import expert_shard, shard_sizes
from expertmesh.parallel.timeline import Turns, now


@dataclass
class Shared:
    """What all micro-batches of one attention worker share, whichever FFN pool they ask."""

    layout: Layout
    turns: Turns
    traffic: Traffic


class _Sent(NamedTuple):
    """What was asked of the workers at one layer."""

    layer: int
    routing: Routing
    order: SlotOrder | None  # of a routed exchange
    tokens_U: torch.Tensor | None  # of a broadcast one
    rows: list[int]  # that each worker answers
    departed: list[int]  # when each was asked
    like_TD: torch.Tensor


class _LinkDispatcher:
    """For one micro-batch. `links[f]` leads to FFN worker f; whoever runs a forward has a turn of `shared.turns`."""

    def __init__(self, links: list[LastingLink], micro_batch: int, shared: Shared) -> None:
        self.links, self.micro_batch, self.shared = links, micro_batch, shared

    def _dispatched(self, sent: _Sent) -> Dispatched:
        return Dispatched((), sent)  # no expert is here

    def _count(self, sent_bytes: int, rows: int, routing: Routing, width: int) -> None:
        """`saved`: what the slots of zero-computation experts would have cost, there and back."""
        traffic, layout = self.shared.traffic, self.shared.layout
        row_bytes = layout.wire.row_bytes(width, layout.dtype) + layout.dtype.itemsize * width
        traffic.sent += sent_bytes
        traffic.saved += (routing.experts_TK.numel() - routing.dropped_slots - rows) * row_bytes

    def _replies(self, sent: _Sent, width: int) -> list[torch.Tensor]:
        """What each worker answers: [rows, D], one after the other in one tensor. Others compute meanwhile."""
        dtype, turns = sent.like_TD.dtype, self.shared.turns
        whole_RD = torch.empty(sum(sent.rows), width, dtype=dtype, pin_memory=sent.like_TD.is_cuda)
        answers = list(whole_RD.split(sent.rows))
        with turns.others(self.micro_batch, sent.layer):
            for ffn, answer in enumerate(answers):
                if len(answer):
                    with naming(ffn):
                        answered = self._hear(self.links[ffn], answer)
                    self._note(ffn, sent.layer, sent.departed[ffn], now(), *answered)
        return answers

    @staticmethod
    def _hear(link: LastingLink, answer: torch.Tensor) -> Answered:
        """From whoever is FFN worker now. Raises OSError when nobody is for too long."""
        while True:
            try:
                return hear_answer(link, answer)
            except OSError as error:
                link.renew(error)

    def _note(self, ffn: int, layer: int, departed: int, arrived: int, waited: int, worked: int) -> None:
        """A round trip on the timeline: half of the wire, the worker's wait and work, the other half."""
        wire = max(0, arrived - departed - waited - worked)
        there = departed + wire // 2
        add = self.shared.turns.timeline.add
        add(f"wire {ffn}", self.micro_batch, layer, departed, there)
        add(f"wait {ffn}", self.micro_batch, layer, there, there + waited)
        add(f"ffn {ffn}", self.micro_batch, layer, there + waited, there + waited + worked)
        add(f"wire {ffn}", self.micro_batch, layer, there + waited + worked, arrived)


class RoutedLinkDispatcher(_LinkDispatcher):
    """A token goes to the workers that hold one of its experts, once to each; a row comes back for each choice."""

    def dispatch(self, x_TD: torch.Tensor, routing: Routing, layer: ExpertLayer) -> Dispatched:
        order = sort_slots(routing.experts_TK, layer.num_experts)
        counts_E = order.counts_E.to("cpu", torch.int32)
        tokens_R = order.slots_R // routing.experts_TK.shape[1]
        shares = counts_E.split(shard_sizes(layer.num_experts, len(self.links)))
        rows = [int(counts.sum()) for counts in shares]
        departed, sent_bytes = [], 0
        for ffn, (counts, mine_R) in enumerate(zip(shares, tokens_R.split(rows), strict=True)):
            departed.append(now())
            if len(mine_R):
                tokens_U, index_R = _each_once(mine_R, len(x_TD))
                parts = RoutedParts(x_TD[tokens_U], index_R.to("cpu", torch.int32), counts.contiguous())
                with naming(ffn):
                    FORMS["routed"].ask(self.links[ffn], layer, parts, self.shared.layout)
                sent_bytes += self._bytes(len(tokens_U), len(mine_R), x_TD.shape[1])
        self._count(sent_bytes, len(tokens_R), routing, x_TD.shape[1])
        return self._dispatched(_Sent(layer.layer, routing, order, None, rows, departed, x_TD))

    def combine(
        self, answers: Iterable[torch.Tensor], handle: _Sent, zero: ZeroComputation | None = None
    ) -> torch.Tensor:
        assert handle.order is not None
        like = handle.like_TD
        replies = self._replies(handle, like.shape[1])
        rows_RD = torch.cat([like[:0], *(reply.to(like.device) for reply in replies)])
        return combine_rows(rows_RD, handle.order.slots_R, handle.routing.weights_TK, True, zero)

    def _bytes(self, tokens: int, rows: int, width: int) -> int:
        layout = self.shared.layout
        there = tokens * layout.wire.row_bytes(width, layout.dtype) + 4 * rows
        return there + rows * width * layout.dtype.itemsize


class BroadcastLinkDispatcher(_LinkDispatcher):
    """Every token that chose an FFN expert goes to every worker, which answers with one sum for each."""

    def dispatch(self, x_TD: torch.Tensor, routing: Routing, layer: ExpertLayer) -> Dispatched:
        routed_TK = routing.experts_TK < layer.num_experts
        tokens_U = routed_TK.any(1).nonzero()[:, 0]
        rows = int(routed_TK.sum())
        holders = [len(expert_shard(layer.num_experts, f, len(self.links))) > 0 for f in range(len(self.links))]
        departed, sent_bytes, width = [], 0, x_TD.shape[1]
        parts = BroadcastParts(
            x_TD[tokens_U],
            routing.experts_TK[tokens_U].to("cpu", torch.int32),
            routing.weights_TK[tokens_U].to("cpu", torch.float32),
        )
        for ffn, link in enumerate(self.links):
            departed.append(now())
            if holders[ffn] and len(tokens_U):
                with naming(ffn):
                    FORMS["broadcast"].ask(link, layer, parts, self.shared.layout)
                sent_bytes += self._bytes(len(tokens_U), routing.experts_TK.shape[1], width)
        self._count(sent_bytes, rows, routing, width)
        answered = [len(tokens_U) * holds for holds in holders]
        return self._dispatched(_Sent(layer.layer, routing, None, tokens_U, answered, departed, x_TD))

    def combine(
        self, answers: Iterable[torch.Tensor], handle: _Sent, zero: ZeroComputation | None = None
    ) -> torch.Tensor:
        assert handle.tokens_U is not None
        like = handle.like_TD
        replies = [reply for reply in self._replies(handle, like.shape[1]) if len(reply)]
        y_TD = torch.zeros_like(like)
        if replies:
            summed_UD = torch.stack([reply.to(like.device).float() for reply in replies]).sum(0)
            y_TD.index_copy_(0, handle.tokens_U, summed_UD.to(like.dtype))
        return y_TD if zero is None else y_TD + zero.answer(handle.routing.weights_TK)

    def _bytes(self, tokens: int, choices: int, width: int) -> int:
        layout = self.shared.layout
        return tokens * (layout.wire.row_bytes(width, layout.dtype) + 8 * choices + width * layout.dtype.itemsize)


DISPATCHERS: dict[str, Callable[[list[LastingLink], int, Shared], Dispatcher]] = {
    "routed": RoutedLinkDispatcher,
    "broadcast": BroadcastLinkDispatcher,
}


def _each_once(tokens_R: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of tokens that repeat: each once, in rising order; and which of those each row is."""
    present_T = torch.zeros(tokens, dtype=torch.bool, device=tokens_R.device)
    present_T[tokens_R] = True
    return present_T.nonzero()[:, 0], (present_T.cumsum(0) - 1)[tokens_R]
