"""Sequences over context-parallel ranks: who has which positions, and keys put together in order, with gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from numerics import assert_close
from ranks import run_threads

from expertmesh.parallel.sequence_split import SequenceSplit

CPU = torch.device("cpu")


def test_each_rank_has_a_run_from_either_end():
    def rank_main(group: dist.ProcessGroup) -> list[int]:
        return SequenceSplit(group, 12).positions_C(CPU).tolist()

    assert run_threads(rank_main, 3) == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]


def test_causal_attention_costs_all_ranks_the_same():
    def rank_main(group: dist.ProcessGroup) -> int:
        return int((SequenceSplit(group, 32).positions_C(CPU) + 1).sum())  # keys that the queries here see

    assert run_threads(rank_main, 4) == [32 * 33 // 2 // 4] * 4


CASES = [
    (2, 3, 8, (3,), "several sequences"),
    (3, 1, 6, (2, 2), "one position a run"),
    (2, 0, 4, (3,), "no sequences"),
]


@pytest.mark.parametrize("ranks, sequences, length, width, reason", CASES, ids=[reason for *_, reason in CASES])
def test_what_is_cut_is_put_together_in_order(ranks, sequences, length, width, reason):
    torch.manual_seed(0)
    x_TX = torch.randn(sequences * length, *width, dtype=torch.float64)
    weights = torch.randn(ranks, sequences * length, *width, dtype=torch.float64)

    def rank_main(group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        split = SequenceSplit(group, length)
        mine_TX = split.mine(x_TX).clone().requires_grad_()
        all_TX = split.gather(mine_TX)
        (all_TX * weights[group.rank()]).sum().backward()
        return all_TX.detach(), mine_TX.grad, split.mine(weights.sum(0))

    for all_TX, grad, wanted in run_threads(rank_main, ranks):
        assert torch.equal(all_TX, x_TX)
        assert_close(grad, wanted, what="gradient")


def test_alone_a_rank_has_all_positions():
    split, x_TX = SequenceSplit(None, 5), torch.randn(10, 2)
    assert split.positions_C(CPU).tolist() == [0, 1, 2, 3, 4]
    assert split.mine(x_TX) is split.gather(x_TX) is x_TX
