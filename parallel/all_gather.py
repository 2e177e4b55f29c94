"""Rows of every rank to all ranks, each of which keeps those that it wants.

All-gather has no splits to agree on, and one size for all: a rank with fewer rows than the most sends zeros with them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn import functional

from expertmesh.parallel.all_to_all import Lane


def all_gather(rows_RD: torch.Tensor, most_rows: int, group: dist.ProcessGroup) -> torch.Tensor:
    """[ranks * most_rows, D]: the rows of all ranks in rank order, each padded with zeros; not differentiable."""
    return _finish(*_start(rows_RD, most_rows, group))


class AllGather:
    """An `Exchange`: brings the rows `wanted_V` of all ranks' rows, each rank padded to `most_rows`."""

    def __init__(self, lane: Lane, most_rows: int, wanted_V: torch.Tensor) -> None:
        self.lane, self.most_rows, self.wanted_V = lane, most_rows, wanted_V

    def start(self, rows_RD: torch.Tensor) -> None:
        packed_RW = self.lane.wire.pack(rows_RD)
        self._on_the_way = _start(packed_RW, self.most_rows, self.lane.group), rows_RD.dtype
        self.lane.sends([self.most_rows] * self.lane.group.size(), packed_RW.element_size() * packed_RW.shape[1])

    def finish(self) -> torch.Tensor:
        started, dtype = self._on_the_way
        del self._on_the_way
        return self.lane.wire.unpack(_finish(*started).index_select(0, self.wanted_V), dtype)


def _start(
    rows_RD: torch.Tensor, most_rows: int, group: dist.ProcessGroup
) -> tuple[dist.Work | None, torch.Tensor, torch.Tensor]:
    padded_RD = functional.pad(rows_RD, (0, 0, 0, most_rows - len(rows_RD)))
    all_RD = padded_RD.new_empty(group.size() * most_rows, padded_RD.shape[1])
    work = dist.all_gather_single(all_RD, padded_RD, group=group, async_op=True) if most_rows else None
    return work, padded_RD, all_RD


def _finish(work: dist.Work | None, padded_RD: torch.Tensor, all_RD: torch.Tensor) -> torch.Tensor:
    if work is not None:
        work.wait()
    return all_RD
