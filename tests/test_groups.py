"""Megatron's groups as we hand them around: the members of each, in worlds that exist only in torch's fake backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from expertmesh.parallel.groups import Groups, build_groups
from expertmesh.parallel.sizes import ParallelSizes


@contextmanager
def fake_world(rank: int, size: int) -> Iterator[None]:
    from megatron.core import parallel_state

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class Case(NamedTuple):
    rank: int
    dp: int
    ep: int
    data: list[int]
    expert: list[int]
    expert_data: list[int]
    reason: str


CASES = [
    Case(0, 1, 1, [], [], [], "alone: no groups at all"),
    Case(1, 2, 1, [0, 1], [], [0, 1], "data parallel: experts are copied like everything else"),
    Case(1, 2, 2, [0, 1], [0, 1], [], "expert parallel: no copies of an expert"),
    Case(2, 4, 2, [0, 1, 2, 3], [2, 3], [0, 2], "both: neighbours share out the experts"),
    Case(1023, 1024, 64, list(range(1024)), list(range(960, 1024)), list(range(63, 1024, 64)), "a world of 1024"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_members(case):
    with fake_world(case.rank, case.dp):
        groups = build_groups(ParallelSizes(dp=case.dp, ep=case.ep))
        wanted = {"data": case.data, "expert": case.expert, "expert_data": case.expert_data}
        for name, members in wanted.items():
            group = getattr(groups, name)
            assert (dist.get_process_group_ranks(group) if group else []) == members, name
        assert groups.rank == case.rank
        assert (groups.data_size, groups.data_rank) == (case.dp, case.rank)
        assert (groups.expert_size, groups.expert_rank) == (case.ep, case.rank % case.ep)
        assert groups.expert_data_rank == case.rank // case.ep


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_world_of_another_size_is_refused_in_words():
    with fake_world(0, 3), pytest.raises(ValueError, match="the process group has 3 ranks, the recipe asks for 4"):
        build_groups(ParallelSizes(dp=4, ep=2))


def test_one_process_needs_no_groups():
    groups = Groups()
    assert (groups.data_size, groups.expert_size) == (1, 1)
    assert (groups.rank, groups.data_rank, groups.expert_rank, groups.expert_data_rank) == (0, 0, 0, 0)
