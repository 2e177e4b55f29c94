"""What training minimises, by hand; and the mean over ranks is the loss of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from numerics import assert_close
from ranks import run_threads
from tiny import context_of, tiny_model

from expertmesh.parallel.dispatchers import LocalDispatcher
from expertmesh.parallel.groups import Groups
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import initialise
from expertmesh.system.train.loss import LanguageModelLoss

CONFIG = tiny_model(vocab_size=20)
MOE = CONFIG.moe


def loss_of(groups: Groups | None = None, **moe: Any) -> LanguageModelLoss:
    model = Transformer(tiny_model(vocab_size=20, moe=moe))
    initialise(model, seed=4, standard_deviation=0.3)
    return LanguageModelLoss(model, LocalDispatcher(), groups or Groups())


def batch(sequences: int = 4, length: int = 6) -> torch.Tensor:
    return torch.randint(0, 20, (sequences, length + 1), generator=torch.Generator().manual_seed(0))


def test_total_is_cross_entropy_plus_weighted_balance():
    parts = loss_of(balance_loss_weight=0.5, z_loss_weight=0.25)(batch())
    expected = parts.cross_entropy + 0.5 * parts.balance + 0.25 * parts.z
    assert torch.equal(parts.total, expected) and not torch.equal(parts.total, parts.cross_entropy)
    plain = loss_of(balance_loss_weight=0.0)(batch())
    assert torch.equal(plain.total, plain.cross_entropy)


@torch.no_grad()
def test_values_by_hand():
    loss, tokens_BS1 = loss_of(), batch()
    parts = loss(tokens_BS1)

    cross_entropy, counted = 0.0, 0
    loads = torch.zeros(CONFIG.layers, MOE.num_experts, dtype=torch.int64)
    probabilities = torch.zeros(CONFIG.layers, MOE.num_experts, dtype=torch.float64)
    for sequence in tokens_BS1:
        length = len(sequence) - 1
        output = loss.model(sequence[:-1], context_of(length))
        p_SV = loss.model.lm_head(output.hidden_TD).double().softmax(-1)
        for s in range(length):
            cross_entropy -= float(p_SV[s, sequence[s + 1]].log())  # position s predicts token s + 1
            counted += 1
        for layer, routing in enumerate(output.routings):
            for chosen in routing.experts_TK.flatten().tolist():
                loads[layer, chosen] += 1
            probabilities[layer] += routing.logits_TN.double().softmax(-1).sum(0)
    balance = 0.0
    for layer in range(CONFIG.layers):
        for i in range(MOE.num_experts):
            eta = 1.0 if i < MOE.ffn_experts else MOE.tau
            balance += eta * float(loads[layer, i] / counted * probabilities[layer, i] / counted)

    assert torch.equal(torch.stack(parts.loads_N), loads) and counted == 24
    assert [int(load.sum()) for load in parts.loads_N] == [counted * MOE.top_k] * CONFIG.layers
    assert parts.cross_entropy.item() == pytest.approx(cross_entropy / counted, rel=1e-5)
    assert parts.balance.item() == pytest.approx(balance, rel=1e-5)


def test_the_balance_loss_reaches_every_router():
    loss = loss_of()
    loss(batch()).balance.backward()
    for block in loss.model.layers:
        assert block.mlp.gate.weight.grad.abs().sum() > 0
    assert loss.model.lm_head.weight.grad is None


@pytest.mark.parametrize("ranks", [2, 4])
def test_mean_over_ranks_is_the_loss_of_the_whole_batch(ranks):
    whole, tokens_BS1 = loss_of(), batch(sequences=4)
    expected = whole(tokens_BS1)
    expected.total.backward()

    def one_rank(group: dist.ProcessGroup):
        loss = loss_of(Groups(rank=group.rank(), data=group))
        parts = loss(tokens_BS1.tensor_split(ranks)[group.rank()])
        parts.total.backward()
        return parts, {name: p.grad for name, p in loss.model.named_parameters()}

    results = run_threads(one_rank, ranks)
    for parts, _ in results:
        same = torch.equal(torch.stack(parts.loads_N), torch.stack(expected.loads_N))
        assert same, "the load is that of the whole batch, on every rank"
    for name in ("cross_entropy", "balance"):
        mean = torch.stack([getattr(parts, name) for parts, _ in results]).mean()
        assert mean.item() == pytest.approx(getattr(expected, name).item(), rel=1e-6)
    for name, parameter in whole.model.named_parameters():
        mean = torch.stack([grads[name] for _, grads in results]).mean(0)
        assert_close(mean, parameter.grad, what=f"gradient of {name}")


def test_a_rank_without_sequences_adds_nothing():
    """A short validation batch leaves some ranks with none."""
    parts = loss_of()(batch()[:0])
    assert (parts.cross_entropy.item(), parts.balance.item(), int(torch.stack(parts.loads_N).sum())) == (0.0, 0.0, 0)
    parts.total.backward()


def test_without_ffn_experts():
    model = Transformer(tiny_model(vocab_size=20, moe={"ffn_experts": 0}))
    initialise(model, seed=4, standard_deviation=0.3)
    parts = LanguageModelLoss(model, LocalDispatcher(), Groups())(batch())
    parts.total.backward()
    assert torch.isfinite(parts.cross_entropy) and torch.stack(parts.loads_N).shape == (3, 4)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
