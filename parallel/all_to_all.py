"""Rows to the ranks that want them: an all-to-all with uneven splits that has a gradient and counts its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class Traffic:
    """Bytes of expert rows since the last `take()`: those handed to other ranks, and those that had no need to be.

    `saved` counts the slots of zero-computation experts. Such a slot stays where its token is; had it gone to an FFN
    expert it would have travelled as often as the slots of this batch that did go to one.
    """

    sent: int = 0
    saved: int = 0

    def take(self) -> tuple[int, int]:
        """Return (sent, saved) and start again from zero."""
        taken = (self.sent, self.saved)
        self.sent = self.saved = 0
        return taken


def remote_share(splits: list[int], rank: int) -> float:
    """The share of rows that leave this rank; with no rows at all, what an even spread would send away."""
    total = sum(splits)
    return 1 - splits[rank] / total if total else 1 - 1 / len(splits)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: torch.Tensor,
        send_splits: list[int],
        receive_splits: list[int],
        group: dist.ProcessGroup,
        traffic: Traffic,
    ) -> torch.Tensor:
        ctx.splits, ctx.group, ctx.traffic = (send_splits, receive_splits), group, traffic
        received_RD = rows_RD.new_empty(sum(receive_splits), rows_RD.shape[1])
        dist.all_to_all_single(received_RD, rows_RD.contiguous(), receive_splits, send_splits, group=group)
        remote_rows = sum(send_splits) - send_splits[group.rank()]
        traffic.sent += remote_rows * rows_RD.element_size() * rows_RD.shape[1]
        return received_RD

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        send_splits, receive_splits = ctx.splits
        grad_RD = _AllToAll.apply(grads[0], receive_splits, send_splits, ctx.group, ctx.traffic)
        return grad_RD, None, None, None, None


def all_to_all(
    rows_RD: torch.Tensor,
    send_splits: list[int],
    receive_splits: list[int],
    group: dist.ProcessGroup,
    traffic: Traffic,
) -> torch.Tensor:
    """Send the first send_splits[0] rows to rank 0, the next to rank 1, ...; return what came, in rank order.

    Every rank of `group` calls it, also with no rows. The gradient goes the same way back.
    """
    return _AllToAll.apply(rows_RD, send_splits, receive_splits, group, traffic)
