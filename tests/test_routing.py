"""Routing against a per-token loop in float64, its exact promises, and the row order of the FFN experts.

Each test runs twice: with torch's operations, and with the Triton kernels in their interpreter.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from numerics import assert_close

from expertmesh.kernels import routing as module
from expertmesh.kernels.routing import ExpertGroups, Residual, expert_counts, route, route_sigmoid, sort_slots


@pytest.fixture(params=[False, True], ids=["torch", "triton"], autouse=True)
def way(request, monkeypatch):
    monkeypatch.setattr(module, "by_triton", lambda tensor: request.param)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN, so that a number nobody wrote shows
    yield
    torch.use_deterministic_algorithms(False)


MODES = ["paper", "released", "mixtral"]


class Case(NamedTuple):
    tokens: int
    experts: int
    top_k: int
    zero_experts: int
    reason: str


CASES = [
    Case(0, 4, 2, 1, "no tokens"),
    Case(1, 4, 2, 1, "one token"),
    Case(9, 5, 1, 1, "k is 1"),
    Case(7, 5, 5, 2, "every expert chosen"),
    Case(6, 1, 1, 0, "a single expert"),
    Case(5, 2, 2, 2, "zero experts only"),
    Case(33, 13, 3, 4, "odd sizes, several zero experts"),
    Case(17, 12, 2, 0, "no zero experts"),
]


def logits_for(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(case.tokens * 31 + case.experts)
    return 2 * torch.randn(case.tokens, case.experts, generator=generator)


def route_by_token(logits_TN, top_k, mode, zero_experts):
    """The gates one token at a time; written from the paper's and the released code's rules, not from `route`."""
    tokens, num_experts = logits_TN.shape
    all_experts, all_weights = [], [logits_TN[:0, :1].expand(0, top_k)]
    for z in logits_TN:
        chosen = sorted(range(num_experts), key=lambda e: (-z[e].item(), e))[:top_k]
        shares = [z[e].exp() / z.exp().sum() for e in chosen]
        if mode == "released":
            shares = [s * (e < num_experts - zero_experts) for s, e in zip(shares, chosen, strict=True)]
        if mode != "paper":
            total = sum(shares)
            shares = [s / total if total > 0 else 0 * s for s in shares]
        all_experts.append(chosen)
        all_weights.append(torch.stack(shares)[None])
    return torch.tensor(all_experts, dtype=torch.int64).view(tokens, top_k), torch.cat(all_weights)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_route_is_the_rule_applied_to_each_token(case, mode):
    logits = logits_for(case).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    routing = route(logits, case.top_k, mode, case.zero_experts)
    experts, weights = route_by_token(wide, case.top_k, mode, case.zero_experts)
    assert torch.equal(routing.experts_TK, experts)
    assert_close(routing.weights_TK, weights, what="weights")
    assert torch.equal(routing.logits_TN, logits) and routing.scores_TN is routing.logits_TN
    assert routing.experts_TK.dtype == torch.int64
    assert routing.weights_TK.dtype == routing.logits_TN.dtype == torch.float32

    grad = torch.randn(weights.shape, generator=torch.Generator().manual_seed(5))
    (got,) = torch.autograd.grad(routing.weights_TK, logits, grad)
    (want,) = torch.autograd.grad(weights, wide, grad.double())
    # The sum of a softmax's gradient cancels, so float32 leaves an absolute error where the true value is 0.
    assert ((got - want).abs() < 1e-6).all()


def test_bfloat16_logits_are_computed_in_float32():
    logits = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    routing = route(logits, 2, "paper")
    assert_close(routing.weights_TK, logits.double().softmax(dim=-1).gather(1, routing.experts_TK))
    assert routing.weights_TK.dtype == routing.logits_TN.dtype == torch.float32


@pytest.mark.parametrize("mode", MODES)
def test_ties_go_to_the_lowest_id(mode):
    logits = torch.zeros(50, 40)
    logits[:, [7, 19, 33]] = 1.0
    assert torch.equal(route(logits, 5, mode).experts_TK, torch.tensor([7, 19, 33, 0, 1]).expand(50, 5))


def test_ranking_is_by_logit_where_probabilities_round_to_the_same():
    logits = torch.tensor([[-200.0, -150.0, 0.0]])
    assert route(logits, 2, "paper").experts_TK.tolist() == [[2, 1]]


def test_paper_gates_add_up_to_at_most_one():
    weights = route(4 * torch.randn(200, 12), 2, "paper", 1).weights_TK
    assert (weights.sum(dim=1) <= 1 + 1e-6).all() and (weights.sum(dim=1) < 0.999).any()


def test_mixtral_and_released_without_zero_experts_are_one_rule():
    logits = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(route(logits, 3, "mixtral").weights_TK, route(logits, 3, "released").weights_TK)


@pytest.mark.parametrize("lead", [0.5, 20.0, 500.0])
def test_released_gives_the_companion_of_a_zero_expert_weight_one(lead):
    logits = torch.tensor([[1.0, 0.0, -1.0, 1.0 + lead]])  # expert 3 is the zero expert; the companion is expert 0
    routing = route(logits, 2, "released", zero_experts=1)
    assert routing.experts_TK.tolist() == [[3, 0]] and routing.weights_TK.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(("top_k", "zero_experts"), [(1, 1), (2, 2), (2, 3)])
def test_released_with_only_zero_experts_chosen_is_zero_with_a_zero_gradient(top_k, zero_experts):
    logits = torch.zeros(3, 5)
    logits[:, -zero_experts:] = 4.0
    logits.requires_grad_()
    with torch.autograd.set_detect_anomaly(True):  # also no NaN on the way
        weights = route(logits, top_k, "released", zero_experts).weights_TK
        (grad,) = torch.autograd.grad(weights.sum(), logits)
    assert torch.equal(weights, torch.zeros(3, top_k))
    assert torch.equal(grad, torch.zeros(3, 5))


class Sigmoid(NamedTuple):
    tokens: int
    experts: int
    top_k: int
    groups: tuple[int, int] | None
    biased: bool
    reason: str


SIGMOID_CASES = [
    Sigmoid(0, 4, 2, None, False, "no tokens"),
    Sigmoid(1, 4, 1, None, False, "one token, k is 1"),
    Sigmoid(33, 13, 3, None, True, "odd sizes, biased"),
    Sigmoid(20, 12, 3, (4, 2), False, "2 of 4 groups of 3"),
    Sigmoid(70, 24, 4, (6, 3), True, "biased, and more than one tile of tokens"),
    Sigmoid(9, 8, 4, (2, 1), True, "all choices in one group"),
]


def route_sigmoid_by_token(logits_TN, case: Sigmoid, bias_N):
    """The choice and the gates one token at a time, from DeepSeek-V3's equations."""
    experts, weights = [], [logits_TN[:0, :1].expand(0, case.top_k)]
    for z in logits_TN:
        s = 1 / (1 + (-z).exp())
        ranking = (s + bias_N).tolist()
        allowed = range(case.experts)
        if case.groups:
            count, chosen = case.groups
            size = case.experts // count
            best = [sum(sorted(ranking[g * size : (g + 1) * size])[-2:]) for g in range(count)]
            open_groups = sorted(range(count), key=lambda g: (-best[g], g))[:chosen]
            allowed = [e for e in allowed if e // size in open_groups]
        picked = sorted(allowed, key=lambda e: (-ranking[e], e))[: case.top_k]
        experts.append(picked)
        weights.append((s[picked] / s[picked].sum())[None])
    return torch.tensor(experts, dtype=torch.int64).view(-1, case.top_k), torch.cat(weights)


@pytest.mark.parametrize("case", SIGMOID_CASES, ids=lambda case: case.reason)
def test_sigmoid_is_the_rule_applied_to_each_token(case):
    generator = torch.Generator().manual_seed(case.tokens)
    logits = (2 * torch.randn(case.tokens, case.experts, generator=generator)).requires_grad_()
    bias_N = 0.3 * torch.randn(case.experts, generator=generator) if case.biased else torch.zeros(case.experts)
    groups = ExpertGroups(*case.groups) if case.groups else None
    routing = route_sigmoid(logits, case.top_k, bias_N if case.biased else None, groups)
    wide = logits.detach().double().requires_grad_()
    experts, weights = route_sigmoid_by_token(wide, case, bias_N.double())
    assert torch.equal(routing.experts_TK, experts)
    assert_close(routing.weights_TK, weights, what="weights")
    grad = torch.randn(weights.shape, generator=generator)
    (got,) = torch.autograd.grad(routing.weights_TK, logits, grad)
    (want,) = torch.autograd.grad(weights, wide, grad.double())
    assert ((got - want).abs() < 1e-6).all()


RESIDUALS = [
    (0, 4, 2, "no tokens"),
    (1, 4, 1, "one token, k is 1"),
    (6, 1, 1, "a single expert: a map of one number"),
    (33, 13, 3, "odd sizes"),
    (35, 40, 2, "two tiles of tokens, and more experts than the map's step"),
    (9, 260, 2, "few tokens a program"),
]


@pytest.mark.parametrize("mode", [*MODES, "sigmoid"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [r[:3] for r in RESIDUALS], ids=[r[3] for r in RESIDUALS])
def test_a_gating_residual_is_added_and_gets_its_gradients(tokens, experts, top_k, mode):
    """z = logits + previous @ map.T; the choice goes by z, and z is what the next layer gets."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = (tokens, experts), (tokens, experts), (experts, experts)
    inputs = [torch.randn(shape, generator=generator) / max(1, i * experts**0.5) for i, shape in enumerate(shapes)]
    wide = [t.double().requires_grad_() for t in inputs]
    inputs = [t.requires_grad_() for t in inputs]
    z_TN = wide[0] + (wide[1][:, None, :] * wide[2][None]).sum(-1)
    residual = Residual(*inputs[1:])
    if mode == "sigmoid":
        routing = route_sigmoid(inputs[0], top_k, residual=residual)
        case = Sigmoid(tokens, experts, top_k, None, False, "")
        chosen_TK, weights_TK = route_sigmoid_by_token(z_TN, case, torch.zeros(experts))
    else:
        routing = route(inputs[0], top_k, mode, 1, residual=residual)
        chosen_TK, weights_TK = route_by_token(z_TN, top_k, mode, 1)
    assert torch.equal(routing.experts_TK, chosen_TK) and routing.scores_TN is routing.logits_TN
    assert_close(routing.logits_TN, z_TN, what="complete logits")
    assert_close(routing.weights_TK, weights_TK, what="weights")
    got, want = [routing.weights_TK, routing.logits_TN], [weights_TK, z_TN]
    grads = [torch.randn(t.shape, generator=generator) for t in want]
    for used in (slice(0, 1), slice(1, 2), slice(0, 2)):  # the weights alone, the logits alone, both
        mine = torch.autograd.grad(got[used], inputs, grads[used], retain_graph=True)
        theirs = torch.autograd.grad(want[used], wide, [g.double() for g in grads[used]], retain_graph=True)
        for a, b in zip(mine, theirs, strict=True):
            assert a.shape == b.shape and ((a - b).abs() < 2e-6 * max(1, tokens)).all()


def test_a_map_that_is_a_view():
    logits_TN, previous_TN, map_NN = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(3))
    routing = route(logits_TN, 2, "paper", residual=Residual(previous_TN, map_NN.T))
    assert_close(routing.logits_TN, logits_TN.double() + previous_TN.double() @ map_NN.double())


def test_another_ranking_changes_the_choice_and_not_the_weights():
    logits = logits_for(CASES[7])
    routing = route(logits, 2, "paper", ranking_TN=-logits)
    assert torch.equal(routing.experts_TK, route(-logits, 2, "paper").experts_TK)
    assert_close(routing.weights_TK, logits.softmax(-1).gather(1, routing.experts_TK))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((0, "paper"), "top_k"), ((5, "paper"), "top_k"), ((2, "paper", 5), "zero_experts"), ((2, "topk"), "gate_mode")],
)
def test_route_says_what_is_wrong(arguments, says):
    with pytest.raises(ValueError, match=says):
        route(torch.zeros(3, 4), *arguments)


ORDERS = [
    ([[2, 0], [0, 5], [1, 0]], 3, [1, 2, 5, 4, 0], [3, 1, 1], "the example of the docstring"),
    ([[3, 4], [5, 3]], 3, [], [0, 0, 0], "only zero-computation experts"),
    ([[1], [1], [1]], 3, [0, 1, 2], [0, 3, 0], "all on one expert, k is 1"),
    ([[1, 0]], 2, [1, 0], [1, 1], "one token"),
    ([[1, 0]], 0, [], [], "no FFN experts"),
]


@pytest.mark.parametrize(("experts", "ffn", "slots", "counts"), [o[:4] for o in ORDERS], ids=[o[4] for o in ORDERS])
def test_slot_order(experts, ffn, slots, counts):
    order = sort_slots(torch.tensor(experts), ffn)
    assert order.slots_R.tolist() == slots and order.counts_E.tolist() == counts
    assert order.slots_R.dtype == order.counts_E.dtype == torch.int64


@pytest.mark.parametrize("tokens", [0, 1, 257])
def test_slot_order_is_a_stable_sort(tokens):
    experts = torch.randint(0, 12, (tokens, 3), generator=torch.Generator().manual_seed(2))
    flat = experts.flatten().tolist()
    order = sort_slots(experts, 8)
    assert order.slots_R.tolist() == sorted((s for s, e in enumerate(flat) if e < 8), key=lambda s: (flat[s], s))
    assert order.counts_E.tolist() == [flat.count(e) for e in range(8)]
    assert expert_counts(experts, 12).tolist() == [flat.count(e) for e in range(12)]
    assert torch.equal(sort_slots(experts, 8).slots_R, order.slots_R)
