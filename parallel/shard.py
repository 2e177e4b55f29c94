"""Which part of a full tensor a rank holds: the contract that checkpoints and initial weights rest on.

A layer that splits a weight over ranks marks its parameter once; every reader of weights asks the mark:

    parameter [4, 2] of full [8, 2]       Shard(dim=0, rank=1, of=2)       full[4:8, :]

No mark: the rank holds the tensor whole. Parts of one tensor are equal in size and lie in rank order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

Shape = tuple[int, ...]


class Shard(NamedTuple):
    """The part number `rank` of `of` equal ones along `dim` of a tensor."""

    dim: int = 0
    rank: int = 0
    of: int = 1

    def full_shape(self, part: Shape) -> Shape:
        """The shape of the tensor of which a part has the shape `part`."""
        return tuple(size * self.of if dim == self.dim else size for dim, size in enumerate(part))

    def place(self, part: Shape) -> tuple[slice, ...]:
        """Where a part of that shape lies in the full tensor."""
        first = self.rank * part[self.dim] if part else 0
        return tuple(slice(first, first + size) if dim == self.dim else slice(0, size) for dim, size in enumerate(part))


WHOLE = Shard()


def mark(parameter: nn.Parameter, shard: Shard) -> None:
    """Say which part of a full tensor `parameter` is; of stacked experts, which part of each one's tensor."""
    parameter.shard = shard  # type: ignore[attr-defined]


def shard_of(parameter: nn.Parameter) -> Shard:
    """What `mark` said of `parameter`; WHOLE if nothing."""
    return getattr(parameter, "shard", WHOLE)


def gather_parts(part: torch.Tensor, group: dist.ProcessGroup | None, to: int) -> list[torch.Tensor]:
    """The parts of all ranks of `group`, in rank order, on its rank `to`; an empty list on the others.

    A collective: every rank of `group` calls it. None: `part` alone.
    """
    if group is None:
        return [part]
    parts = [torch.empty_like(part) for _ in range(group.size())] if group.rank() == to else []
    dist.gather(part.contiguous(), parts or None, group=group, group_dst=to)
    return parts
