"""Every expert has its slots on the right ranks, and each choice goes to a slot that holds the expert it chose."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from expertmesh.parallel.placement import (
    Placement,
    expert_shard,
    place_on_fewest,
    place_slots,
    place_slots_ref,
    shard_sizes,
)

CASES = [
    (8, 1, [8], "one rank holds all"),
    (8, 4, [2, 2, 2, 2], "even"),
    (8, 3, [2, 3, 3], "uneven by one"),
    (3, 5, [0, 1, 0, 1, 1], "fewer experts than ranks: some hold none"),
    (0, 2, [0, 0], "no experts"),
    (160, 7, [22, 23, 23, 23, 23, 23, 23], "a large layer"),
]


@pytest.mark.parametrize("experts, size, sizes, reason", CASES, ids=[reason for *_, reason in CASES])
def test_shards_share_out_all_experts_in_order(experts, size, sizes, reason):
    shards = [expert_shard(experts, rank, size) for rank in range(size)]
    assert [expert for shard in shards for expert in shard] == list(range(experts))
    assert shard_sizes(experts, size) == [len(shard) for shard in shards] == sizes
    placement = Placement.contiguous(experts, size)
    assert [placement.held(rank) for rank in range(size)] == [tuple(shard) for shard in shards]


COPIES = Placement(4, 2, (2, 0, 3, 2, 1, 0))


def test_what_a_placement_says_of_itself():
    assert (COPIES.held(0), COPIES.held(1)) == ((2, 0, 3), (2, 1, 0))
    assert COPIES.slots_of_expert == ((1, 5), (4,), (0, 3), (2,))
    assert COPIES.rank_of_slot == (0, 0, 0, 1, 1, 1)
    # Rank 0: half of 2, half of 0, all of 3.
    assert COPIES.load_of_ranks([10, 20, 40, 5]) == [20 + 5 + 5, 20 + 20 + 5]
    assert Placement.of_ranks(4, [(2, 0, 3), (2, 1, 0)]) == COPIES
    assert Placement(3, 2, (0, 1, 2)).held(1) == (1, 2), "uneven ranks, as links have them"


@pytest.mark.parametrize(
    "experts_P, message",
    [
        ((0, 1, 2, 2), "expert 3 has no slot"),
        ((0, 1, 2, 4), "expert 4 does not exist"),
        ((0, 0, 1, 1, 2, 3), "rank 0 holds an expert twice"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(experts_P, message):
    with pytest.raises(ValueError, match=message):
        Placement(4, 2, experts_P)


def test_copies_take_turns_by_token_and_by_rank():
    chosen_TK = torch.tensor([[2, 1], [2, 0], [2, 4], [6, 2]])  # 4: zero-computation, 6: dropped
    assert place_slots(chosen_TK, COPIES).tolist() == [[0, 4], [3, 5], [0, 6], [8, 3]]
    assert place_slots(chosen_TK, COPIES, source=1).tolist() == [[3, 4], [0, 1], [3, 6], [8, 0]]


def random_placement(lots: random.Random) -> Placement:
    ranks = lots.randint(1, 4)
    experts = ranks * lots.randint(1, 3)
    room = lots.randint(experts // ranks, experts)
    held = [set(shard) for shard in (expert_shard(experts, rank, ranks) for rank in range(ranks))]
    for here in held:
        here.update(lots.sample(sorted(set(range(experts)) - here), room - len(here)))
    return Placement.of_ranks(experts, [lots.sample(sorted(here), room) for here in held])


SIZES = [(0, 2, "no tokens"), (1, 1, "one token, k = 1"), (17, 3, "odd")]


@pytest.mark.parametrize("choice", [place_slots, place_on_fewest], ids=lambda choice: choice.__name__)
@pytest.mark.parametrize("tokens, top_k, reason", SIZES, ids=[reason for *_, reason in SIZES])
def test_every_choice_goes_to_a_slot_of_its_expert(choice, tokens, top_k, reason):
    lots = random.Random(1)
    for _ in range(50):
        placement, source = random_placement(lots), lots.randint(0, 3)
        ids = placement.num_experts + 3
        chosen_TK = torch.tensor([lots.choices(range(ids), k=top_k) for _ in range(tokens)], dtype=torch.int64)
        chosen_TK = chosen_TK.view(tokens, top_k)
        placed_TK = choice(chosen_TK, placement, source)
        expert_of_slot = torch.tensor([*placement.experts_P, *range(placement.num_experts, ids)])
        assert torch.equal(expert_of_slot[placed_TK], chosen_TK)
        if choice is place_slots:
            assert torch.equal(placed_TK, place_slots_ref(chosen_TK, placement, source))


def busiest(slots: set[int], placement: Placement) -> int:
    """The most slots of any rank."""
    return max(sum(placement.rank_of_slot[slot] == rank for slot in slots) for rank in range(placement.ranks))


def test_fewest_active_experts_beside_the_best_of_all_choices():
    """Greedy, so not always the best; but near, and never worse than taking turns."""
    lots, worse, cases = random.Random(2), 0, 200
    for _ in range(cases):
        placement = random_placement(lots)
        active = lots.sample(range(placement.num_experts), lots.randint(1, placement.num_experts))
        chosen_TK = torch.tensor(lots.choices(active, k=12)).view(6, 2)
        options = [placement.slots_of_expert[expert] for expert in set(chosen_TK.flatten().tolist())]
        if max(map(len, options)) ** len(options) > 500:
            options = options[:4]
            chosen_TK = chosen_TK[torch.isin(chosen_TK, torch.tensor([placement.experts_P[o[0]] for o in options]))]
            chosen_TK = chosen_TK[:, None]
        best = min(busiest(set(slots), placement) for slots in itertools.product(*options))
        greedy = busiest(set(place_on_fewest(chosen_TK, placement).flatten().tolist()), placement)
        turns = busiest(set(place_slots(chosen_TK, placement).flatten().tolist()), placement)
        assert greedy <= min(turns, best + 1)
        worse += greedy > best
    assert worse / cases < 0.05


def test_no_experts_at_all():
    nothing = Placement.contiguous(0, 2)
    for choice in (place_slots, place_on_fewest):
        assert choice(torch.tensor([[0, 3]]), nothing).tolist() == [[0, 3]]
