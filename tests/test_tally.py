"""Answers of several passes are added up by layer, whichever run of layers they are of."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_threads
from tiny import tiny_model

from expertmesh.parallel.groups import Groups
from expertmesh.system.train.loss import BatchLoss
from expertmesh.system.train.tally import Tally, tally

CONFIG = tiny_model(layers=3, dense_layers=(1,), dense={"hidden_size": 8}, moe={"ffn_experts": 2})
N = CONFIG.moe.num_experts


def answer(layers: int, number: float) -> BatchLoss:
    """Of a run that has so many layers with experts; figures that tell answers apart."""
    of_layers = torch.arange(layers) + number
    loads_N = [torch.arange(N) + int(number) for _ in range(layers)]
    zero = torch.tensor(0.0)
    return BatchLoss(zero, torch.tensor(number), of_layers, 2 * of_layers, loads_N, of_layers.long(), 3 * of_layers)


def check(got: Tally, cross_entropy: float, first: float, last: float, loads: int, dropped: list[int]) -> None:
    assert got.cross_entropy == pytest.approx(cross_entropy)
    for factor, name in enumerate(("balance_L", "z_L", "entropy_L"), start=1):
        assert got.means_L[name] == pytest.approx([factor * first, factor * last])
    assert all(load_N.tolist() == [2 * n + loads for n in range(N)] for load_N in got.loads_N)
    assert got.dropped_L == dropped


def test_micro_batches_of_one_rank():
    answers = [(range(3), answer(2, 1.0)), (range(3), answer(2, 4.0))]
    got = tally(answers, 2, CONFIG, Groups(), [5, 6])
    check(got, 2.5, 2.5, 3.5, 5, [5, 7])
    assert got.sums == [5, 6]


def test_stages_of_a_pipeline():
    """Each has one of the two layers with experts; cross entropy is the last one's."""

    def rank_main(group: dist.ProcessGroup) -> Tally:
        layers = (range(2), range(2, 3))[group.rank()]
        answers = [
            (layers, answer(1, number)._replace(cross_entropy=torch.tensor(float(group.rank()))))
            for number in (1.0, 4.0)
        ]
        return tally(answers, 2, CONFIG, Groups(pipeline=group), [1 + group.rank()])

    for got in run_threads(rank_main, 2):
        check(got, 1.0, 2.5, 2.5, 5, [5, 5])
        assert got.sums == [3]


def test_ranks_that_split_the_tokens():
    """Means are over all of them; loads are the same on each, and not added."""

    def rank_main(group: dist.ProcessGroup) -> Tally:
        told = answer(2, 1.0 + group.rank())._replace(
            loads_N=answer(2, 0.0).loads_N * 1, dropped_L=torch.tensor([3, 4])
        )
        return tally([(range(3), told), (range(3), told)], 2, CONFIG, Groups(token=group), [1])

    for got in run_threads(rank_main, 2):
        check(got, 1.5, 1.5, 2.5, 0, [6, 8])
        assert got.sums == [2]


def test_no_layers_with_experts():
    config = tiny_model(dense_layers=(0, 1, 2), dense={"hidden_size": 8})
    got = tally([(range(3), answer(0, 2.0))], 1, config, Groups())
    assert got == Tally(2.0, {"balance_L": [], "z_L": [], "entropy_L": []}, [], [], [])
