"""From measured load to a placement: hot experts get copies, and copies are spread so that ranks are equally busy.

DeepSeek's expert-parallel load balancer (EPLB) as pure functions of numbers:

    replicate   one copy of each; the next copy goes to the expert whose copies have the most to do each
    pack        copies in falling load, each to the rank with the least so far that has room
    by node     groups of experts are packed onto nodes first, then both steps are done inside each node

The global variant is one node with one group. It suits decoding, the hierarchical one prefill and training with
group-limited routing, where a token's experts lie on few nodes.

One thing differs from DeepSeek's: no rank ever holds an expert twice, since a second copy there helps nobody. So an
expert has at most as many copies as its node has ranks, and where packing would end in a double, two copies change
places. The published example comes out slot by slot (test_eplb.py).

What the load is, the caller chooses: rows, or how often an expert is active at all (`activity`), which is what counts
where few rows are decoded and reading weights takes the time (`placement.place_on_fewest`).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from expertmesh.parallel.placement import Placement


def pack(loads: Sequence[float], bins: int) -> list[list[int]]:
    """The items of each of `bins` bins, all with equally many: in falling load, each to the lightest bin with room."""
    if len(loads) % bins:
        raise ValueError(f"{len(loads)} items do not fill {bins} bins evenly")
    room = len(loads) // bins
    if room == 1:
        return [[item] for item in range(bins)]
    packed: list[list[int]] = [[] for _ in range(bins)]
    lightest = [(0.0, index) for index in range(bins)]  # a heap; equal bins in order
    for item in _falling(loads):
        load, index = heapq.heappop(lightest)
        packed[index].append(item)
        if len(packed[index]) < room:
            heapq.heappush(lightest, (load + loads[item], index))
    return packed


def replicate(loads: Sequence[float], slots: int, most: int) -> list[int]:
    """How many of `slots` copies each expert gets, at least 1 and at most `most`: the busiest copy is always split."""
    copies = [1] * len(loads)
    for _ in range(slots - len(loads)):
        below = [expert for expert in range(len(loads)) if copies[expert] < most]
        copies[max(below, key=lambda expert: loads[expert] / copies[expert])] += 1
    return copies


def spread(loads: Sequence[float], copies: Sequence[int], ranks: int) -> list[list[int]]:
    """The experts of each rank: `pack` of their copies, and no expert twice on one rank."""
    room = sum(copies) // ranks
    each = [load / count for load, count in zip(loads, copies, strict=True)]
    held: list[list[int]] = [[] for _ in range(ranks)]
    load_R = [0.0] * ranks
    for expert in _falling(each):
        for _ in range(copies[expert]):
            open_ranks = [rank for rank in range(ranks) if len(held[rank]) < room]
            free = [rank for rank in open_ranks if expert not in held[rank]]
            if free:
                rank = min(free, key=lambda rank: load_R[rank])
                held[rank].append(expert)
                load_R[rank] += each[expert]
            else:
                _change_places(held, load_R, each, expert, open_ranks[0])
    return held


def _change_places(held: list[list[int]], load_R: list[float], each: list[float], expert: int, here: int) -> None:
    """Rank `here` alone has room, but holds `expert`: one of a rank without moves here, and `expert` takes its place.

    There always is one: the other rank is full and lacks `expert`, so it holds something that `here` does not.
    """
    swaps = [
        (max(load_R[here] + each[other], load_R[there] + each[expert] - each[other]), there, index)
        for there in range(len(held))
        if expert not in held[there]
        for index, other in enumerate(held[there])
        if other not in held[here]
    ]
    _, there, index = min(swaps)
    other = held[there][index]
    held[there][index] = expert
    held[here].append(other)
    load_R[here] += each[other]
    load_R[there] += each[expert] - each[other]


def place_by_load(load_E: Sequence[float], slots: int, ranks: int, *, groups: int = 1, nodes: int = 1) -> Placement:
    """A placement of E experts in `slots` slots on `ranks` ranks that is balanced for `load_E`.

    Args:
        load_E: what each expert had to do, any unit; a moving average of recent steps, say.
        slots: P, of all ranks together; E of them make a permutation without copies.
        groups: equal groups that the experts fall into, in order; each stays on one node if `nodes` divides them.
        nodes: equal runs of ranks that are close to each other.

    Raises:
        ValueError: where the sizes do not divide, or more copies are asked for than ranks can hold apart.
    """
    experts = len(load_E)
    if groups < 1 or nodes < 1 or ranks % nodes or slots % ranks or experts % groups:
        raise ValueError(
            f"{experts} experts in {groups} groups, {slots} slots, {ranks} ranks on {nodes} nodes: "
            "groups must divide experts, ranks divide slots and nodes divide ranks"
        )
    if groups % nodes:
        groups = nodes = 1
    if not experts <= slots <= experts * (ranks // nodes):
        raise ValueError(
            f"slots={slots} for {experts} experts: from {experts}, one each, to {experts * (ranks // nodes)}, "
            "one on each rank of a node"
        )
    size = experts // groups
    load_of_group = [sum(load_E[group * size : (group + 1) * size]) for group in range(groups)]
    held: list[list[int]] = []
    for groups_here in pack(load_of_group, nodes):
        here = [expert for group in groups_here for expert in range(group * size, (group + 1) * size)]
        loads = [load_E[expert] for expert in here]
        copies = replicate(loads, slots // nodes, most=ranks // nodes)
        held += [[here[index] for index in rank] for rank in spread(loads, copies, ranks // nodes)]
    return Placement.of_ranks(experts, held)


def activity(load_E: Sequence[float], rows: int) -> list[float]:
    """The probability that each expert is active in a batch of `rows` rows that fall as `load_E` says.

    Used as a load it balances the number of distinct active experts of each rank: 1 - (1 - p)^rows.
    """
    total = sum(load_E) or 1.0
    return [1 - (1 - load / total) ** rows for load in load_E]


def _falling(loads: Sequence[float]) -> list[int]:
    """Indices in falling load, equals in order."""
    return sorted(range(len(loads)), key=lambda item: -loads[item])
