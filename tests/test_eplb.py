"""Placements from load: DeepSeek's published example slot by slot, the steps by hand, and what must hold of any."""

from __future__ import annotations

import random

import pytest

from expertmesh.parallel.eplb import activity, pack, place_by_load, replicate, spread
from expertmesh.parallel.placement import Placement

# Of the README of github.com/deepseek-ai/EPLB: two layers of 12 experts in 4 groups, 16 slots, 2 nodes, 8 GPUs.
PUBLISHED = [
    (
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    ),
    (
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ),
]


@pytest.mark.parametrize("load_E, slots", PUBLISHED, ids=["first layer", "second layer"])
def test_the_published_example(load_E, slots):
    assert list(place_by_load(load_E, 16, 8, groups=4, nodes=2).experts_P) == slots


def test_pack_by_hand():
    # 9 to bin 0, 7 to bin 1, 5 to bin 1 (7 < 9), which is full; the rest to bin 0.
    assert pack([5, 9, 1, 7], 2) == [[1, 2], [3, 0]]
    assert pack([4, 4, 4, 4], 2) == [[0, 2], [1, 3]], "equals in order"
    assert pack([1, 2, 3], 3) == [[0], [1], [2]], "with room for one, each stays where it is"
    with pytest.raises(ValueError, match="3 items do not fill 2 bins evenly"):
        pack([1, 2, 3], 2)


def test_replicate_by_hand():
    # 12 -> 6 + 6; then 7 -> 3.5 + 3.5; then 6 + 6 -> 4 + 4 + 4.
    assert replicate([12, 7, 1], 6, most=9) == [3, 2, 1]
    assert replicate([12, 7, 1], 6, most=2) == [2, 2, 2], "no more copies than ranks"
    assert replicate([0, 0], 3, most=2) == [2, 1], "no load at all"


def test_spread_changes_places_rather_than_hold_an_expert_twice():
    # Falling load a copy: 0 0 | 1 | 2: rank 0 and 1 take 0; 1 and 2 fill them. Then 3's copies: both must be apart.
    held = spread([8, 6, 4, 2], [1, 1, 1, 3], 3)
    assert sorted(held[0] + held[1] + held[2]) == [0, 1, 2, 3, 3, 3]
    assert all(3 in rank for rank in held)


@pytest.mark.parametrize(
    "experts, slots, ranks, groups, nodes, message",
    [
        (8, 9, 2, 1, 1, "ranks divide slots"),
        (8, 8, 4, 3, 1, "groups must divide experts"),
        (8, 8, 4, 4, 3, "nodes divide ranks"),
        (8, 4, 4, 1, 1, "slots=4 for 8 experts: from 8, one each, to 32"),
        (4, 20, 4, 1, 1, "slots=20 for 4 experts: from 4, one each, to 16"),
        (4, 12, 4, 2, 2, "slots=12 for 4 experts: from 4, one each, to 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(experts, slots, ranks, groups, nodes, message):
    with pytest.raises(ValueError, match=message):
        place_by_load([1.0] * experts, slots, ranks, groups=groups, nodes=nodes)


def random_load(lots: random.Random, experts: int) -> list[float]:
    kind = lots.choice(["even", "skewed", "one hot", "none", "ties"])
    if kind == "skewed":
        return [lots.paretovariate(1.2) for _ in range(experts)]
    if kind == "ties":
        return [float(lots.randint(0, 2)) for _ in range(experts)]
    hot = lots.randrange(experts)
    return [{"even": 1.0, "none": 0.0}.get(kind, float(expert == hot)) for expert in range(experts)]


def test_what_holds_of_any_placement():
    """`Placement` itself refuses a missing expert and one that is twice on a rank."""
    lots = random.Random(3)
    for _ in range(150):
        nodes, ranks_of_node, groups_of_node = lots.randint(1, 3), lots.randint(1, 4), lots.randint(1, 3)
        ranks, groups = nodes * ranks_of_node, nodes * groups_of_node
        experts = groups * ranks_of_node * lots.randint(1, 3)
        room = lots.randint(experts // ranks, experts // nodes)
        load_E = random_load(lots, experts)
        placement = place_by_load(load_E, room * ranks, ranks, groups=groups, nodes=nodes)
        assert placement.slots == room * ranks and len(placement.held(0)) == room
        copies = [len(slots) for slots in placement.slots_of_expert]
        assert max(copies) <= ranks_of_node
        size = experts // groups
        for group in range(groups):  # on one node, equally many groups on each
            slots = [s for e in range(group * size, (group + 1) * size) for s in placement.slots_of_expert[e]]
            assert len({placement.rank_of_slot[slot] // ranks_of_node for slot in slots}) == 1
        # No copy of an expert that could have been split has more than twice what the least busy split one has.
        each = [load / count for load, count in zip(load_E, copies, strict=True)]
        if nodes == 1 and max(copies) > 1:
            split = min(each[e] * copies[e] / (copies[e] - 1) for e in range(experts) if copies[e] > 1)
            assert all(each[e] <= split + 1e-9 for e in range(experts) if copies[e] < ranks)


def test_balance_beside_the_plain_contiguous_placement():
    """With copies never worse on skewed loads; without, greedy packing may be: a caller compares (rebalance.py)."""
    lots, worse = random.Random(4), 0
    for _ in range(150):
        load_E = [lots.paretovariate(1.1) for _ in range(16)]
        plain = max(Placement.contiguous(16, 4).load_of_ranks(load_E))
        assert max(place_by_load(load_E, 24, 4).load_of_ranks(load_E)) <= plain + 1e-9
        worse += max(place_by_load(load_E, 16, 4).load_of_ranks(load_E)) > plain + 1e-9
    assert worse / 150 < 0.02


def test_activity():
    assert activity([1, 3, 0], 1) == [0.25, 0.75, 0.0]
    assert activity([1, 1], 2) == [0.75, 0.75]
    assert activity([0, 0], 4) == [0, 0]
