"""What is computed twice gives the bits of what is computed once, and less is kept."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_threads
from tiny import tiny_model, training_step

from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.dispatchers import AllToAllDispatcher, Dispatcher, LocalDispatcher
from expertmesh.parallel.groups import Groups
from expertmesh.system.model.transformer import Transformer, shards
from expertmesh.system.model.weights import initialise
from expertmesh.system.train.loss import LanguageModelLoss
from expertmesh.system.train.recompute import counting_kept, recompute

MODELS = {
    "MoE++, whose routers read the routers before them": tiny_model(),
    "noise, lots and capacity": tiny_model(
        moe={"capacity": {"factor": 1.0}, "noise": "gumbel", "gating_residual": False}
    ),
    "one set of weights in all layers": tiny_model(share_layers=True, moe={"gating_residual": False}),
}
LENGTH = 16


def step(what, config, dispatcher: Dispatcher, groups: Groups, sequences: range):
    """The loss of a batch, all gradients, and how many bytes were kept."""
    model = Transformer(config, shards(config, groups.expert_rank, groups.expert_size))
    initialise(model, seed=1, standard_deviation=0.2)
    recompute(model, what)
    loss = LanguageModelLoss(model, dispatcher, groups)
    tokens_BS1 = torch.randint(0, config.vocab_size, (2, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    with counting_kept(model) as kept:
        total = loss(tokens_BS1[sequences.start : sequences.stop], training_step(LENGTH, sequences)).total
    total.backward()
    return total.item(), [parameter.grad for parameter in model.parameters()], kept.bytes


def assert_same(got, expected):
    assert got[0] == expected[0]
    for mine, wanted in zip(got[1], expected[1], strict=True):
        assert (mine is None) == (wanted is None) and (mine is None or torch.equal(mine, wanted))


@pytest.mark.parametrize("name", MODELS)
def test_same_bits_and_less_kept(name):
    once, moe, block = (
        step(what, MODELS[name], LocalDispatcher(), Groups(), range(2)) for what in ("none", "moe", "block")
    )
    assert_same(moe, once)
    assert_same(block, once)
    assert block[2] < moe[2] < once[2]


@pytest.mark.parametrize("tokens", [(1, 1), (2, 0)], ids=["a sequence each", "a rank without tokens"])
def test_exchanges_are_made_again_by_all_ranks(tokens):
    def rank_main(group: dist.ProcessGroup):
        groups = Groups(rank=group.rank(), data=group, token=group, expert=group)
        first = sum(tokens[: group.rank()])
        mine = range(first, first + tokens[group.rank()])
        config = MODELS["MoE++, whose routers read the routers before them"]
        return [
            step(what, config, AllToAllDispatcher(group, Traffic()), groups, mine) for what in ("none", "moe", "block")
        ]

    for once, moe, block in run_threads(rank_main, 2):
        assert_same(moe, once)
        assert_same(block, once)
