"""Of a job that makes no progress: which rank holds the others up, and where each of them is, in words for a person."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from expertmesh.parallel.whereabouts import Place

NAMED = 8  # ranks of a list that are named


class Seen(NamedTuple):
    """What the last heartbeat of a rank told."""

    step: int
    place: Place
    progress: int  # steps begun, validations, saves
    silent: bool  # there should have been another heartbeat since


def odd_ones(seen: Mapping[int, Seen]) -> list[int]:
    """Those that have fallen silent; else those in no collective, where others are in one and wait; else those that
    have done least; which are all, where nobody can be told from the others."""
    silent = [rank for rank, one in seen.items() if one.silent]
    outside = [rank for rank, one in seen.items() if not one.place.inside]
    if silent or 0 < len(outside) < len(seen):
        return silent or outside
    least = min(one.progress for one in seen.values())
    return [rank for rank, one in seen.items() if one.progress == least]


def where_all_are(seen: Mapping[int, Seen], odd: Iterable[int]) -> str:
    """ "rank 2 hung in step 17, outside of any collective; ranks 0, 1, 3 waited in step 17, in layer 1 dispatch" """
    first = set(odd)
    ranks_at: defaultdict[str, list[int]] = defaultdict(list)
    for rank in sorted(seen, key=lambda rank: (rank not in first, rank)):
        step, place, _, silent = seen[rank]
        did = "silent, last heard of" if silent else "hung" if rank in first else "waited" if place.inside else "worked"
        ranks_at[f"{did} in step {step}, {place}"].append(rank)
    return "; ".join(f"{_named(ranks)} {words}" for words, ranks in ranks_at.items())


def _named(ranks: list[int]) -> str:
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:NAMED]))}{more}"
