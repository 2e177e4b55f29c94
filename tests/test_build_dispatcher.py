"""What a recipe may ask for, and a whole model by each dispatcher that is built from it, ranks being processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numerics import assert_close
from ranks import run_ranks
from tiny import tiny_model

from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.build_dispatcher import build_dispatcher
from expertmesh.parallel.dispatch_config import DispatchConfig
from expertmesh.parallel.dispatchers import LocalDispatcher
from expertmesh.parallel.groups import Groups, build_groups
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.model.tensor_parallel import parallel_transformer
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import initialise, weights
from expertmesh.system.train.loss import LanguageModelLoss

RANKS = 4
# Layers of 4, 6 and 3 FFN experts (PR-MoE, arXiv 2201.05596, and worse): shards of 1, of 1 and 2, of 0 and 1.
MODEL = tiny_model(moe={"pyramid": (4, 6, 3), "gating_residual": False, "ffn_experts": 6}, layers=3)
TOKENS = torch.randint(0, 512, (RANKS, 13), generator=torch.Generator().manual_seed(1))


class Way:
    def __init__(self, reason: str, bound: float | None, **keys: object) -> None:
        """`bound`: of the largest error beside one rank; None: not a bit beside the first way."""
        self.reason, self.bound, self.config = reason, bound, DispatchConfig(ranks_per_node=2, **keys)


WAYS = [
    Way("straight", 2e-5),
    Way("to all", None, kind="all_gather"),
    Way("by nodes", None, kind="hierarchical"),
    Way("straight in chunks", 2e-5, chunks=3),
    Way("by nodes in chunks", 2e-5, kind="hierarchical", chunks=2),
    Way("rounded to bfloat16", 2e-2, wire="bf16"),
    Way("rounded to FP8", 2e-1, wire="fp8", chunks=2),
]
Result = tuple[float, dict[str, np.ndarray], int]  # loss, gradients by name, bytes sent


def step(loss: LanguageModelLoss, tokens_BS1: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    loss.zero_grad()
    batch = loss(tokens_BS1)
    batch.total.backward()
    found = {}
    for weight in weights(loss.model):
        if weight.parameter.grad is not None:
            found |= {name: part.clone() for name, part in weight.split(weight.parameter.grad).items()}
    return batch.total.item(), found


def every_way(degrees: bool) -> list[Result]:
    """`degrees`: layers have degrees of their own, 4, 2 and 1; else all lie on all ranks, unevenly."""
    world = dist.group.WORLD
    groups = Groups(rank=world.rank(), data=world, token=world, expert=world)
    if degrees:
        groups = build_groups(ParallelSizes(dp=RANKS, ep=RANKS), MODEL.moe.experts_of_layers)
        assert sorted(groups.narrower) == [1, 2]
    results = []
    for way in WAYS:
        traffic = Traffic()
        model = parallel_transformer(MODEL, groups)
        initialise(model, seed=1, standard_deviation=0.2)
        loss = LanguageModelLoss(model, build_dispatcher(groups, way.config, traffic, "cpu"), groups)
        value, found = step(loss, TOKENS[world.rank() :][:1])
        results.append((value, {name: part.numpy() for name, part in found.items()}, traffic.take().sent))
    return results


@pytest.mark.parametrize("degrees", [False, True], ids=["on all ranks", "degrees of their own"])
def test_a_whole_model_by_every_way(degrees):
    whole = Transformer(MODEL)
    initialise(whole, seed=1, standard_deviation=0.2)
    expected_loss, expected = step(LanguageModelLoss(whole, LocalDispatcher(), Groups()), TOKENS)
    ranks = run_ranks(every_way, RANKS, degrees)

    def of_all(number: int) -> tuple[float, dict[str, torch.Tensor], int]:
        mean = sum(ways[number][0] for ways in ranks) / RANKS
        found: dict[str, torch.Tensor] = {}
        for ways in ranks:  # a rank's loss is the mean of its tokens; whoever holds a weight has part of its gradient
            for name, gradient in ways[number][1].items():
                found[name] = found.get(name, 0) + torch.from_numpy(gradient) / RANKS
        return mean, found, sum(ways[number][2] for ways in ranks)

    first = of_all(0)
    for number, way in enumerate(WAYS):
        mean, found, sent = of_all(number)
        assert found.keys() == expected.keys()
        if way.bound is None:
            assert mean == first[0], way.reason
            assert all(torch.equal(found[name], first[1][name]) for name in found), way.reason
            continue
        assert mean == pytest.approx(expected_loss, rel=way.bound), way.reason
        for name, gradient in found.items():
            bounds = {"max_error": 10 * way.bound, "rms_error": way.bound}
            assert_close(gradient, expected[name], **bounds, what=f"{name}, {way.reason}")
        if way.config.wire != "native":
            assert sent < first[2] * {"bf16": 0.7, "fp8": 0.5}[way.config.wire]  # choices stay as they are


def test_alone_everything_is_local():
    config = DispatchConfig(kind="hierarchical")
    assert isinstance(build_dispatcher(Groups(), config, Traffic(), "cpu"), LocalDispatcher)
