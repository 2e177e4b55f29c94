"""Arithmetic gives the groups that Megatron-Core makes."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from expertmesh.parallel.groups import build_groups
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.plan.membership import members
from expertmesh.system.plan.rehearsal import fake_world

NAMES = ["tensor", "context", "pipeline", "batch", "data", "token", "expert", "expert_tensor", "expert_data"]
LAYOUTS = [
    ({}, [0], "one rank"),
    ({"dp": 4, "ep": 2}, [0, 3], "experts twice"),
    ({"tp": 2, "cp": 2, "dp": 2, "ep": 2, "etp": 2}, [0, 5, 7], "every degree of a stage"),
    ({"tp": 2, "pp": 3, "dp": 4, "ep": 4}, [0, 9, 23], "stages of eight"),
    ({"tp": 4, "pp": 4, "cp": 2, "dp": 16, "ep": 32, "etp": 2}, [0, 200, 511], "five hundred"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("sizes, ranks, reason", LAYOUTS, ids=[reason for *_, reason in LAYOUTS])
def test_members_are_megatrons(sizes, ranks, reason):
    layout = ParallelSizes(**sizes)
    for rank in ranks:
        with fake_world(rank, layout.world_size):
            groups = build_groups(layout)
            made = {name: getattr(groups, name) for name in NAMES}
            expected = {name: dist.get_process_group_ranks(group) for name, group in made.items() if group}
        assert members(layout, rank) == expected


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("rank", [0, 13, 31])
def test_members_of_layers_with_other_degrees(rank):
    layout = ParallelSizes(tp=2, pp=2, dp=8, ep=8, etp=2)
    with fake_world(rank, layout.world_size):
        groups = build_groups(layout, (2, 3, 8, 12))
        assert sorted(groups.narrower) == [1, 2, 4]
        for experts in (2, 3, 8, 12):
            of_layer = groups.of_layer(experts)
            made = {name: getattr(of_layer, name) for name in NAMES}
            expected = {name: dist.get_process_group_ranks(group) for name, group in made.items() if group}
            assert members(layout.with_expert_degree(experts), rank) == expected


def test_all_members_of_a_group_have_the_same_one():
    layout = ParallelSizes(tp=2, pp=2, cp=2, dp=8, ep=8, etp=2)
    found = [members(layout, rank) for rank in range(layout.world_size)]
    for rank, groups in enumerate(found):
        for name, ranks in groups.items():
            assert rank in ranks and all(found[other][name] == ranks for other in ranks)
