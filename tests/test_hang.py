"""Who holds a job up, and where everybody is: from what heartbeats told."""

from __future__ import annotations

import pytest

from expertmesh.launch.hang import Seen, odd_ones, where_all_are
from expertmesh.parallel.whereabouts import Place

OUT, DISPATCH, SUMS = Place("layer 1 dispatch"), Place("layer 1 dispatch", True), Place("sums of the step", True)


def at(place: Place, step: int = 17, progress: int = 20, silent: bool = False) -> Seen:
    return Seen(step, place, progress, silent)


CASES = [
    (
        "one computes for ever, the others wait for it",
        [at(DISPATCH), at(DISPATCH), at(OUT), at(DISPATCH)],
        [2],
        "rank 2 hung in step 17, outside of any collective, after layer 1 dispatch; "
        "ranks 0, 1, 3 waited in step 17, in layer 1 dispatch",
    ),
    (
        "one is stopped: what it told last is old, and those that wait say more",
        [at(SUMS, step=16, silent=True), at(DISPATCH)],
        [0],
        "rank 0 silent, last heard of in step 16, in sums of the step; rank 1 waited in step 17, in layer 1 dispatch",
    ),
    (
        "silence counts for more than to be in no collective",
        [at(OUT), at(DISPATCH, silent=True)],
        [1],
        "rank 1 silent, last heard of in step 17, in layer 1 dispatch; "
        "rank 0 worked in step 17, outside of any collective, after layer 1 dispatch",
    ),
    (
        "all wait, one of them a step behind",
        [at(DISPATCH), at(SUMS, step=16, progress=19), at(DISPATCH)],
        [1],
        "rank 1 hung in step 16, in sums of the step; ranks 0, 2 waited in step 17, in layer 1 dispatch",
    ),
    (
        "all wait, in two places: nobody can be told from the others",
        [at(DISPATCH), at(SUMS)],
        [0, 1],
        "rank 0 hung in step 17, in layer 1 dispatch; rank 1 hung in step 17, in sums of the step",
    ),
    (
        "nobody was in a collective yet",
        [at(Place(), step=0)] * 2,
        [0, 1],
        "ranks 0, 1 hung in step 0, outside of any collective",
    ),
    (
        "of many, some are named",
        [at(OUT), *[at(DISPATCH)] * 20],
        [0],
        "rank 0 hung in step 17, outside of any collective, after layer 1 dispatch; "
        "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 12 more waited in step 17, in layer 1 dispatch",
    ),
]


@pytest.mark.parametrize("reason, ranks, odd, told", CASES, ids=[reason for reason, *_ in CASES])
def test_who_and_where(reason, ranks, odd, told):
    seen = dict(enumerate(ranks))
    assert odd_ones(seen) == odd
    assert where_all_are(seen, odd) == told
