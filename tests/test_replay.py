"""A replayed pass uses the experts of the pass that was recorded, with weights and gradients of its own logits."""

from __future__ import annotations

import copy

import pytest
import torch
from numerics import assert_close
from tiny import tiny_model, training_step

from expertmesh.parallel.dispatchers import LocalDispatcher
from expertmesh.parallel.groups import Groups
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.context import Decisions
from expertmesh.system.model.replay import choices_of_layer, read_choices, recorded, write_choices
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import initialise
from expertmesh.system.train.loss import BatchLoss, LanguageModelLoss

TOKENS = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(1))
CASES = [
    ({}, "MoE++: softmax over all experts, residuals between routers"),
    ({"gate_mode": "released"}, "renormalised, zero experts weigh nothing"),
    ({"gate_mode": "mixtral", "top_k": 3}, "softmax over the chosen"),
    ({"gate_mode": "sigmoid", "gating_residual": False, "selection_bias": True}, "sigmoid scores, a selection bias"),
    ({"capacity": {"factor": 0.5}}, "full experts drop the same slots"),
    ({"top_k": 1}, "k is 1"),
]
EACH = pytest.mark.parametrize("moe, reason", CASES, ids=[reason for _, reason in CASES])


def loss_of(config: ModelConfig) -> LanguageModelLoss:
    model = Transformer(config)
    initialise(model, seed=1, standard_deviation=0.2)
    return LanguageModelLoss(model, LocalDispatcher(), Groups())


def choices_in(loss: LanguageModelLoss, *args) -> tuple[BatchLoss, dict[int, torch.Tensor], list]:
    """The loss, the choices that were made, and the decisions they are of."""
    seen: list[Decisions] = []
    hooks = [
        block.register_forward_hook(lambda _, given, output: seen.append(output[1])) for block in loss.model.layers
    ]
    batch = loss(*args)
    for hook in hooks:
        hook.remove()
    return batch, recorded(seen), seen


def gradients(loss: LanguageModelLoss) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}


@EACH
def test_replaying_its_own_choices_changes_nothing(moe, reason):
    loss = loss_of(tiny_model(moe=moe))
    step = training_step(8, range(2))
    plain, choices, _ = choices_in(loss, TOKENS, step)
    plain.total.backward()
    expected = gradients(loss)
    loss.zero_grad()
    replayed = loss(TOKENS, step, choices)
    replayed.total.backward()
    assert torch.equal(replayed.total, plain.total)
    assert torch.equal(replayed.dropped_L, plain.dropped_L)
    for name, gradient in gradients(loss).items():
        assert torch.equal(gradient, expected[name]), name


@EACH
def test_other_weights_use_the_recorded_experts_by_their_own_logits(moe, reason):
    config = tiny_model(moe={**moe, "capacity": None})
    _, choices, _ = choices_in(loss_of(config), TOKENS)
    other = loss_of(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    _, free, _ = choices_in(copy.deepcopy(other), TOKENS)
    assert any(not torch.equal(free[layer], choices[layer]) for layer in choices)  # it would have chosen otherwise

    batch, replayed, decisions = choices_in(other, TOKENS, None, choices)
    zero_from = config.moe.num_experts - config.moe.zero_experts
    for layer, chosen_TK in choices.items():
        assert torch.equal(replayed[layer], chosen_TK)
        routing = decisions[layer].experts
        logits_TN = routing.scores_TN.double()
        scores_TK = (logits_TN.sigmoid() if config.moe.gate_mode == "sigmoid" else logits_TN.softmax(1)).gather(
            1, chosen_TK
        )
        if config.moe.gate_mode == "released":
            scores_TK = scores_TK.masked_fill(chosen_TK >= zero_from, 0)
        if config.moe.gate_mode != "paper":
            scores_TK = scores_TK / scores_TK.sum(1, keepdim=True).clamp_min(1e-30)
        assert_close(routing.weights_TK, scores_TK * config.moe.gate_scale, what=f"weights of layer {layer}")
    batch.total.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(other).values())
    assert other.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_choices_survive_a_file(tmp_path):
    steps = {
        3: {0: torch.tensor([[1, 5], [300, 2]]), 2: torch.tensor([[7, 0], [0, 1]])},
        12: {0: torch.empty(0, 2).long()},
    }
    write_choices(tmp_path / "choices.safetensors", steps)
    back = read_choices(tmp_path / "choices.safetensors")
    assert back.keys() == steps.keys()
    for step, choices in steps.items():
        assert back[step].keys() == choices.keys()
        assert all(torch.equal(back[step][layer], chosen_TK) for layer, chosen_TK in choices.items())
    assert [path.name for path in tmp_path.iterdir()] == ["choices.safetensors"]


@pytest.mark.parametrize(
    "layer, tokens, words",
    [
        (1, 2, "replay has no choices for layer 1; it has them for layers [0, 2]"),
        (0, 3, "replay of layer 0 is of 2x2 choices, the pass makes 3x2"),
    ],
)
def test_a_record_of_something_else_is_refused(layer, tokens, words):
    replay = {0: torch.zeros(2, 2), 2: torch.zeros(2, 2)}
    with pytest.raises(ValueError) as error:
        choices_of_layer(replay, layer, tokens, 2)
    assert str(error.value) == words
