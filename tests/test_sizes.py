"""Degrees of parallelism: which fit together, and what is said of those that do not."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from expertmesh.parallel.sizes import ParallelSizes

GOOD = [
    ({}, 1, "alone"),
    ({"dp": 4}, 4, "data parallel: experts are copied"),
    ({"dp": 6, "ep": 3}, 6, "experts twice"),
    ({"tp": 2, "dp": 2, "ep": 4}, 4, "experts spread over both of attention's degrees"),
    ({"tp": 4, "etp": 2, "ep": 2}, 4, "within one tensor group"),
    ({"dp": 4, "etp": 2, "ep": 2}, 4, "experts are cut, attention is not"),
    ({"tp": 2, "cp": 2, "dp": 3, "ep": 12}, 12, "context parallel ranks hold experts too"),
    ({"tp": 2, "pp": 3, "dp": 2, "ep": 4}, 12, "stages multiply, each with all the experts of its layers"),
]


@pytest.mark.parametrize("keys, world, reason", GOOD, ids=[reason for *_, reason in GOOD])
def test_sizes_that_fit(keys, world, reason):
    assert ParallelSizes(**keys).world_size == world


BAD = [
    (
        {"dp": 4, "ep": 3},
        "ep=3 does not divide dp=4; with dp=4, ep may be one of [1, 2, 4]",
        "the user learns what fits",
    ),
    ({"ep": 2}, "ep=2 does not divide dp=1; with dp=1, ep may be one of [1]", "dp was left at its default"),
    (
        {"tp": 2, "dp": 3, "ep": 4},
        "ep=4 does not divide tp=2 x dp=3 = 6; with tp=2 x dp=3 = 6, ep may be one of [1, 2, 3, 6]",
        "the product that is wrong is told",
    ),
    (
        {"tp": 2, "dp": 4, "etp": 2, "ep": 3},
        "etp=2 x ep=3 = 6 does not divide tp=2 x dp=4 = 8; with tp=2 x dp=4 = 8 and etp=2, ep may be one of [1, 2, 4]",
        "both products",
    ),
    ({"tp": 2, "etp": 4}, "etp=4 does not divide tp=2; with tp=2, etp may be one of [1, 2]", "etp alone is too large"),
    ({"pp": 4, "ep": 4}, "ep=4 does not divide dp=1", "the ranks of other stages hold other layers"),
    ({"dp": 0}, "greater than or equal to 1", "no ranks"),
    ({"dp": 2, "ep": 0}, "greater than or equal to 1", "checked before it divides by zero"),
    ({"sp": 2}, "Extra inputs are not permitted", "a degree that does not exist: tokens follow tp"),
    (
        {"dp": 4, "ep": 4, "dispatch": {"ranks_per_node": 3}},
        "dispatch.ranks_per_node=3 does not divide ep=4; it may be one of [1, 2, 4]",
        "nodes of unlike sizes",
    ),
]


@pytest.mark.parametrize("keys, words, reason", BAD, ids=[reason for *_, reason in BAD])
def test_sizes_that_do_not_fit(keys, words, reason):
    with pytest.raises(ValidationError) as error:
        ParallelSizes(**keys)
    (problem,) = error.value.errors()
    assert words in problem["msg"]
