"""The experts of a layer: a shard answers as the whole does for its experts, and ids mean what `expert_names` says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expert_twin import COUNTS, assert_equals_twin
from numerics import assert_close
from tiny import context_of, training_step
from twin import Weights, expert, shared_weights

from expertmesh.kernels.routing import Routing
from expertmesh.kernels.rows import Rows
from expertmesh.parallel.placement import expert_shard, shard_sizes
from expertmesh.system.model.build_experts import build_experts
from expertmesh.system.model.experts import RoutedExperts, ZeroComputationExperts
from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.model.weights import initialise

CONFIG = MoEConfig(ffn_experts=5, expert={"hidden_size": 4}, zero_experts=2, copy_experts=2, constant_experts=2)
WIDTH = 6
NESTED = {"hidden_size": 8, "nested": [0.25, 0.5, 1]}
STRUCTURED = {"kind": "structured", "hidden_size": 4, "form": "block_shuffle", "blocks": 2, "guided": True}
KINDS: list[dict[str, Any]] = [
    {"hidden_size": 4},
    NESTED,
    {"kind": "mlp", "hidden_size": 4},
    STRUCTURED,
    {"kind": "spark", "hidden_size": 8, "kept": 3, "predictor_width": 2},
    {"kind": "modulated", "adaptor_size": 3},
]


def made(kind: dict[str, Any], experts: int = 4, spread: float = 0.5) -> RoutedExperts:
    module = build_experts(MoEConfig(ffn_experts=experts, expert=kind), WIDTH, range(experts))
    initialise(module, 1, spread)
    return module


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_shards_together_answer_as_the_whole(kind):
    counts_E = torch.tensor([2, 0, 3, 1, 4])
    rows_RD = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0))
    whole, context = made(kind, 5), context_of(10, training=training_step(10, step=2))
    expected_RD = whole(Rows(rows_RD, None, counts_E), context)
    for size in (2, 3, 7):  # 7: two ranks hold nothing and answer no rows
        answers = []
        sizes = shard_sizes(5, size)
        rows = rows_RD.split([int(c.sum()) for c in counts_E.split(sizes)])
        for rank, (mine, counts) in enumerate(zip(rows, counts_E.split(sizes), strict=True)):
            held = expert_shard(5, rank, size)
            shard = build_experts(MoEConfig(ffn_experts=5, expert=kind), WIDTH, held)
            initialise(shard, 1, 0.5)
            for name, parameter in shard.named_parameters():
                assert torch.equal(parameter, whole.get_parameter(name)[held.start : held.stop]), name
            answers.append(shard(Rows(mine, None, counts), context))
        assert_close(torch.cat(answers), expected_RD, what=f"{size} shards")


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("counts, reason", COUNTS, ids=[reason for _, reason in COUNTS])
def test_mlp_equals_the_equation(activation, counts, reason):
    def twin(w: Weights, x_D: torch.Tensor) -> torch.Tensor:
        act = F.relu if activation == "relu" else F.gelu
        more = {"approximate": "tanh"} if activation == "gelu_tanh" else {}
        return w["down_proj.weight"] @ act(w["up_proj.weight"] @ x_D, **more)

    kind = {"kind": "mlp", "hidden_size": 7, "activation": activation}
    assert_equals_twin(made(kind), WIDTH, twin, counts)


def nested_twin(units: int):
    def twin(w: Weights, x_D: torch.Tensor) -> torch.Tensor:
        gate_m, up_m = (w[f"{part}_proj.weight"][:units] @ x_D for part in ("gate", "up"))
        return w["down_proj.weight"][:, :units] @ (F.silu(gate_m) * up_m)

    return twin


@pytest.mark.parametrize("share, units", [(0.25, 2), (0.5, 4), (1, 8)])
@pytest.mark.parametrize("counts, reason", COUNTS, ids=[reason for _, reason in COUNTS])
def test_nested_equals_the_equation(share, units, counts, reason):
    assert_equals_twin(made(NESTED), WIDTH, nested_twin(units), counts, context_of(1, width=share))


def test_nested_at_full_width_is_plain_bit_for_bit():
    nested, plain = made(NESTED), made({"hidden_size": 8})
    rows_RD, counts_E = torch.randn(9, WIDTH), torch.tensor([4, 0, 3, 2])
    expected_RD = plain(Rows(rows_RD, None, counts_E), context_of(9))
    assert torch.equal(nested(Rows(rows_RD, None, counts_E), context_of(9)), expected_RD)
    assert torch.equal(nested(Rows(rows_RD, None, counts_E)), expected_RD), "a worker of the FFN pool uses all of it"


def test_nested_is_the_smaller_network_of_its_first_units():
    nested, small = made(NESTED), made({"hidden_size": 2})
    gate_EFD, up_EFD = nested.gate_up.detach().chunk(2, dim=1)
    small.gate_up.data.copy_(torch.cat([gate_EFD[:, :2], up_EFD[:, :2]], dim=1))
    small.down.data.copy_(nested.down.detach()[:, :, :2])
    rows_RD, counts_E = torch.randn(9, WIDTH), torch.tensor([4, 0, 3, 2])
    found_RD = nested(Rows(rows_RD, None, counts_E), context_of(9, width=0.25))
    assert torch.equal(found_RD, small(Rows(rows_RD, None, counts_E), context_of(9)))


def test_units_beyond_the_width_get_a_gradient_of_exactly_zero():
    nested = made(NESTED)
    rows = Rows(torch.randn(9, WIDTH), None, torch.tensor([4, 1, 2, 2]))
    nested(rows, context_of(9, width=0.5)).sum().backward()
    gate_EFD, up_EFD = nested.gate_up.grad.chunk(2, dim=1)
    for unit_first in (gate_EFD, up_EFD, nested.down.grad.transpose(1, 2)):
        assert not unit_first[:, 4:].any()
        assert (unit_first[:, :4].abs().sum(dim=(0, 2)) > 0).all()


def test_gradient_of_summed_losses_is_the_sum_of_gradients():
    rows = Rows(torch.randn(9, WIDTH), None, torch.tensor([4, 0, 3, 2]))

    def losses(nested: RoutedExperts) -> list[torch.Tensor]:
        return [nested(rows, context_of(9, width=share)).square().sum() for share in (0.25, 0.5, 1)]

    together, apart = made(NESTED), made(NESTED)
    sum(losses(together)).backward()
    for loss in losses(apart):
        loss.backward()
    for name, parameter in together.named_parameters():
        assert_close(parameter.grad, apart.get_parameter(name).grad, what=name)


@pytest.mark.parametrize("expert", [{"hidden_size": 4}, {"kind": "mlp", "hidden_size": 4}], ids=["swiglu", "mlp"])
def test_rows_are_read_where_they_lie_and_answers_weighted(expert):
    experts = build_experts(MoEConfig(ffn_experts=2, expert=expert, top_k=1), WIDTH, range(2))
    initialise(experts, 1, 0.5)
    generator = torch.Generator().manual_seed(0)
    source_XD, weights_R = torch.randn(3, WIDTH, generator=generator), torch.rand(4, generator=generator)
    index_R, counts_E = torch.tensor([2, 0, 2, 1]), torch.tensor([1, 3])
    expected_RD = weights_R[:, None] * experts(Rows(source_XD[index_R], None, counts_E))
    assert_close(experts(Rows(source_XD, index_R, counts_E, weights_R)), expected_RD)


@pytest.mark.parametrize("id_and_name", list(enumerate(CONFIG.expert_names)), ids=lambda pair: pair[1])
def test_each_id_is_the_kind_its_name_says(id_and_name):
    i, name = id_and_name
    experts = ZeroComputationExperts(CONFIG, WIDTH)
    initialise(experts, 1, 0.5)
    x_TD = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    chosen_TK, one_TK = torch.full((3, 1), i), torch.ones(3, 1)
    y_TD = experts(x_TD, Routing(chosen_TK, one_TK, one_TK, one_TK, chosen_TK)).answer(one_TK)
    kind, number = name.split()
    if kind == "constant":
        a = (x_TD @ experts.mix[int(number)].T).softmax(-1)
        assert_close(y_TD, a[:, :1] * x_TD + a[:, 1:] * experts.constant[int(number)])
    else:
        expected = {"ffn": torch.zeros_like(x_TD), "copy": x_TD, "zero": torch.zeros_like(x_TD)}[kind]
        assert torch.equal(y_TD, expected)  # an FFN expert's answer comes from the dispatcher instead
    if kind != "ffn":
        w = {f"zero_computation.{k}": v for k, v in shared_weights(experts).items()}
        for x_D, y_D in zip(x_TD, y_TD, strict=True):
            assert_close(y_D, expert(CONFIG, w, "", i, x_D.double()), what="against the twin")
