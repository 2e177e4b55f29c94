"""The tokens between two halves of a block, spread over the ranks that share those halves' weights.

Sequence parallelism (arXiv 2205.05198, section 4.2.2). Norms, residuals, routers and dispatch work on a rank's own
T/tp tokens; a half whose weights are split needs all T, and gives partial sums of all T:

    x [T/tp] --gather--> x [T] --heads or units of this rank--> part of y [T] --reduce-scatter, summed--> y [T/tp]

The gradient of one map is the other. Together they move what the all-reduce of plain tensor parallelism moves, and
what lies between two halves is stored once and not tp times. So tensor parallelism has no other form here: with
experts it is what keeps a token from being dispatched tp times, and each expert-parallel exchange is among ranks that
hold different tokens.

Megatron's own maps name CUDA, so these are ours. Legend: T tokens of a data-parallel rank, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from expertmesh.parallel.whereabouts import inside


class TokenSplit:
    """The tokens of one data-parallel rank lie on the ranks of `group` in equal runs, in rank order. None: one rank.

    `kind`: of these ranks; with it, and with `where` in the model they meet ("layer 3"), a hang is told.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, kind: str = "tensor") -> None:
        self.group, self.kind = group, kind

    def gather(self, x_TD: torch.Tensor, where: str = "") -> torch.Tensor:
        """From this rank's tokens to all: [T/tp, ...] -> [T, ...]. Its gradient is summed and cut up again."""
        return x_TD if self.group is None else _Gather.apply(x_TD, _Meeting(self.group, self.kind, where))

    def reduce_scatter(self, x_TD: torch.Tensor, where: str = "") -> torch.Tensor:
        """From parts of a sum to this rank's tokens of it: [T, ...] -> [T/tp, ...]. Its gradient is gathered."""
        return x_TD if self.group is None else _ReduceScatter.apply(x_TD, _Meeting(self.group, self.kind, where))

    def mine(self, x_TD: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of something that every rank has, without a gradient."""
        if self.group is None:
            return x_TD
        each = _share(len(x_TD), self.group)
        return x_TD[self.group.rank() * each :][:each]


class _Meeting(NamedTuple):
    group: dist.ProcessGroup
    kind: str
    where: str

    def named(self, what: str) -> inside:
        return inside(f"{self.where} {what} among {self.kind} ranks".lstrip())


def _share(tokens: int, group: dist.ProcessGroup) -> int:
    assert tokens % group.size() == 0, f"{tokens} tokens over {group.size()} ranks"
    return tokens // group.size()


# A collective over nothing is left out: the ranks of a group have as many tokens each, so all of them leave it out.


def _gather(x_TD: torch.Tensor, meeting: _Meeting, what: str) -> torch.Tensor:
    all_TD = x_TD.new_empty(len(x_TD) * meeting.group.size(), *x_TD.shape[1:])
    if x_TD.numel():
        with meeting.named(what):
            dist.all_gather_single(all_TD, x_TD.contiguous(), group=meeting.group)
    return all_TD


def _reduce_scatter(x_TD: torch.Tensor, meeting: _Meeting, what: str) -> torch.Tensor:
    mine_TD = x_TD.new_empty(_share(len(x_TD), meeting.group), *x_TD.shape[1:])
    if x_TD.numel():
        with meeting.named(what):
            dist.reduce_scatter_single(mine_TD, x_TD.contiguous(), group=meeting.group)
    return mine_TD


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, meeting: _Meeting) -> torch.Tensor:
        ctx.meeting = meeting
        return _gather(x_TD, meeting, "gather")

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _reduce_scatter(grads[0], ctx.meeting, "reduce-scatter of gradients"), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, meeting: _Meeting) -> torch.Tensor:
        ctx.meeting = meeting
        return _reduce_scatter(x_TD, meeting, "reduce-scatter")

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _gather(grads[0], ctx.meeting, "gather of gradients"), None
