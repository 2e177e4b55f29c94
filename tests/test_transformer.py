"""The whole model against its equations in float64: logits, router logits and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close
from tiny import context_of, tiny_model
from twin import shared_gradients, shared_weights
from twin import transformer as transformer_twin

from expertmesh.kernels.rows import Rows
from expertmesh.parallel.placement import Placement, shard_sizes
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.transformer import ExpertPool, Transformer, shards
from expertmesh.system.model.weights import initialise, weights

SEQUENCES = [[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]]

CASES: list[tuple[dict[str, Any], str]] = [
    ({}, "three layers with gating residuals"),
    ({"moe": {"gate_mode": "released"}}, "released gates"),
    ({"layers": 2, "moe": {"gate_mode": "mixtral", "gating_residual": False}}, "mixtral gates, no residual"),
    ({"layers": 2, "moe": {"ffn_experts": 0}}, "no FFN experts"),
    ({"layers": 1, "norm_eps": 1e-2}, "an epsilon that shows"),
]


def model_of(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    initialise(model, seed=8, standard_deviation=0.3)
    for name, parameter in model.named_parameters():  # norms that show
        if name.endswith("norm.weight"):
            parameter.data = 1 + 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.mark.parametrize("changes, reason", CASES, ids=[reason for _, reason in CASES])
def test_equals_its_equations(changes, reason):
    config = tiny_model(vocab_size=20, hidden_size=16, **changes)
    model, length = model_of(config), len(SEQUENCES[0])
    tokens_T = torch.tensor(SEQUENCES).flatten()
    output = model(tokens_T, context_of(length, len(SEQUENCES)))
    logits_TV = model.lm_head(output.hidden_TD)

    w = shared_weights(model)
    twins = [transformer_twin(config, w, sequence) for sequence in SEQUENCES]
    want_TV = torch.cat([logits for logits, _ in twins])
    assert_close(logits_TV, want_TV, what="logits")
    for layer, routing in enumerate(output.routings):
        assert_close(routing.logits_TN, torch.cat([z[layer] for _, z in twins]), what=f"router logits {layer}")

    F.cross_entropy(logits_TV, tokens_T).backward()
    (F.cross_entropy(want_TV, tokens_T) + 0 * sum(t.sum() for t in w.values())).backward()
    for name, got in shared_gradients(model).items():
        # Three layers of float32: about ten times the error of one.
        assert_close(got, w[name].grad, max_error=2e-4, rms_error=2e-5, what=f"gradient of {name}")


def test_first_layer_has_no_gate_map_and_logits_of_its_own():
    model = model_of(tiny_model())
    maps = [block.mlp.gate.gate_map for block in model.layers]
    assert maps[0] is None and all(m is not None for m in maps[1:])
    tokens_T = torch.tensor(SEQUENCES[0])

    def first_logits() -> torch.Tensor:
        return model(tokens_T, context_of(6)).routings[0].logits_TN

    before = first_logits()
    for gate_map in maps[1:]:
        gate_map.data.normal_()
    assert torch.equal(first_logits(), before)


def test_no_tokens():
    model = model_of(tiny_model())
    output = model(torch.empty(0, dtype=torch.int64), context_of(6, 0))
    assert output.hidden_TD.shape == (0, 32) and len(output.routings) == 3
    model.lm_head(output.hidden_TD).sum().backward()


@pytest.mark.parametrize("size, held", [(0, [0]), (1, [4]), (2, [2, 2]), (3, [1, 1, 2]), (5, [0, 1, 1, 1, 1])])
def test_each_rank_holds_its_part_of_the_experts(size, held):
    config = tiny_model()
    with torch.device("meta"):
        models = [Transformer(config, shards(config, rank, size)) for rank in range(max(size, 1))]
    assert [len(model.layers[0].mlp.experts.gate_up) for model in models] == held
    assert size == 0 or held == shard_sizes(4, size)


def test_expert_pool_is_the_ffn_half_of_the_model():
    config = tiny_model()
    rows_RD = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    counts_E = torch.tensor([3, 3])
    for rank in range(2):
        model, pool = Transformer(config, shards(config, rank, 2)), ExpertPool(config, rank, 2)
        for module in (model, pool):
            initialise(module, 1, 0.2)
        names = [{n for w in weights(m) if w.is_expert for n in w.split(w.parameter)} for m in (model, pool)]
        assert names[0] == names[1] and len(names[0]) == 3 * 2 * config.layers
        for layer in range(config.layers):
            rows = Rows(rows_RD, None, counts_E)
            expected_RD = model.layers[layer].mlp.experts(rows)
            assert torch.equal(pool(layer, rows), expected_RD)


def test_expert_pool_of_a_placement_has_each_slots_expert():
    config = tiny_model()
    whole = ExpertPool(config, 0, 1)
    placement = Placement(4, 2, (2, 0, 3, 2, 1, 0))
    pool = ExpertPool(config, 1, 2, {1: placement})
    for module in (whole, pool):
        initialise(module, 1, 0.2)
    assert [len(held) for held in pool.held] == [2, 3, 2]
    for layer, held in enumerate(((2, 3), (2, 1, 0), (2, 3))):
        for name, parameter in pool.layers[layer]["mlp"]["experts"].named_parameters():
            assert torch.equal(parameter, getattr(whole.layers[layer]["mlp"]["experts"], name)[list(held)])
