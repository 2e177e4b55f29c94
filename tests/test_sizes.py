"""Degrees of parallelism: which fit together, and what is said of those that do not."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from expertmesh.parallel.sizes import ParallelSizes


@pytest.mark.parametrize("dp, ep", [(1, 1), (4, 1), (4, 2), (4, 4), (6, 3)])
def test_sizes_that_fit(dp, ep):
    assert ParallelSizes(dp=dp, ep=ep).world_size == dp


BAD = [
    (
        {"dp": 4, "ep": 3},
        "ep=3 does not divide dp=4; with dp=4, ep may be one of [1, 2, 4]",
        "the user learns what fits",
    ),
    ({"ep": 2}, "ep=2 does not divide dp=1; with dp=1, ep may be one of [1]", "dp was left at its default"),
    ({"dp": 0}, "greater than or equal to 1", "no ranks"),
    ({"dp": 2, "ep": 0}, "greater than or equal to 1", "checked before it divides by zero"),
    (
        {"dp": 4, "ep": 4, "dispatch": {"ranks_per_node": 3}},
        "dispatch.ranks_per_node=3 does not divide ep=4; it may be one of [1, 2, 4]",
        "nodes of unlike sizes",
    ),
    ({"tp": 2}, "Extra inputs are not permitted", "a degree that does not exist (yet)"),
]


@pytest.mark.parametrize("keys, words, reason", BAD, ids=[reason for *_, reason in BAD])
def test_sizes_that_do_not_fit(keys, words, reason):
    with pytest.raises(ValidationError) as error:
        ParallelSizes(**keys)
    (problem,) = error.value.errors()
    assert words in problem["msg"]
