"""Experts move only where that pays, and then everything that belongs to them arrives."""

from __future__ import annotations

import random

import pytest
import torch
from ranks import run_threads

from expertmesh.parallel.eplb import place_by_load
from expertmesh.parallel.placement import Placement, expert_shard
from expertmesh.parallel.rebalance import Prices, decide, exchange_slots, settle, sources_of_slots, swaps

PLAIN = Placement.contiguous(4, 2)
CHEAP = Prices(row_bytes=100, expert_bytes=10, steps=10)


def test_a_decision_by_hand():
    # Rank 0 has 50 + 40, rank 1 has 20 + 10. Swapping 0 and 2 leaves 60 and 60; so would 1 and 3.
    decision = decide(3, [50, 40, 20, 10], PLAIN, CHEAP)
    assert sorted(decision.after.load_of_ranks([50, 40, 20, 10])) == [60, 60]
    assert (decision.moves, decision.rows_before, decision.rows_after, decision.moved) == (True, 90, 60, 2)
    assert decision.bytes_saved == 30 * 100 * 10 and decision.bytes_moved == 10
    assert str(decision) == (
        "layer 3: the busiest rank has 90 rows a step, 1.50 times the mean; moving 2 experts makes it 60 rows a step, "
        "1.00 times the mean, saving 0.03 MB on its link for 1e-05 MB of moving"
    )


@pytest.mark.parametrize(
    "load_E, prices, reason",
    [
        ([30, 30, 30, 30], CHEAP, "nothing to gain"),
        ([0, 0, 0, 0], CHEAP, "no rows at all"),
        ([100, 0, 0, 0], CHEAP, "one expert has all: where it lies makes no difference"),
        ([50, 40, 20, 10], Prices(row_bytes=100, expert_bytes=30_000, steps=10), "moving costs just what it saves"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_staying(load_E, prices, reason):
    decision = decide(0, load_E, PLAIN, prices)
    assert decision.after is PLAIN and not decision.moves and decision.bytes_saved == decision.bytes_moved == 0
    assert str(decision).endswith("; no move pays")


def test_copies_for_a_service_that_may_have_them():
    decision = decide(0, [100, 10, 10, 10], PLAIN, CHEAP, slots=6)
    assert decision.after.slots == 6 and decision.rows_after == pytest.approx(65)
    # Expert 0 gets a copy on rank 1. The sixth slot, for a copy of 1, and 3's move: 50 + 5 + 10 rows each.
    assert decision.after.held(0) == (0, 1, 2) and sorted(decision.after.held(1)) == [0, 1, 3]
    assert decision.moved == 3


def test_decisions_are_never_worse_and_moves_pay():
    lots = random.Random(5)
    for _ in range(60):
        ranks, room = lots.randint(2, 4), lots.randint(1, 4)
        experts = ranks * room
        load_E = [lots.paretovariate(1.1) for _ in range(experts)]
        before = Placement(experts, ranks, tuple(lots.sample(range(experts), experts)))
        prices = Prices(row_bytes=1000, expert_bytes=lots.choice([0, 300, 10**9]), steps=1)
        decision = decide(0, load_E, before, prices)
        assert max(decision.after.load_of_ranks(load_E)) == decision.rows_after <= decision.rows_before
        if decision.moves:
            assert decision.bytes_saved > decision.bytes_moved
        assert not (decision.moves and prices.expert_bytes == 10**9)
        for after, earlier in zip([*swaps(load_E, before)], [before, *swaps(load_E, before)], strict=False):
            assert sum(a != b for a, b in zip(after.experts_P, earlier.experts_P, strict=True)) == 2


def test_settling_keeps_what_can_stay():
    target = Placement(4, 2, (2, 3, 1, 0))
    assert settle(target, PLAIN) == PLAIN, "the same sets of experts under other names"
    assert settle(Placement(4, 2, (3, 1, 2, 0)), PLAIN) == Placement(4, 2, (3, 1, 2, 0)), "1 and 2 keep their slots"
    # Rank 1 of the target is more like rank 0 now; what stays there keeps its slot, and so does 3, in the last one.
    assert settle(Placement(4, 2, (2, 3, 0, 0, 2, 1)), PLAIN) == Placement(4, 2, (0, 1, 2, 2, 3, 0))
    lots, fetched = random.Random(6), [0, 0]
    for _ in range(50):
        before = place_by_load([lots.random() for _ in range(12)], 16, 4)
        wanted = place_by_load([lots.random() for _ in range(12)], 16, 4)
        settled = settle(wanted, before)
        assert sorted(map(sorted, map(settled.held, range(4)))) == sorted(map(sorted, map(wanted.held, range(4))))
        for which, placement in enumerate((settled, wanted)):
            for slot, source in enumerate(sources_of_slots(before, placement)):
                fetched[which] += before.rank_of_slot[source] != placement.rank_of_slot[slot]
    assert fetched[0] < 0.8 * fetched[1], fetched


MOVES = [
    (PLAIN, PLAIN, "nobody moves"),
    (PLAIN, Placement(4, 2, (3, 1, 2, 0)), "a swap"),
    (PLAIN, Placement(4, 2, (3, 2, 1, 0)), "all change"),
    (PLAIN, Placement(4, 2, (1, 0, 2, 3)), "only the order"),
    (PLAIN, Placement(4, 2, (2, 0, 1, 3, 0, 2)), "copies are made"),
    (Placement(4, 2, (2, 0, 1, 3, 0, 2)), PLAIN, "copies are given up"),
    (Placement.contiguous(3, 3), Placement(3, 3, (1, 2, 0)), "in a ring"),
]


@pytest.mark.parametrize("before, after, reason", MOVES, ids=[reason for *_, reason in MOVES])
def test_everything_arrives(before, after, reason):
    def held(placement: Placement, rank: int) -> torch.Tensor:
        return torch.tensor(placement.held(rank))[:, None, None] * 10.0 + torch.arange(6.0).view(2, 3)

    def rank_main(group) -> None:
        moved = exchange_slots(held(before, group.rank()), before, after, group)
        assert torch.equal(moved, held(after, group.rank()))

    run_threads(rank_main, before.ranks)
    for rank in range(after.ranks):  # nothing crosses that is there already
        shard = expert_shard(after.slots, rank, after.ranks)
        for slot in shard:
            source = sources_of_slots(before, after)[slot]
            assert (before.rank_of_slot[source] == rank) == (after.experts_P[slot] in before.held(rank))
