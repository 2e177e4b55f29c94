"""Which tokens go to which ranks: a copy to each rank that holds an expert the token chose, and one sum back from it.

A token of several experts on one rank is sent there once, is answered by all of them, and their weighted sum comes
back: no dispatch that computes tokens where their experts are can do with fewer rows.

    experts_TK  [[0, 1], [2, 0], [3, 2]]     4 experts; rank 0 holds 0 and 1, rank 1 holds 2 and 3
    rank 0      tokens 0 1                   rows 0 1
    rank 1      tokens 1 2                   rows 2 3              token 1 is the sum of rows 1 and 2

Where ranks lie on several nodes a sum has two levels: first over the ranks of a node, then over nodes. Rounding depends
on the order of adding, so that is the order by whatever road the rows travel, and a dispatcher that sends a token to a
node once, to be copied there, gives the bits of one that sends it to each rank. Gradients are added up in that order
too.

Legend: T tokens, K choices a token, C chunks, R ranks, U copies, D width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from expertmesh.kernels.combine import combine_rows
from expertmesh.kernels.rows import sum_rows
from expertmesh.kernels.zero_computation import ZeroComputation


class Level(NamedTuple):
    """Copies of some sources; every source has from 0 to K."""

    sources: int
    source_U: torch.Tensor  # int64, of each copy
    slots_U: torch.Tensor  # int64: source * K + how many of its copies come before; see `combine_rows`


class FanOut(NamedTuple):
    """The copies of the tokens of one chunk, sorted by rank, and by token within one."""

    levels: list[Level]  # one; or two: a copy for each node, and of that one for each rank
    splits: list[int]  # copies for each rank

    def copies(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[U, D] what leaves. Not differentiable: its gradient is `sums`."""
        for level in self.levels:
            x_TD = x_TD.index_select(0, level.source_U)
        return x_TD

    def sums(self, rows_UD: torch.Tensor) -> torch.Tensor:
        """[T, D] the sum of the copies of each token; not differentiable."""
        for level in reversed(self.levels):
            rows_UD = sum_rows(rows_UD, level.source_U, level.sources)
        return rows_UD

    def add_up(self, rows_UD: torch.Tensor, weights_TK: torch.Tensor, zero: ZeroComputation | None) -> torch.Tensor:
        """[T, D] as `sums`, differentiable, with the answers of the tokens' zero-computation experts."""
        first, *others = self.levels
        for level in reversed(others):  # of weights_TK only the shape counts: the rows are weighed
            unused_TK = weights_TK.detach().new_empty(level.sources, weights_TK.shape[1])
            rows_UD = combine_rows(rows_UD, level.slots_U, unused_TK, weigh=False)
        return combine_rows(rows_UD, first.slots_U, weights_TK, weigh=False, zero=zero)


class Plan(NamedTuple):
    """The copies of all chunks, before the host knows how many there are."""

    levels: list[tuple[torch.Tensor, torch.Tensor]]
    """`source_U` and `slots_U` of each `Level`, chunk after chunk; sources are numbered within their chunk."""
    copies_CR: torch.Tensor  # int64
    node_copies_C: torch.Tensor  # int64
    slots: torch.Tensor  # int64 []: choices that go to a rank

    def cut(self, copies: list[list[int]], node_copies: list[int], tokens: list[int]) -> list[FanOut]:
        """A fan-out for each chunk, given `copies_CR` and `node_copies_C` as lists, and the tokens of each chunk."""
        counts = [tokens, node_copies, [sum(splits) for splits in copies]]  # of what each level copies, and has
        if len(self.levels) == 1:
            del counts[1]
        by_level = []
        for (source_U, slots_U), (sources, sizes) in zip(self.levels, pairwise(counts), strict=True):
            by_level.append(list(map(Level, sources, source_U.split(sizes), slots_U.split(sizes))))
        return [FanOut(list(levels), splits) for *levels, splits in zip(*by_level, copies, strict=True)]


def plan_copies(
    experts_TK: torch.Tensor, bounds: list[int], ranks_per_node: int, chunks: int, chunk_tokens: int
) -> Plan:
    """Find who is wanted where.

    Args:
        experts_TK: [T, K] int64 ids, not negative.
        bounds: rank r holds the experts from bounds[r] up to bounds[r + 1]; those below the first and from the last on
            are held by none of these ranks, and cost nothing.
        ranks_per_node: these follow one another; divides the ranks. As many as there are, or 1: sums have one level.
        chunks, chunk_tokens: chunk c has the tokens from c * chunk_tokens on; there may be fewer, or none.

    On a GPU this waits for the device once for each level: how many copies there are is a shape.
    """
    (T, K), R, device = experts_TK.shape, len(bounds) - 1, experts_TK.device
    # Of ranks without an expert, which share a bound with the next, `right` skips all but the last.
    holder_TK = torch.searchsorted(torch.tensor(bounds, device=device), experts_TK, right=True)  # 0: before the first
    wanted_TR = torch.zeros(chunks * chunk_tokens, R + 2, dtype=torch.bool, device=device)
    wanted_TR[:T].scatter_(1, holder_TK, True)
    wanted_CTR = wanted_TR[:, 1 : R + 1].view(chunks, chunk_tokens, R)
    chunk_U, rank_U, token_U = wanted_CTR.transpose(1, 2).nonzero().unbind(1)
    counted_CTR = wanted_CTR.long()
    copies_CR = counted_CTR.sum(1)
    slots = ((holder_TK > 0) & (holder_TK <= R)).sum()

    if ranks_per_node in (1, R):
        before_CTR = counted_CTR.cumsum(2) - counted_CTR
        to_ranks = token_U, token_U * K + before_CTR[chunk_U, token_U, rank_U]
        return Plan([to_ranks], copies_CR, copies_CR.sum(1), slots)

    node_wanted_CTN = wanted_CTR.unflatten(2, (-1, ranks_per_node)).any(3).long()
    node_chunk_U, node_token_U, node_U = node_wanted_CTN.nonzero().unbind(1)
    before_CTN = node_wanted_CTN.cumsum(2) - node_wanted_CTN
    to_nodes = node_token_U, node_token_U * K + before_CTN[node_chunk_U, node_token_U, node_U]

    number_CTN = (node_wanted_CTN.flatten(1).cumsum(1) - 1).view_as(node_wanted_CTN)  # of a node's copy, in its chunk
    source_U = number_CTN[chunk_U, token_U, rank_U // ranks_per_node]
    in_node_CTNR = counted_CTR.unflatten(2, (-1, ranks_per_node))
    before_CTR = (in_node_CTNR.cumsum(3) - in_node_CTNR).flatten(2)
    to_ranks = source_U, source_U * K + before_CTR[chunk_U, token_U, rank_U]
    return Plan([to_nodes, to_ranks], copies_CR, node_wanted_CTN.sum((1, 2)), slots)
