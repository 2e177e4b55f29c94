"""Who is in which group, by arithmetic: what Megatron-Core does when it makes the groups, for any rank of any world.

Ranks are numbered with tensor ranks innermost and stages outermost; experts cut the ranks of a stage another way:

    rank = t + tp (c + cp (d + dp p))                  tensor, context, data, stage
    rank = t' + etp (e + ep (d' + expert-dp p))        expert tensor, expert, expert data, stage
"""

from __future__ import annotations

from expertmesh.parallel.sizes import ParallelSizes


def members(sizes: ParallelSizes, rank: int) -> dict[str, list[int]]:
    """The ranks of each group of `Groups` that `rank` is in, in order; those of one rank are left out.

    Of layers with another expert degree: by the sizes that they have (`sizes.with_expert_degree`).
    """
    dense = {"tensor": sizes.tp, "context": sizes.cp, "batch": sizes.dp, "pipeline": sizes.pp}
    copies = sizes.stage_size // (sizes.etp * sizes.ep)
    experts = {"expert_tensor": sizes.etp, "expert": sizes.ep, "expert_data": copies}
    found = _along(dense, rank) | _along(experts, rank)
    first = rank - rank % sizes.stage_size
    stage = list(range(first, first + sizes.stage_size))
    found["data"] = stage[rank % sizes.tp :: sizes.tp]
    found["token"] = stage
    return {name: ranks for name, ranks in found.items() if len(ranks) > 1}


def _along(degrees: dict[str, int], rank: int) -> dict[str, list[int]]:
    """For each degree, the ranks that differ from `rank` in it alone; the first degree is innermost."""
    found, stride = {}, 1
    for name, size in degrees.items():
        first = rank - rank // stride % size * stride
        found[name] = list(range(first, first + size * stride, stride))
        stride *= size
    return found
