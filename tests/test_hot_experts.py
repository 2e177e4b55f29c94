"""Which experts get copies: what the busiest link carries, counted by hand, and when a change is worth it."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from expertmesh.parallel.hot_experts import WORTH_A_CHANGE, CopyPrices, choose_copies
from expertmesh.parallel.placement import Placement

FREE, FAIR, DEAR = CopyPrices(10, 0), CopyPrices(10, 1000), CopyPrices(10, 10**6)
FOUR = Placement.contiguous(4, 2)
EVEN, HOT, TWO_HOT, ALL_ON_ONE = [250.0] * 4, [900.0, 100, 100, 100], [50.0, 900, 800, 50], [0.0, 1000, 0, 0]
CASES = [
    (EVEN, FOUR, 2, FAIR, (), "what is even stays as it is"),
    (HOT, FOUR, 2, FAIR, (0,), "one hot expert"),
    (HOT, FOUR, 2, DEAR, (), "weights that cost more than they save"),
    (HOT, FOUR, 0, FREE, (), "none are allowed"),
    (TWO_HOT, FOUR, 2, FAIR, (1, 2), "one on each rank: either alone saves nothing much"),
    (TWO_HOT, FOUR, 1, FAIR, (), "and only one may have a copy"),
    (ALL_ON_ONE, FOUR, 4, FAIR, (1,), "all tokens on one expert: others need none"),
    ([0.0] * 4, FOUR, 2, FREE, (), "no load, no copies, though they be free"),
    (HOT, Placement(4, 2, (1, 2, 3, 0)), 1, FAIR, (0,), "wherever the expert lies"),
    (EVEN, FOUR, 9, FREE, (0, 2, 1, 3), "free copies: of all, whatever is allowed"),
    ([900.0, 100, 100], Placement.contiguous(3, 4), 1, FAIR, (0,), "a rank without experts"),
]


@pytest.mark.parametrize(
    "load_E, placement, most, prices, expected", [case[:5] for case in CASES], ids=[c[5] for c in CASES]
)
def test_who_is_copied(load_E, placement, most, prices, expected):
    assert choose_copies(3, load_E, 1000, placement, (), most, prices).after == expected


def test_the_bytes_of_the_busiest_link_by_hand():
    """A token of both experts of a rank comes to it once; half of the tokens are there already."""
    decision = choose_copies(3, HOT, 1000, FOUR, (), 1, FAIR)
    without, others = 500 * (1 - 0.1 * 0.9), 500 * (1 - 0.9 * 0.9)  # then expert 1 alone brings rows to rank 0
    assert decision.bytes_saved == round((without - others) * 10)
    assert decision.bytes_spent == 1000
    assert (decision.mean_rows, decision.rows_without, decision.rows_with) == (600, 1000, 450 + 200)


def test_a_decision_explains_itself():
    assert str(choose_copies(3, HOT, 1000, FOUR, (), 1, FAIR)) == (
        "layer 3: the busiest rank has 1000 rows a step, 1.67 times the mean; copies of expert 0 make it 650 rows a "
        "step, 1.08 times the mean, saving 0.0036 MB on its link for 0.001 MB of weights, each step"
    )
    assert "; copies of experts 1, 2 make it" in str(choose_copies(3, TWO_HOT, 1000, FOUR, (), 2, FAIR))
    assert str(choose_copies(3, EVEN, 1000, FOUR, (0,), 2, DEAR)) == (
        "layer 3: the busiest rank has 500 rows a step, 1.00 times the mean; no copy pays"
    )


def test_a_choice_lasts_until_another_is_clearly_better():
    bit_more = [500.0, 505.0, 300, 300]
    assert choose_copies(0, bit_more, 1000, FOUR, (), 1, FREE).after == (1,)
    assert choose_copies(0, bit_more, 1000, FOUR, (0,), 1, FREE).after == (0,)
    assert choose_copies(0, [100.0, 900, 100, 100], 1000, FOUR, (0,), 1, FREE).after == (1,)
    assert choose_copies(0, EVEN, 1000, FOUR, (0,), 1, DEAR).after == (), "what no longer pays goes"
    assert choose_copies(0, TWO_HOT, 1000, FOUR, (1, 2), 1, FREE).after in ((1,), (2,)), "fewer are allowed now"


def busiest_link(load_E: list[float], placement: Placement, copied: tuple[int, ...]) -> float:
    """Rows that come to the rank to which most come, of 1000 tokens."""
    kept = [[load_E[expert] for expert in placement.held(r) if expert not in copied] for r in range(placement.ranks)]
    return max((1 - 1 / placement.ranks) * 1000 * (1 - math.prod(1 - load / 1000 for load in held)) for held in kept)


def test_beside_the_best_of_all_sets():
    """Copy by copy is as good as any set of so many in nearly all random cases, and never much worse."""
    lots, short = random.Random(1), []
    for _ in range(200):
        load_E, placement = [1000 * lots.random() ** 4 for _ in range(6)], Placement.contiguous(6, 3)
        found = choose_copies(0, load_E, 1000, placement, (), 2, FREE)
        links = [busiest_link(load_E, placement, copied) for copied in itertools.combinations(range(6), 2)]
        without = busiest_link(load_E, placement, ())
        assert found.bytes_saved == round((without - busiest_link(load_E, placement, found.after)) * FREE.row_bytes)
        short.append(busiest_link(load_E, placement, found.after) / min(links) - 1)
    assert sum(excess > WORTH_A_CHANGE for excess in short) <= 2
    assert max(short) < 0.5
