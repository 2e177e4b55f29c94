"""Megatron's groups as we hand them around: the members of each, in worlds that exist only in torch's fake backend."""

from __future__ import annotations

import math
from dataclasses import fields
from datetime import timedelta
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from expertmesh.parallel.groups import Groups, build_groups, destroy_groups
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.plan.rehearsal import fake_world


class Case(NamedTuple):
    rank: int
    sizes: dict[str, int]
    members: dict[str, list[int]]  # of each group that is not this rank alone
    reason: str
    experts: tuple[int, ...] = ()  # of each layer
    narrower: dict[int, dict[str, list[int]]] = {}  # by degree, the members of its groups


CASES = [
    Case(0, {}, {}, "alone: no groups at all"),
    Case(
        1,
        {"dp": 2},
        {"batch": [0, 1], "data": [0, 1], "token": [0, 1], "expert_data": [0, 1]},
        "data parallel: experts are copied like everything else",
    ),
    Case(
        1,
        {"dp": 2, "ep": 2},
        {"batch": [0, 1], "data": [0, 1], "token": [0, 1], "expert": [0, 1]},
        "expert parallel: no copies of an expert",
    ),
    Case(
        2,
        {"dp": 4, "ep": 2},
        {"batch": [0, 1, 2, 3], "data": [0, 1, 2, 3], "token": [0, 1, 2, 3], "expert": [2, 3], "expert_data": [0, 2]},
        "both: neighbours share out the experts",
    ),
    Case(
        1,
        {"tp": 2},
        {"tensor": [0, 1], "token": [0, 1], "expert_data": [0, 1]},
        "tensor parallel: the experts, which are not cut, are copied",
    ),
    Case(
        5,
        {"tp": 2, "dp": 4, "ep": 4},
        {
            "tensor": [4, 5],
            "batch": [1, 3, 5, 7],
            "data": [1, 3, 5, 7],
            "token": list(range(8)),
            "expert": [4, 5, 6, 7],
            "expert_data": [1, 5],
        },
        "folding: experts lie across two tensor groups",
    ),
    Case(
        6,
        {"tp": 2, "dp": 4, "ep": 2, "etp": 2},
        {
            "tensor": [6, 7],
            "batch": [0, 2, 4, 6],
            "data": [0, 2, 4, 6],
            "token": list(range(8)),
            "expert": [4, 6],
            "expert_tensor": [6, 7],
            "expert_data": [2, 6],
        },
        "folding: the exchange of rows is among equal places of their tensor groups",
    ),
    Case(
        9,
        {"tp": 2, "cp": 2, "pp": 2, "dp": 2, "ep": 8},
        {
            "tensor": [8, 9],
            "context": [9, 11],
            "pipeline": [1, 9],
            "pipeline_back": [1, 9],
            "ends": [1, 3, 5, 7, 9, 11, 13, 15],
            "batch": [9, 13],
            "data": [9, 11, 13, 15],
            "token": list(range(8, 16)),
            "expert": list(range(8, 16)),
        },
        "context and pipeline: the second stage",
    ),
    Case(
        5,
        {"pp": 3, "dp": 3},
        {"pipeline": [2, 5, 8], "pipeline_back": [2, 5, 8]}
        | dict.fromkeys(("batch", "data", "token", "expert_data"), [3, 4, 5]),
        "in the middle of a pipeline: neither end",
    ),
    Case(
        1023,
        {"dp": 1024, "ep": 64},
        {
            "batch": list(range(1024)),
            "data": list(range(1024)),
            "token": list(range(1024)),
            "expert": list(range(960, 1024)),
            "expert_data": list(range(63, 1024, 64)),
        },
        "a world of 1024",
    ),
    Case(
        6,
        {"dp": 8, "ep": 4},
        {"expert": [4, 5, 6, 7], "expert_data": [2, 6]} | dict.fromkeys(("batch", "data", "token"), list(range(8))),
        "layers of fewer experts, of an odd number, and of one that is cut evenly",
        (4, 2, 3, 6, 8),
        {2: {"expert": [6, 7], "expert_data": [0, 2, 4, 6]}, 1: {"expert_data": list(range(8))}},
    ),
    Case(
        13,
        {"pp": 2, "dp": 8, "ep": 4, "etp": 2},
        {
            **{"pipeline": [5, 13], "pipeline_back": [5, 13], "ends": list(range(16))},
            **dict.fromkeys(("batch", "data", "token"), list(range(8, 16))),
            **{"expert": [9, 11, 13, 15], "expert_tensor": [12, 13]},
        },
        "the same where experts are cut, on the second stage",
        (2, 4, 1),
        {2: {"expert": [13, 15], "expert_data": [9, 13]}, 1: {"expert_data": [9, 11, 13, 15]}},
    ),
    Case(
        100,
        {"dp": 128, "ep": 128},
        {"expert": list(range(128))} | dict.fromkeys(("batch", "data", "token"), list(range(128))),
        "DeepSpeed-MoE's own example",
        (32, 64, 128),
        {
            32: {"expert": list(range(96, 128)), "expert_data": [4, 36, 68, 100]},
            64: {"expert": list(range(64, 128)), "expert_data": [36, 100]},
        },
    ),
]
NAMES = [field.name for field in fields(Groups) if field.name not in ("rank", "interleave", "narrower")]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_members(case):
    sizes = ParallelSizes(**case.sizes)
    with fake_world(case.rank, sizes.world_size):
        groups = build_groups(sizes, case.experts)
        assert groups.narrower.keys() == case.narrower.keys()
        apart = dict.fromkeys(("expert", "expert_data"), [])
        for made, expected in (
            (groups, case.members),
            *((groups.narrower[degree], case.members | apart | its) for degree, its in case.narrower.items()),
        ):
            for name in NAMES:
                group, members = getattr(made, name), expected.get(name, [])
                assert (dist.get_process_group_ranks(group) if group else []) == members, name
        for experts in case.experts:
            assert groups.of_layer(experts).expert_size == math.gcd(experts, sizes.ep)
        assert groups.rank == case.rank
        assert (groups.batch_size, groups.data_size) == (sizes.dp, sizes.cp * sizes.dp)
        assert (groups.tensor_size, groups.token_size) == (sizes.tp, sizes.stage_size)
        assert (groups.expert_size, groups.expert_tensor_size) == (sizes.ep, sizes.etp)
        assert groups.pipeline_size == sizes.pp
        for name in ("batch", "data", "tensor", "expert", "expert_tensor", "expert_data", "pipeline"):
            place = case.members[name].index(case.rank) if name in case.members else 0
            assert getattr(groups, f"{name}_rank") == place, name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_world_of_another_size_is_refused_in_words():
    with fake_world(0, 3), pytest.raises(ValueError, match="the process group has 3 ranks, the recipe asks for 4"):
        build_groups(ParallelSizes(dp=4, ep=2))


def test_one_process_needs_no_groups():
    groups = Groups()
    sizes = (
        groups.batch_size,
        groups.data_size,
        groups.tensor_size,
        groups.token_size,
        groups.expert_size,
        groups.expert_tensor_size,
    )
    assert set(sizes) == {1}
    ranks = (
        groups.rank,
        groups.batch_rank,
        groups.data_rank,
        groups.tensor_rank,
        groups.expert_rank,
        groups.expert_tensor_rank,
    )
    assert set(ranks) == {groups.expert_data_rank} == {0}


def _meet_after_a_failure() -> float:
    """Rank 0 waits for a peer that does not come, and then meets one that has not."""
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    dist.barrier()
    destroy_groups()
    if rank == 0:
        with pytest.raises(RuntimeError):
            alone, short = dist.PrefixStore("alone", store), timedelta(seconds=1)
            dist.init_process_group("gloo", store=alone, rank=0, world_size=2, timeout=short)
        destroy_groups()
    again, long = dist.PrefixStore("again", store), timedelta(seconds=20)
    dist.init_process_group("gloo", store=again, rank=rank, world_size=2, timeout=long)
    met = torch.ones(1)
    dist.all_reduce(met)
    return met.item()


def test_a_rank_whose_world_did_not_come_to_be_meets_new_peers():
    assert run_ranks(_meet_after_a_failure, 2) == [2.0, 2.0]
