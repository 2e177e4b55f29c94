"""Experts that serve no more than their capacity: against the definition, and DeepSpeed's one-hot dispatch."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close
from tiny import context_of, training_step
from twin import shared_weights

from expertmesh.kernels.capacity import capacities, serve_within, serve_within_ref
from expertmesh.kernels.routing import route
from expertmesh.system.model.moe import MoE
from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.model.weights import initialise


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Case(NamedTuple):
    chosen: list[list[int]]
    capacity: list[int]
    length: int
    lots: list[float] | None
    served: list[list[int]]
    reason: str


N = 3  # experts below, and so the id of a dropped slot
CASES = [
    Case([[0, 1], [0, 2], [0, 0]], [2, 2, 2], 3, None, [[0, 1], [0, 2], [N, N]], "the drawing in capacity.py"),
    Case([[1, 0], [2, 0], [0, 1]], [1, 9, 9], 3, None, [[1, N], [2, N], [0, 1]], "first choices go before second ones"),
    Case([[0], [0], [0]], [2, 0, 0], 3, None, [[0], [0], [N]], "k is 1: by position"),
    Case([[0], [0], [0]], [2, 0, 0], 3, [0.1, 0.9, 0.5], [[N], [0], [0]], "by lot: the higher first"),
    Case([[0], [0], [0]], [1, 0, 0], 3, [0.5, 0.5, 0.5], [[0], [N], [N]], "equal lots: by position"),
    Case([[1, 0], [0, 1]], [1, 1, 0], 2, [0.1, 0.9], [[1, N], [0, N]], "a lot does not lift a second choice"),
    Case([[0], [0], [0], [0]], [1, 0, 0], 2, None, [[0], [N], [0], [N]], "sequences do not compete"),
    Case([[0], [0], [0], [0]], [1, 0, 0], 1, None, [[0]] * 4, "sequences of one token"),
    Case([[2], [2], [2]], [9, 9, 9], 3, None, [[2]] * 3, "all tokens on one expert that has room"),
    Case([[0, 1], [1, 0]], [0, 0, 0], 2, None, [[N, N], [N, N]], "nobody serves"),
    Case([[2, 0]], [1, 1, 1], 1, None, [[2, 0]], "one token"),
    Case([], [1, 1, 1], 4, None, [], "no tokens"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_by_hand(case):
    chosen_TK = torch.tensor(case.chosen, dtype=torch.int64).view(len(case.chosen), -1 if case.chosen else 2)
    lots_T = None if case.lots is None else torch.tensor(case.lots)
    for serve in (serve_within, serve_within_ref):
        served_TK = serve(chosen_TK, torch.tensor(case.capacity), case.length, lots_T)
        assert served_TK.dtype == torch.int64 and served_TK.tolist() == case.served


RANDOM = [
    (4, 12, 2, 6, 1.0, "as many sequences as fit"),
    (1, 33, 3, 7, 0.5, "odd sizes"),
    (5, 7, 1, 4, 0.6, "k is 1"),
    (3, 8, 4, 4, 0.5, "every expert chosen by every token"),
    (2, 9, 2, 40, 1.0, "more experts than slots: many have none"),
]


@pytest.mark.parametrize("by_lot", [False, True], ids=["by position", "by lot"])
@pytest.mark.parametrize("sequences, length, k, n, factor", [r[:5] for r in RANDOM], ids=[r[5] for r in RANDOM])
def test_equals_its_definition(sequences, length, k, n, factor, by_lot):
    chosen_TK = route(draw(sequences * length, n, seed=n), k, "paper").experts_TK
    capacity_N = capacities(n - 2, 2, 0.75, k * length, factor, 0)
    lots_T = torch.rand(sequences * length, generator=torch.Generator().manual_seed(1)) if by_lot else None
    served_TK = serve_within(chosen_TK, capacity_N, length, lots_T)
    assert torch.equal(served_TK, serve_within_ref(chosen_TK, capacity_N, length, lots_T))
    assert ((served_TK == chosen_TK) | (served_TK == n)).all()
    for served_SK, chosen_SK in zip(served_TK.split(length), chosen_TK.split(length), strict=True):
        served_N, asked_N = (torch.bincount(ids.flatten(), minlength=n + 1)[:n] for ids in (served_SK, chosen_SK))
        assert torch.equal(served_N, torch.minimum(asked_N, capacity_N)), "never more, and none dropped without need"


def test_a_factor_of_the_number_of_experts_drops_nothing():
    chosen_TK = torch.zeros(20, 1, dtype=torch.int64)  # all on one expert
    capacity_N = capacities(5, 0, 0.75, 10, 5.0, 0)
    assert torch.equal(serve_within(chosen_TK, capacity_N, 10), chosen_TK)
    assert not torch.equal(serve_within(chosen_TK, capacity_N - 1, 10), chosen_TK)


def test_published_capacities():
    """MoE++ (equation 8), 8 + 4 experts, tau = 0.75, gamma = 1.1, 4000 slots: shares of 0.075 and of 0.1."""
    assert capacities(8, 4, 0.75, 4000, 1.1, 0).tolist() == [330] * 8 + [440] * 4
    assert 8 * 330 + 4 * 440 == 1.1 * 4000


@pytest.mark.parametrize("ffn, others, tau", [(8, 4, 0.75), (16, 4, 0.1), (32, 8, 1.0), (3, 0, 0.5), (0, 5, 0.5)])
@pytest.mark.parametrize("slots, factor", [(4096, 1.1), (100_000, 0.7), (7, 1.0)])
def test_capacities_add_up_to_the_slots_times_the_factor(ffn, others, tau, slots, factor):
    capacity_N = capacities(ffn, others, tau, slots, factor, 0)
    exact = [factor * slots * (tau if i < ffn else 1) / (tau * ffn + others) for i in range(ffn + others)]
    assert sum(exact) == pytest.approx(factor * slots)
    assert all(0 <= found - wanted < 1 for found, wanted in zip(capacity_N.tolist(), exact, strict=True))


def test_capacities_are_equal_without_tau_or_without_zero_computation():
    """DeepSpeed: max(ceil(tokens * k / experts * factor), minimum)."""
    for capacity_N in (capacities(6, 2, 1.0, 100, 1.25, 4), capacities(8, 0, 0.1, 100, 1.25, 4)):
        assert capacity_N.tolist() == [math.ceil(100 / 8 * 1.25)] * 8
    assert capacities(8, 0, 1.0, 16, 1.0, 4).tolist() == [4] * 8, "the minimum"
    assert capacities(10, 0, 1.0, 10, 1.1, 0).tolist() == [2] * 10
    assert capacities(10, 0, 1.0, 100, 1.1, 0).tolist() == [11] * 10, "a product that floats put above 11"


def einsum_layer(
    moe: MoE, x_TD: torch.Tensor, logits_TN: torch.Tensor, length: int, capacity: int, lots_T: torch.Tensor | None
) -> torch.Tensor:
    """DeepSpeed's top-1 and top-2 gates and their dispatch by one-hot einsums (sharded_moe.py), in float64.

    S tokens of a sequence, E experts, C places of each. With lots, tokens enter in the order of their lots.
    """
    w, config = shared_weights(moe), moe.gate.config
    answers = []
    for first in range(0, len(x_TD), length):
        mine = slice(first, first + length)
        x_SM, gates_SE = x_TD[mine].double(), logits_TN[mine].double().softmax(-1)
        S, E = gates_SE.shape
        order_S = torch.arange(S) if lots_T is None else lots_T[mine].argsort(descending=True)
        taken_E, combine_SEC = torch.zeros(E), torch.zeros(S, E, capacity, dtype=torch.float64)
        rest_SE, kept = gates_SE.detach().clone(), []
        for _ in range(config.top_k):
            mask_SE = F.one_hot(rest_SE.argmax(1), E).double()
            rest_SE = rest_SE.masked_fill(mask_SE.bool(), -1.0)
            place_SE = torch.empty_like(mask_SE)
            place_SE[order_S] = mask_SE[order_S].cumsum(0) - 1 + taken_E  # exclusive prefix sums: place in the queue
            taken_E = taken_E + mask_SE.sum(0)
            mask_SE = mask_SE * (place_SE < capacity)
            place_S = (place_SE * mask_SE).sum(1).long()
            kept.append((mask_SE, F.one_hot(place_S, capacity).double()))
        weight_S = sum((gates_SE * mask_SE).sum(1) for mask_SE, _ in kept)
        for mask_SE, place_SC in kept:
            gate_S = (gates_SE * mask_SE).sum(1)
            if config.top_k == 2:  # renormalised over those that serve
                gate_S = gate_S / weight_S.clamp(min=torch.finfo(torch.float64).eps)
            combine_SEC = combine_SEC + torch.einsum("s,se,sc->sec", gate_S, mask_SE, place_SC)
        dispatch_SEC = (combine_SEC > 0).double()
        rows_ECM = torch.einsum("sec,sm->ecm", dispatch_SEC, x_SM)
        answers_ECM = torch.stack(
            [
                F.gelu(rows_CM @ w[f"experts.{e}.up_proj.weight"].T) @ w[f"experts.{e}.down_proj.weight"].T
                for e, rows_CM in enumerate(rows_ECM)
            ]
        )
        answers.append(torch.einsum("sec,ecm->sm", combine_SEC, answers_ECM))
    return torch.cat(answers)


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0], ids=["half is dropped", "even", "nothing is dropped"])
@pytest.mark.parametrize("order", ["position", "random"])
@pytest.mark.parametrize("top_k, gate_mode", [(1, "paper"), (2, "mixtral")], ids=["top-1", "top-2"])
def test_table_dispatch_equals_einsum_dispatch(top_k, gate_mode, order, factor):
    config = MoEConfig(
        ffn_experts=4,
        expert={"kind": "mlp", "hidden_size": 5},
        constant_experts=0,
        copy_experts=0,
        zero_experts=0,
        top_k=top_k,
        gate_mode=gate_mode,
        capacity={"factor": factor, "order": order},
    )
    moe, x_TD, training = MoE(config, 8, 0, range(4), follows_moe=False), draw(24, 8), training_step(12, range(2))
    initialise(moe, 2, 0.7)
    y_TD, routing = moe(x_TD, None, context_of(12, 2, training))
    lots_T = training.lots(0, "capacity", 1, torch.device("cpu"))[:, 0] if order == "random" else None
    capacity = math.ceil(12 * top_k / 4 * factor)
    assert_close(y_TD, einsum_layer(moe, x_TD, routing.logits_TN, 12, capacity, lots_T))
    assert (routing.dropped_slots > 0) == (factor < 4)


def test_the_order_follows_the_lots_of_the_step():
    """Random token selection: another step, another choice among the same tokens; serving drops nothing."""
    config = MoEConfig(ffn_experts=4, expert={"hidden_size": 5}, capacity={"factor": 0.5, "order": "random"})
    moe, x_TD = MoE(config, 8, 0, range(4), follows_moe=False), draw(24, 8)
    initialise(moe, 2, 0.7)
    served = [moe.gate(x_TD, None, context_of(24, 1, training_step(24, step=step))).experts_TK for step in (1, 1, 2)]
    assert torch.equal(served[0], served[1]) and not torch.equal(served[0], served[2])
    assert moe.gate(x_TD, None, context_of(24)).dropped_slots == 0
