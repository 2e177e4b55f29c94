"""Links between attention and FFN workers: the dispatcher of split serving, and the loop that answers it.

A link is a process group of two: attention worker a and FFN worker f. There is no world, so a lost worker breaks only
its own links. Gloo carries CPU tensors; on a GPU rows are copied through the host.

One exchange of a micro-batch at one layer, for each FFN worker that holds an expert some token chose:

    attention -> ffn   header (tag 0): micro-batch, layer, rows for each expert of that worker
    attention -> ffn   rows   (tag 1), sorted by expert
    ffn -> attention   rows   (tag 2 + micro-batch), in the same order

Zero-computation experts send nothing, and a worker none of whose experts were chosen hears nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Lock
from typing import NamedTuple

import torch
import torch.distributed as dist

from expertmesh.kernels.routing import Routing
from expertmesh.kernels.zero_computation import ZeroComputation
from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.dispatchers import Dispatched, ExpertLayer, LocalDispatcher, LocalHandle, rows_to_send
from expertmesh.parallel.placement import largest_shard, shard_sizes

HEADER, ROWS, REPLY = 0, 1, 2
ATTENTION, FFN = 0, 1  # ranks within a link
IDLE = timedelta(days=365)  # how long an FFN worker waits for the next request of a link


def open_link(store: dist.Store, attention: int, ffn: int, side: int, timeout: timedelta) -> dist.ProcessGroup:
    """Join attention worker `attention` and FFN worker `ffn` over `store`; both call it. `timeout`: one exchange."""
    return dist.ProcessGroupGloo(dist.PrefixStore(f"attention{attention}-ffn{ffn}", store), side, 2, timeout)


class LinkBroken(RuntimeError):
    """The other side of a link is gone, or did not answer in time."""


@contextmanager
def _naming(ffn: int) -> Iterator[None]:
    """Gloo tells of an address; whoever reads the error wants to know which worker it was."""
    try:
        yield
    except RuntimeError as error:
        why = "did not answer in time" if "imed out" in str(error) else "is gone"
        raise LinkBroken(f"FFN worker {ffn} {why}") from error


class Sent(NamedTuple):
    """A message on its way; the tensor must live until it has arrived."""

    work: dist.Work
    tensor: torch.Tensor


class LinkHandle(NamedTuple):
    local: LocalHandle
    rows_of_worker: list[int]
    sent: list[list[Sent]]  # to each worker
    like_RD: torch.Tensor  # for dtype, width and device of the answer


class LinkDispatcher:
    """Attention side, for one micro-batch. `links[f]` leads to FFN worker f, who holds shard f of every layer.

    `most_experts`: of any layer, all shards together. Headers have one length, whatever layer they are for.

    The micro-batches of one worker share its compute unit. Whoever runs a forward holds `compute`; waiting for the FFN
    pool lets go of it, and another micro-batch gets its turn.
    """

    def __init__(
        self, links: list[dist.ProcessGroup], micro_batch: int, compute: Lock, traffic: Traffic, most_experts: int
    ) -> None:
        self.links, self.micro_batch, self.compute, self.traffic = links, micro_batch, compute, traffic
        self._most_here = largest_shard(most_experts, len(links))
        self._local = LocalDispatcher()

    def dispatch(self, x_TD: torch.Tensor, routing: Routing, layer: ExpertLayer) -> Dispatched:
        rows_RD, local = rows_to_send(x_TD, routing, layer)
        counts_E = local.order.counts_E
        sizes = shard_sizes(layer.num_experts, len(self.links))
        rows_of_worker = [int(counts.sum()) for counts in counts_E.split(sizes)]
        sent: list[list[Sent]] = []
        parts = zip(self.links, counts_E.split(sizes), rows_RD.split(rows_of_worker), strict=True)
        for ffn, (link, counts, rows) in enumerate(parts):
            sent.append([])
            if len(rows):
                padding = torch.zeros(self._most_here - len(counts), dtype=torch.int64)
                header = torch.cat([torch.tensor([self.micro_batch, layer.layer]), counts.cpu(), padding])
                with _naming(ffn):
                    for tensor, tag in ((header, HEADER), (rows.cpu().contiguous(), ROWS)):
                        sent[ffn].append(Sent(link.send([tensor], FFN, tag), tensor))
        row_bytes = 2 * x_TD.element_size() * x_TD.shape[1]  # there and back
        self.traffic.sent += len(rows_RD) * row_bytes
        self.traffic.saved += (routing.experts_TK.numel() - routing.dropped_slots - len(rows_RD)) * row_bytes
        return Dispatched((), LinkHandle(local, rows_of_worker, sent, rows_RD[:0]))  # no expert is here

    def combine(
        self, answers: Iterable[torch.Tensor], handle: LinkHandle, zero: ZeroComputation | None = None
    ) -> torch.Tensor:
        like, host = handle.like_RD, "cpu"
        replies = [torch.empty(rows, like.shape[1], dtype=like.dtype, device=host) for rows in handle.rows_of_worker]
        waits = [[message.work for message in messages] for messages in handle.sent]
        for ffn, (link, reply) in enumerate(zip(self.links, replies, strict=True)):
            if len(reply):
                with _naming(ffn):
                    waits[ffn].append(link.recv([reply], FFN, REPLY + self.micro_batch))
        self.compute.release()
        try:
            for ffn, works in enumerate(waits):
                with _naming(ffn):
                    for work in works:
                        work.wait()
        finally:
            self.compute.acquire()
        return self._local.combine([torch.cat(replies).to(like.device)], handle.local, zero)


def answer_link(
    link: dist.ProcessGroup,
    experts: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    experts_here: Callable[[int], int],
    most_here: int,
    width: int,
    dtype: torch.dtype,
    device: str,
    compute: Lock,
) -> None:
    """FFN side: answer the exchanges of one link, in order, until the attention worker is gone.

    `experts(layer, rows_RD, counts_E)` computes rows; `compute` is held meanwhile, since links have a thread each.
    `experts_here(layer)` says how many experts of a layer are here, `most_here` is the `largest_shard` of any layer.
    """
    header = torch.empty(2 + most_here, dtype=torch.int64)
    while True:
        try:
            link.recv([header], ATTENTION, HEADER).wait(IDLE)
        except RuntimeError:  # the attention worker closed the link, or died
            return
        micro_batch, layer, *_ = header.tolist()
        counts_E = header[2 : 2 + experts_here(layer)].clone()
        rows_RD = torch.empty(int(counts_E.sum()), width, dtype=dtype)
        link.recv([rows_RD], ATTENTION, ROWS).wait()
        with compute, torch.inference_mode():
            answer_RD = experts(layer, rows_RD.to(device), counts_E.to(device)).cpu().contiguous()
        link.send([answer_RD], ATTENTION, REPLY + micro_batch).wait()
