"""Where experts of an FFN pool go by their load, what that gives, and which copy serves a row."""

from __future__ import annotations

import pytest
import torch

from expertmesh.parallel.placement import Placement
from expertmesh.system.serve.placing import ROWS_WORTH_READING, busiest, choose_copies, place

HOT = [90, 10, 10, 10]  # rows of 4 experts


def test_a_hot_expert_has_a_copy_on_each_worker():
    (placement,) = place({3: HOT}, 2, 1).values()
    assert placement.slots == 6 and [len(slots) for slots in placement.slots_of_expert] == [2, 2, 1, 1]
    assert placement.load_of_ranks(HOT) == [60, 60]


@pytest.mark.parametrize("copies, slots", [(0, 4), (1, 6), (2, 8), (9, 8)], ids=str)
def test_no_worker_holds_an_expert_twice(copies, slots):
    (placement,) = place({0: HOT}, 2, copies).values()
    assert placement.slots == slots


def test_odd_sizes_fill_up_with_copies():
    """7 experts on 3 workers: 3 places each, so two experts are there twice."""
    (placement,) = place({0: [1, 2, 3, 4, 5, 6, 7]}, 3, 0).values()
    assert placement.slots == 9 and {len(slots) for slots in placement.slots_of_expert} == {1, 2}


def test_more_workers_than_experts():
    (placement,) = place({0: [5, 1]}, 3, 0).values()
    assert placement.slots == 3 and len(placement.slots_of_expert[0]) == 2


def test_layers_without_load_stay():
    assert list(place({0: [0, 0], 1: [1, 0]}, 2, 0)) == [1]


def test_the_busiest_worker():
    """Two layers, contiguous: 100 and 20 rows of 120; 2 and 2 of 4."""
    loads = {0: HOT, 1: [1, 1, 1, 1]}
    assert busiest(loads, 2, {}) == (100 + 2) / (60 + 2)
    assert busiest(loads, 2, place(loads, 2, 1)) == 1.0
    assert busiest({0: [0, 0]}, 2, {}) == 1.0


@pytest.mark.parametrize("rows, copies", [(ROWS_WORTH_READING * 3 - 1, 1), (ROWS_WORTH_READING * 3, 2)])
def test_few_rows_wake_one_copy_and_many_are_shared_out(rows, copies):
    """All choose expert 0, which both workers hold."""
    placement = Placement(3, 2, (0, 1, 0, 2))
    slots_TK = choose_copies(torch.zeros(rows, 1, dtype=torch.int64), placement, 0)
    assert len(slots_TK.unique()) == copies and set(slots_TK.unique().tolist()) <= {0, 2}
