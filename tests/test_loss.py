"""What training minimises, by hand; and the mean over ranks is the loss of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from numerics import assert_close
from ranks import run_threads
from tiny import context_of, tiny_model, training_step

from expertmesh.kernels.mutual_information import mutual_information_loss_ref
from expertmesh.kernels.routing import Routing
from expertmesh.parallel.dispatchers import LocalDispatcher
from expertmesh.parallel.groups import Groups
from expertmesh.system.model.attention_config import MixtureAttentionConfig
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import initialise
from expertmesh.system.train.loss import LanguageModelLoss, draw_width

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
    expected = parts.cross_entropy + 0.5 * parts.balance_L.sum() + 0.25 * parts.z_L.sum()
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
    assert parts.balance_L.sum().item() == pytest.approx(balance, rel=1e-5)


def routings_of(loss: LanguageModelLoss, tokens_BS1: torch.Tensor, kind: str = "experts") -> list[Routing]:
    """What each layer decided for the whole batch."""
    inputs_BS = tokens_BS1[:, :-1]
    output = loss.model(inputs_BS.flatten(), context_of(inputs_BS.shape[1], len(inputs_BS)))
    return [getattr(decided, kind) for decided in output.decisions]


@pytest.mark.parametrize("balance_loss", ["switch", "gshard"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_uniform_gate_has_a_balance_loss_of_one(balance_loss, top_k):
    loss = loss_of(balance_loss=balance_loss, top_k=top_k, gating_residual=False)
    for block in loss.model.layers:
        block.mlp.gate.weight.data.zero_()
    assert_close(loss(batch()).balance_L, torch.ones(CONFIG.layers))


@torch.no_grad()
@pytest.mark.parametrize("balance_loss", ["switch", "gshard"])
def test_switch_counts_all_choices_and_gshard_the_first(balance_loss):
    loss = loss_of(balance_loss=balance_loss)
    for routing, found in zip(routings_of(loss, batch()), loss(batch()).balance_L, strict=True):
        chosen = routing.experts_TK if balance_loss == "switch" else routing.experts_TK[:, :1]
        shares_N = torch.stack([(chosen == i).double().mean() for i in range(MOE.num_experts)])
        means_N = routing.logits_TN.double().softmax(-1).mean(0)
        assert found.item() == pytest.approx(float(MOE.num_experts * (shares_N * means_N).sum()), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("moe", [{"logits_norm": 3.0}, {"gate_mode": "sigmoid"}], ids=["normed", "sigmoid"])
def test_balance_is_of_what_decided_and_the_z_loss_of_the_plain_logits(moe):
    loss = loss_of(balance_loss="switch", **moe)
    parts = loss(batch())
    for routing, balance, z, entropy in zip(
        routings_of(loss, batch()), parts.balance_L, parts.z_L, parts.entropy_L, strict=True
    ):
        scores_TN = routing.scores_TN.double()
        p_TN = scores_TN.sigmoid() / scores_TN.sigmoid().sum(1, keepdim=True) if "gate_mode" in moe else None
        p_TN = scores_TN.softmax(-1) if p_TN is None else p_TN
        shares_N = torch.stack([(routing.experts_TK == i).double().mean() for i in range(MOE.num_experts)])
        assert balance.item() == pytest.approx(float(MOE.num_experts * (shares_N * p_TN.mean(0)).sum()), rel=1e-5)
        assert z.item() == pytest.approx(float(routing.logits_TN.double().logsumexp(-1).square().mean()), rel=1e-5)
        assert entropy.item() == pytest.approx(float(-(p_TN * p_TN.log()).sum(1).mean()), rel=1e-5)
        assert torch.equal(routing.scores_TN, routing.logits_TN) == ("gate_mode" in moe)


@torch.no_grad()
def test_mutual_information_of_experts():
    loss = loss_of(balance_loss="mutual_information")
    for routing, found in zip(routings_of(loss, batch()), loss(batch()).balance_L, strict=True):
        want = mutual_information_loss_ref(routing.logits_TN.double().softmax(-1))
        assert found.item() == pytest.approx(want.item(), rel=1e-4) and want < -1e-3


def loss_of_attentions(weight: float, groups: Groups | None = None) -> LanguageModelLoss:
    shape = {"experts": 4, "top_k": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "balance_loss_weight": weight}
    attention = MixtureAttentionConfig(kind="mixture", **shape)
    model = Transformer(tiny_model(vocab_size=20, attention=attention, moe={"balance_loss_weight": 0.0}))
    initialise(model, seed=4, standard_deviation=0.3)
    return LanguageModelLoss(model, LocalDispatcher(), groups or Groups())


def test_routers_of_attentions_add_their_mutual_information():
    loss = loss_of_attentions(0.5)
    parts = loss(batch())
    refs = [mutual_information_loss_ref(r.logits_TN.softmax(-1)) for r in routings_of(loss, batch(), "attentions")]
    assert len(refs) == CONFIG.layers and all(ref < -1e-3 for ref in refs)
    assert_close(parts.total - parts.cross_entropy, 0.5 * torch.stack(refs).sum(), max_error=1e-4, rms_error=1e-4)
    (parts.total - parts.cross_entropy).backward()
    assert all(block.self_attn.gate.weight.grad.abs().sum() > 0 for block in loss.model.layers)
    without = loss_of_attentions(0.0)(batch())
    assert torch.equal(without.total, without.cross_entropy)


def test_mean_over_ranks_of_the_attentions_loss_is_that_of_the_whole_batch():
    """With means of its own tokens alone, a rank would balance its part instead."""
    whole, tokens_BS1 = loss_of_attentions(0.5), batch()
    expected = whole(tokens_BS1)
    expected.total.backward()

    def one_rank(group: dist.ProcessGroup):
        loss = loss_of_attentions(0.5, Groups(rank=group.rank(), data=group, token=group))
        parts = loss(tokens_BS1.chunk(2)[group.rank()])
        parts.total.backward()
        return parts.total.item(), [block.self_attn.gate.weight.grad for block in loss.model.layers]

    ranks = run_threads(one_rank, 2)
    assert sum(total for total, _ in ranks) / 2 == pytest.approx(expected.total.item(), rel=1e-6)
    for layer, block in enumerate(whole.model.layers):
        assert_close((ranks[0][1][layer] + ranks[1][1][layer]) / 2, block.self_attn.gate.weight.grad)


def test_the_balance_loss_reaches_every_router():
    loss = loss_of()
    loss(batch()).balance_L.sum().backward()
    for block in loss.model.layers:
        assert block.mlp.gate.weight.grad.abs().sum() > 0
    assert loss.model.lm_head.weight.grad is None


@pytest.mark.parametrize("ranks", [2, 4])
def test_mean_over_ranks_is_the_loss_of_the_whole_batch(ranks):
    whole, tokens_BS1 = loss_of(), batch(sequences=4)
    expected = whole(tokens_BS1)
    expected.total.backward()

    def one_rank(group: dist.ProcessGroup):
        loss = loss_of(Groups(rank=group.rank(), data=group, token=group))
        parts = loss(tokens_BS1.tensor_split(ranks)[group.rank()])
        parts.total.backward()
        return parts, {name: p.grad for name, p in loss.model.named_parameters()}

    results = run_threads(one_rank, ranks)
    for parts, _ in results:
        same = torch.equal(torch.stack(parts.loads_N), torch.stack(expected.loads_N))
        assert same, "the load is that of the whole batch, on every rank"
    for name in ("cross_entropy", "balance_L"):
        mean = torch.stack([getattr(parts, name) for parts, _ in results]).mean(0)
        assert_close(mean, getattr(expected, name), what=name)
    for name, parameter in whole.model.named_parameters():
        mean = torch.stack([grads[name] for _, grads in results]).mean(0)
        assert_close(mean, parameter.grad, what=f"gradient of {name}")


def test_a_rank_without_sequences_adds_nothing():
    """A short validation batch leaves some ranks with none."""
    parts = loss_of()(batch()[:0])
    losses = parts.cross_entropy.item(), parts.balance_L.sum().item()
    assert losses == (0.0, 0.0) and not torch.stack(parts.loads_N).any()
    parts.total.backward()


def test_without_ffn_experts():
    model = Transformer(tiny_model(vocab_size=20, moe={"ffn_experts": 0}))
    initialise(model, seed=4, standard_deviation=0.3)
    parts = LanguageModelLoss(model, LocalDispatcher(), Groups())(batch())
    parts.total.backward()
    assert torch.isfinite(parts.cross_entropy) and torch.stack(parts.loads_N).shape == (3, 4)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


NESTED = {"hidden_size": 32, "nested": [0.25, 0.5, 0.75, 1]}


def test_the_drawn_width_is_the_same_on_all_ranks_and_even_over_the_shares():
    config = tiny_model(moe={"expert": NESTED})
    steps = range(1, 4001)
    drawn = [draw_width(config, training_step(6, step=step)) for step in steps]
    assert drawn == [draw_width(config, training_step(6, range(4, 8), step)) for step in steps], "other sequences"
    for share in NESTED["nested"]:
        assert abs(drawn.count(share) - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5
    followed = sum(before == after for before, after in zip(drawn, drawn[1:], strict=False))
    assert abs(followed - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5, "one draw says nothing of the next"
    assert draw_width(config, None) == 1.0 and draw_width(CONFIG, training_step(6)) == 1.0


def test_training_uses_the_drawn_width_in_every_layer_and_validation_all_of_it():
    config = tiny_model(
        vocab_size=20, moe={"expert": NESTED}, dense_layers=(1,), dense={**NESTED, "hidden_size": 64}, layers=3
    )
    model = Transformer(config)
    initialise(model, seed=4, standard_deviation=0.3)
    loss, tokens_BS1 = LanguageModelLoss(model, LocalDispatcher(), Groups()), batch()
    for step in range(1, 9):
        training = training_step(6, range(4), step)
        share = draw_width(config, training)
        model.zero_grad()
        loss(tokens_BS1, training).total.backward()
        for layer, mlp in enumerate(block.mlp for block in model.layers):
            down_FD = mlp.down_proj.weight.grad.T if layer == 1 else mlp.experts.down.grad.abs().sum(0).T
            used = int((down_FD.abs().sum(1) > 0).sum())
            assert used == share * (64 if layer == 1 else 32)
    assert {draw_width(config, training_step(6, step=step)) for step in range(1, 9)} > {0.25, 1}
    small, whole = loss(tokens_BS1, training_step(6, range(4), 1)), loss(tokens_BS1)
    assert draw_width(config, training_step(6, step=1)) < 1 and not torch.equal(small.total, whole.total)


def test_dropped_slots_are_counted_and_the_load_is_what_was_chosen():
    capacity = {"factor": 0.5}
    loss = loss_of(capacity=capacity)
    step = training_step(6, range(4))
    parts = loss(batch(), step)
    output = loss.model(batch()[:, :-1].flatten(), context_of(6, 4, step))
    for routing, load_N, dropped in zip(output.routings, parts.loads_N, parts.dropped_L, strict=True):
        assert int(dropped) == routing.dropped_slots == int((routing.experts_TK == MOE.num_experts).sum()) > 0
        assert load_N.tolist() == [int((routing.chosen_TK == i).sum()) for i in range(MOE.num_experts)]
    assert not loss(batch()).dropped_L.any(), "validation drops nothing"


def test_a_mixture_of_depths_teaches_its_router_whom_it_sent_through():
    config = tiny_model(
        vocab_size=20, moe={"gating_residual": False}, depth={"layers": [0, 2], "loss_weight": 0.5, "kept": 0.5}
    )
    model = Transformer(config)
    initialise(model, seed=4, standard_deviation=0.3)
    loss, step = LanguageModelLoss(model, LocalDispatcher(), Groups()), training_step(6, range(4))
    parts = loss(batch(), step)
    decisions = model(batch()[:, :-1].flatten(), context_of(6, 4, step)).decisions
    assert decisions[1].depth is None
    total = parts.cross_entropy.double() + config.moe.balance_loss_weight * parts.balance_L.double().sum()
    for decided in (decisions[0], decisions[2]):
        logits_T2, chosen_T = decided.depth
        assert int(chosen_T.sum()) == 12
        wrong = [-logits.double().log_softmax(0)[int(c)] for logits, c in zip(logits_T2, chosen_T, strict=True)]
        total = total + 0.5 * sum(wrong) / 24
    assert_close(parts.total, total)
