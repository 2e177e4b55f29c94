"""Which experts are so hot that every rank should have a copy of them in the next step: when that pays.

Ranks wait for the one whose link has most to carry. `choose_copies` sets what copies save on that link against what
they cost on every rank's, both in bytes a step:

    saved    (rows of the busiest rank before - after) * bytes of a row there and back, and of both gradients
    cost     copies * bytes of their weights, and as many of gradients, in each pass

Of T tokens on R ranks, l of which chose each expert of a rank, (R - 1)/R T (1 - product of (1 - l/T)) rows come to that
rank: a token that chose two of its experts comes once. Loads are those of the step before; which experts a token
chooses together is taken for chance. Compute, which gets evener too, is not counted, as in rebalance.py.

Candidates add one copy after the other, each of the hottest expert of the rank that is then the busiest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from expertmesh.parallel.placement import Placement
from expertmesh.parallel.rebalance import beside_mean, megabytes

WORTH_A_CHANGE = 0.1
"""Share of a link's bytes that another choice must save: loads vary from step to step, and a choice should last."""


class CopyPrices(NamedTuple):
    """In bytes through a rank's link, in one step."""

    row_bytes: int
    """Of one row: there and back, and their gradients."""
    copy_bytes: int
    """Of one copy: its weights, and its gradients."""


class CopyDecision(NamedTuple):
    """What was chosen for one layer. `str` tells it in a line for the log."""

    layer: int
    before: tuple[int, ...]
    after: tuple[int, ...]  # the experts that are to have copies, the first the hottest of the busiest rank
    mean_rows: float  # that a rank answers in a step
    rows_without: float  # of the busiest rank, without any copies
    rows_with: float  # of the busiest rank, with those of `after`
    bytes_saved: int  # a step, on the busiest link
    bytes_spent: int

    def __str__(self) -> str:
        busiest = f"layer {self.layer}: the busiest rank has {beside_mean(self.rows_without, self.mean_rows)}"
        if not self.after:
            return f"{busiest}; no copy pays"
        experts = f"expert{'s' if len(self.after) > 1 else ''} {', '.join(map(str, self.after))}"
        return (
            f"{busiest}; copies of {experts} make it {beside_mean(self.rows_with, self.mean_rows)}, "
            f"saving {megabytes(self.bytes_saved)} on its link for {megabytes(self.bytes_spent)} of weights, each step"
        )


def choose_copies(
    layer: int,
    load_E: Sequence[float],
    tokens: float,
    placement: Placement,
    before: tuple[int, ...],
    most: int,
    prices: CopyPrices,
) -> CopyDecision:
    """The copies with which the busiest link carries least, they included; `before` unless others are clearly better.

    Args:
        load_E: tokens that chose each expert in a step, of those on the ranks of `placement`.
        tokens: how many these were.
        before: the experts that have copies now.
        most: how many may have.
    """

    def arrivals(copied: tuple[int, ...]) -> list[float]:
        """Rows that come to each rank from others."""
        share_R = [1 - math.prod(1 - load_E[e] / tokens for e in experts if e not in copied) for experts in held_R]
        return [(1 - 1 / placement.ranks) * tokens * share for share in share_R]

    def weigh(copied: tuple[int, ...]) -> float:
        return max(arrivals(copied)) * prices.row_bytes + len(copied) * prices.copy_bytes

    def busiest_rows(copied: tuple[int, ...]) -> float:
        away_E = [0.0 if expert in copied else load for expert, load in enumerate(load_E)]
        return max(placement.load_of_ranks(away_E)) + sum(load_E[expert] for expert in copied) / placement.ranks

    held_R = [placement.held(rank) for rank in range(placement.ranks)]
    after: tuple[int, ...] = ()
    if tokens:
        candidates = [after]
        while len(candidates) <= most:
            rows_R = arrivals(candidates[-1])
            busiest = max(range(placement.ranks), key=lambda rank: rows_R[rank])
            others = [expert for expert in held_R[busiest] if expert not in candidates[-1]]
            if not others:
                break
            candidates.append((*candidates[-1], max(others, key=lambda expert: load_E[expert])))
        after, present = min(candidates, key=weigh), before[:most]
        if weigh(after) > (1 - WORTH_A_CHANGE) * weigh(present):
            after = present
    return CopyDecision(
        layer=layer,
        before=before,
        after=after,
        mean_rows=sum(load_E) / placement.ranks,
        rows_without=busiest_rows(()),
        rows_with=busiest_rows(after),
        bytes_saved=round((max(arrivals(())) - max(arrivals(after))) * prices.row_bytes) if tokens else 0,
        bytes_spent=len(after) * prices.copy_bytes,
    )
