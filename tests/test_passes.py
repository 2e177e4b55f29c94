"""A batch in several micro-batches gives what it gives at once; a model in several runs what it gives in one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close
from tiny import context_of, tiny_model

from expertmesh.parallel.dispatchers import LocalDispatcher
from expertmesh.parallel.groups import Groups
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.context import TrainingStep
from expertmesh.system.model.transformer import Transformer, logits_cross
from expertmesh.system.model.weights import initialise
from expertmesh.system.train.loss import LanguageModelLoss
from expertmesh.system.train.passes import MicroBatch, Passes
from expertmesh.system.train.tally import MEANS, Tally, tally

BATCH, LENGTH = 4, 8
RESTLESS = {"balance_loss": "switch", "balance_loss_weight": 1.0}
UNBALANCED = {"balance_loss_weight": 0.0, "z_loss_weight": 0.1, "capacity": {"factor": 0.8}, "noise": "normal"}


def loss_of(config: ModelConfig, runs: list[range] | None = None) -> LanguageModelLoss:
    """Float64 but for routers and the loss itself."""
    model = Transformer(config, runs=runs).double()
    initialise(model, seed=5, standard_deviation=0.3)
    return LanguageModelLoss(model, LocalDispatcher(), Groups())


def batches(count: int) -> list[MicroBatch]:
    tokens_BS1 = torch.randint(0, 16, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    places = [range(first, first + BATCH // count) for first in range(0, BATCH, BATCH // count)]
    return [MicroBatch(tokens_BS1[p.start : p.stop], TrainingStep(3, 10, 7, p, LENGTH)) for p in places]


def trained(loss: LanguageModelLoss, count: int) -> Tally:
    passes = Passes(loss, batches(count))
    for total in passes.totals(count_kept=True):
        total.backward()
    assert passes.kept is not None and passes.kept.bytes > 0 and passes.sent_bytes == 0
    return tally(passes.answers, count, loss.model.config, Groups())


@pytest.mark.parametrize("count", [2, 4], ids=["two sequences at once", "one at once"])
def test_micro_batches_add_up_to_the_batch(count):
    config = tiny_model(vocab_size=16, moe=UNBALANCED)
    whole, parts = loss_of(config), loss_of(config)
    expected, got = trained(whole, 1), trained(parts, count)
    assert got.cross_entropy == pytest.approx(expected.cross_entropy, rel=1e-6)
    for name in MEANS[1:]:
        assert got.means_L[name] == pytest.approx(expected.means_L[name], rel=1e-6), name
    assert all(torch.equal(mine, all_) for mine, all_ in zip(got.loads_N, expected.loads_N, strict=True))
    assert got.dropped_L == expected.dropped_L and sum(got.dropped_L) > 0
    for (name, mine), wanted in zip(parts.model.named_parameters(), whole.model.parameters(), strict=True):
        assert_close(mine.grad, wanted.grad, max_error=1e-4, rms_error=2e-5, what=name)


def test_a_balance_loss_is_of_a_micro_batch():
    """What the file says differs does differ, and is the mean of what each part gives by itself."""
    config = tiny_model(vocab_size=16, moe={"balance_loss_weight": 1.0})
    together = trained(loss_of(config), 1).means_L["balance_L"]
    apart = trained(loss_of(config), 4).means_L["balance_L"]
    each = [loss_of(config)(*batch).balance_L.double() for batch in batches(4)]
    assert apart == pytest.approx(torch.stack(each).mean(0).tolist(), rel=1e-6)
    assert apart != pytest.approx(together, rel=1e-3)


def trained_with_routers(balance_over: str, count: int) -> tuple[Tally, list[torch.Tensor]]:
    """And the gradients of the routers."""
    loss = loss_of(tiny_model(vocab_size=16, moe=RESTLESS | {"balance_over": balance_over}))
    told = trained(loss, count)
    return told, [block.mlp.gate.weight.grad for block in loss.model.layers]


def test_a_balance_loss_of_sequences_is_of_no_micro_batch():
    (expected, wanted), (got, gradients) = (trained_with_routers("sequence", count) for count in (1, 4))
    assert got.means_L["balance_L"] == pytest.approx(expected.means_L["balance_L"], rel=1e-6)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert_close(gradient, want, max_error=1e-5, rms_error=1e-5)
    others = [trained_with_routers(other, 1)[0].means_L["balance_L"] for other in ("micro_batch", "global_batch")]
    assert others[0] == others[1] != pytest.approx(got.means_L["balance_L"], rel=1e-3)


def test_a_balance_loss_of_the_global_batch_has_the_load_of_all_micro_batches_so_far():
    """By hand: the load of all tokens up to this micro-batch, and this one's probabilities."""
    loss = loss_of(tiny_model(vocab_size=16, moe=RESTLESS | {"balance_over": "global_batch"}))
    moe, load_LN, losses_L, total = loss.model.config.moe, torch.zeros(3, 8), list[torch.Tensor](), torch.zeros(())
    for number, (tokens_BS1, training) in enumerate(batches(4), start=1):
        context = context_of(LENGTH, len(tokens_BS1), training)
        output = loss.model(tokens_BS1[:, :-1].flatten(), context)
        logits_TV = loss.model.lm_head(output.hidden_TD)
        total = total + F.cross_entropy(logits_TV, tokens_BS1[:, 1:].flatten()) / 4
        for layer, routing in enumerate(output.routings):
            load_LN[layer] += routing.chosen_TK.flatten().bincount(minlength=moe.num_experts)
            shares_N = load_LN[layer].clone() / (number * LENGTH * moe.top_k)
            losses_L.append(moe.num_experts * (shares_N * routing.logits_TN.softmax(-1).mean(0)).sum() / 4)
    (total + torch.stack(losses_L).sum()).backward()
    wanted = [block.mlp.gate.weight.grad for block in loss.model.layers]

    got, gradients = trained_with_routers("global_batch", 4)
    expected_L = torch.stack(losses_L).view(4, 3).sum(0).tolist()
    assert got.means_L["balance_L"] == pytest.approx(expected_L, rel=1e-5)
    without = trained_with_routers("micro_batch", 4)[0]
    assert got.means_L["balance_L"] != pytest.approx(without.means_L["balance_L"], rel=1e-3)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert_close(gradient, want, max_error=1e-4, rms_error=2e-5)


BORDERS = [
    (tiny_model(), [False, True, True, False], "each router reads the one before"),
    (tiny_model(layers=4, dense_layers=(0, 3), dense={"hidden_size": 8}), [False, False, True, False, False], "two"),
    (tiny_model(layers=3, dense_layers=(1,), dense={"hidden_size": 8}), [False, True, True, False], "past a dense one"),
    (tiny_model(moe={"gating_residual": False}), [False] * 4, "no residuals"),
    (tiny_model(dense_layers=(0, 1, 2), dense={"hidden_size": 8}), [False] * 4, "no routers"),
]


@pytest.mark.parametrize("config, crosses, reason", BORDERS, ids=[reason for *_, reason in BORDERS])
def test_what_crosses_a_border(config, crosses, reason):
    assert [logits_cross(config, layer) for layer in range(config.layers + 1)] == crosses


@pytest.mark.parametrize("tied", [False, True])
def test_runs_of_layers_are_the_parts_of_one_model(tied):
    config = tiny_model(vocab_size=16, layers=5, dense_layers=(2,), dense={"hidden_size": 24}, tie_embeddings=tied)
    runs = [range(0, 2), range(2, 3), range(3, 5)]
    whole, parts = loss_of(config), [loss_of(config, [run]) for run in runs]
    (tokens_BS1, training), *_ = batches(1)
    expected = whole(tokens_BS1, training)
    answers, before = [], None
    for run, part in zip(runs, parts, strict=True):
        answers.append(part(tokens_BS1, training, layers=run, before=before))
        before = answers[-1].onward
    assert torch.equal(answers[-1].cross_entropy, expected.cross_entropy)
    assert all(answer.cross_entropy == 0 for answer in answers[:-1])
    assert torch.equal(torch.cat([answer.balance_L for answer in answers]), expected.balance_L)
    names = [set(dict(part.model.named_parameters())) for part in parts]
    assert set.union(*names) == set(dict(whole.model.named_parameters()))
    # Only what is tied is on two of them.
    assert names[0] & names[2] == ({"embed_tokens.weight"} if tied else set()) and not names[1] & (names[0] | names[2])
    weights = [part.model.tied_weight for part in parts]
    assert [weight is not None for weight in weights] == [tied, False, tied]
    assert whole.model.tied_weight is None
