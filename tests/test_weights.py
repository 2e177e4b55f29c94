"""One name and one value for every weight, however the experts are split."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from expertmesh.system.model.transformer import ExpertPool, Transformer, shards
from expertmesh.system.model.weights import initialise, weights

CONFIG = tiny_model()


def by_name(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: view for weight in weights(module) for name, view in weight.split(weight.parameter).items()}


def initialised(rank: int = 0, size: int = 1, seed: int = 5) -> Transformer:
    model = Transformer(CONFIG, shards(CONFIG, rank, size))
    initialise(model, seed, 0.02)
    return model


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    return by_name(initialised())


def test_names_are_those_of_a_checkpoint(whole):
    layer_1 = {name.removeprefix("layers.1.") for name in whole if name.startswith("layers.1.")}
    experts = {f"mlp.experts.{e}.{part}_proj.weight" for e in range(4) for part in ("gate", "up", "down")}
    assert layer_1 == experts | {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
        "mlp.gate.weight",
        "mlp.gate.gate_map",
        "mlp.zero_computation.mix",
        "mlp.zero_computation.constant",
    }
    assert {name for name in whole if not name.startswith("layers.")} == {
        "embed_tokens.weight",
        "norm.weight",
        "lm_head.weight",
    }


@pytest.mark.parametrize(
    "size", [2, 4, 3, 6], ids=["even", "one expert each", "uneven", "more ranks than experts: some hold none"]
)
def test_initial_values_do_not_depend_on_the_layout(whole, size):
    seen: set[str] = set()
    for rank in range(size):
        model = initialised(rank, size)
        for name, tensor in by_name(model).items():
            assert torch.equal(tensor, whole[name]), name
        experts = {n for w in weights(model) if w.is_expert for n in w.split(w.parameter)}
        assert not seen & experts, "an expert is on two ranks"
        seen |= experts
    assert seen == {name for name in whole if ".experts." in name}


def test_without_experts_all_else_is_the_same(whole):
    attention_worker = by_name(initialised(size=0))
    assert attention_worker.keys() == {name for name in whole if ".experts." not in name}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in attention_worker.items())


def test_expert_pool_has_the_same_experts(whole):
    pool = ExpertPool(CONFIG, 1, 3)
    initialise(pool, 5, 0.02)
    found = by_name(pool)
    assert found and all(torch.equal(tensor, whole[name]) for name, tensor in found.items())


def test_seed_and_name_make_the_value(whole):
    other = by_name(initialised(seed=6))
    for name, tensor in whole.items():
        assert torch.equal(tensor, other[name]) == name.endswith("norm.weight"), name
    distinct = [tensor.flatten()[:8].tolist() for name, tensor in whole.items() if not name.endswith("norm.weight")]
    assert len({tuple(start) for start in distinct}) == len(distinct), "two weights start alike"


def test_initial_spread(whole):
    for name, tensor in whole.items():
        if name.endswith("norm.weight"):
            assert torch.equal(tensor, torch.ones_like(tensor))
        elif name.endswith("zero_computation.constant"):
            assert 0.7 < tensor.std() < 1.3, name  # 64 numbers each
        elif tensor.numel() >= 1024:
            assert 0.018 < tensor.std() < 0.022, name


def test_split_views_write_through():
    model = Transformer(CONFIG)
    for number, (_, view) in enumerate(by_name(model).items()):
        view.detach().fill_(number)
    for weight in weights(model):
        flat = torch.cat([view.flatten() for view in weight.split(weight.parameter).values()])
        assert torch.equal(weight.parameter.flatten().sort().values, flat.sort().values)
    experts = model.layers[0].mlp.experts
    names = list(by_name(model))
    first = names.index("layers.0.mlp.experts.1.gate_proj.weight")
    assert torch.equal(experts.gate_up[1], torch.tensor([[first]] * 32 + [[first + 1]] * 32).expand(64, 32))


def test_split_follows_a_tensor_shaped_like_the_parameter():
    """Optimizer moments and gradients have the same names."""
    model = Transformer(CONFIG, shards(CONFIG, 1, 2))
    for weight in weights(model):
        moments = torch.arange(weight.parameter.numel()).view_as(weight.parameter)
        views, own = weight.split(moments), weight.split(weight.parameter)
        assert views.keys() == own.keys()
        for name, view in views.items():
            assert view.shape == own[name].shape
            assert view.flatten()[0] == own[name].storage_offset() - weight.parameter.storage_offset()
