"""Layouts to change to: the copies of an expert stay as many, and what the model cannot have is not offered."""

from __future__ import annotations

import pytest

from expertmesh.launch.layouts import scaled, smaller_layouts
from expertmesh.parallel.sizes import ParallelSizes

SCALED = [
    ({"dp": 2, "ep": 2}, 4, {"dp": 4, "ep": 4}, "twice the ranks"),
    ({"dp": 2, "ep": 2}, 1, {"dp": 1, "ep": 1}, "back to one"),
    ({"dp": 4, "ep": 2}, 4, {"dp": 8, "ep": 4}, "two copies of each expert stay two"),
    ({"tp": 2, "dp": 2, "ep": 4}, 2, {"tp": 2, "dp": 1, "ep": 2}, "dense weights split, too"),
    ({"dp": 4, "ep": 2, "etp": 2}, 1, {"dp": 2, "ep": 1, "etp": 2}, "experts split themselves"),
]


@pytest.mark.parametrize("sizes, wanted, expected, reason", SCALED, ids=[row[-1] for row in SCALED])
def test_scaled(sizes, wanted, expected, reason):
    assert scaled(ParallelSizes(**sizes), wanted) == ParallelSizes(**expected)


def test_a_size_that_attention_does_not_fit():
    with pytest.raises(ValueError, match="3 workers are no multiple of tp x cp = 2"):
        scaled(ParallelSizes(tp=2, dp=2, ep=4), 3)


def test_smaller_layouts_keep_as_much_as_may_be():
    found = smaller_layouts(ParallelSizes(dp=4, ep=4), lambda sizes: 12 % sizes.dp == 0 and 8 % sizes.ep == 0)
    assert [(sizes.dp, sizes.ep) for sizes in found] == [(3, 1), (2, 2), (1, 1)]


def test_nothing_is_smaller_than_one():
    assert smaller_layouts(ParallelSizes(), lambda sizes: True) == ()
