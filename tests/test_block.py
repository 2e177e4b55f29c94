"""How blocks are put together: layers that share their parts (WideNet, arXiv 2107.11817), and LayerNorm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import assert_close
from tiny import VOCAB_SIZE, context_of, tiny_model

from expertmesh.parallel.dispatchers import LocalDispatcher
from expertmesh.parallel.groups import Groups
from expertmesh.system.model.checkpoint import INDEX, load_weights, read_index, write_config, write_index, write_tensors
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.transformer import ExpertPool, Transformer
from expertmesh.system.model.weights import initialise, weights
from expertmesh.system.train.loss import LanguageModelLoss

LENGTH = 7
TOKENS_T = torch.randint(0, VOCAB_SIZE, (LENGTH,), generator=torch.Generator().manual_seed(0))


def shared(layers: int = 3, **changes: Any) -> ModelConfig:
    return tiny_model(layers=layers, moe={"gating_residual": False}, share_layers=True, **changes)


def model_of(config: ModelConfig, norms_differ: bool = True) -> Transformer:
    model = Transformer(config)
    initialise(model, 3, 0.2)
    for layer, block in enumerate(model.layers):
        if norms_differ:
            block.input_layernorm.weight.data += 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(layer))
            block.post_attention_layernorm.weight.data *= 1 + layer / 2
    return model


def test_layers_share_all_but_their_norms():
    model = model_of(shared())
    first, *others = model.layers
    for block in others:
        assert block.self_attn is first.self_attn and block.mlp is first.mlp
    names = {name for name, _ in model.named_parameters() if name.startswith(("layers.1.", "layers.2."))}
    norms = ("input_layernorm", "post_attention_layernorm")
    assert names == {f"layers.{layer}.{norm}.weight" for layer in (1, 2) for norm in norms}


@pytest.mark.parametrize("norm, each", [("rms", 2), ("layer", 4)])
def test_a_block_more_costs_its_norms(norm, each):
    """The paper's 4 D is that of LayerNorm, which has a bias."""
    sizes = [sum(p.numel() for p in Transformer(shared(layers, norm=norm)).parameters()) for layers in (1, 2, 7)]
    assert [size - sizes[0] for size in sizes] == [0, each * 32, 6 * each * 32]
    assert sizes == [shared(layers, norm=norm).num_params() for layers in (1, 2, 7)]
    assert shared(7, norm=norm).num_active_params() - shared(1, norm=norm).num_active_params() == 6 * each * 32


@torch.no_grad()
def test_with_equal_norms_every_block_is_the_same_function():
    x_TD = torch.randn(LENGTH, 32, generator=torch.Generator().manual_seed(1))
    for norms_differ in (False, True):
        model = model_of(shared(), norms_differ)
        answers = [block(x_TD, None, context_of(LENGTH)._replace(layer=i)) for i, block in enumerate(model.layers)]
        for y_TD, decided in answers[1:]:
            assert torch.equal(y_TD, answers[0][0]) == (not norms_differ)
            same_experts = torch.equal(decided.experts.experts_TK, answers[0][1].experts.experts_TK)
            assert same_experts == (not norms_differ), "other norms send a token to other experts"


@torch.no_grad()
def test_one_layer_equals_a_model_that_shares_nothing():
    one, plain = model_of(shared(1)), model_of(tiny_model(layers=1, moe={"gating_residual": False}))
    assert [name for name, _ in one.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert torch.equal(*(model(TOKENS_T, context_of(LENGTH)).hidden_TD for model in (one, plain)))


def test_losses_and_gradients_are_those_of_copies_of_the_layer():
    """The balance loss is added once for each use, and what the uses ask of a weight adds up."""
    one, copies = model_of(shared()), model_of(tiny_model(moe={"gating_residual": False}))
    of_one, of_copies = dict(one.named_parameters()), dict(copies.named_parameters())
    for name, parameter in of_copies.items():
        layer = name.split(".")[1]
        source = name if name in of_one else name.replace(f"layers.{layer}.", "layers.0.")
        parameter.data = of_one[source].detach().clone()
    tokens_BS1 = torch.cat([TOKENS_T, TOKENS_T[:1]])[None]
    losses = [LanguageModelLoss(model, LocalDispatcher(), Groups())(tokens_BS1) for model in (one, copies)]
    assert len(losses[0].balance_L) == 3
    assert torch.equal(losses[0].balance_L, losses[1].balance_L)
    weighted = losses[0].cross_entropy + 0.01 * losses[0].balance_L.sum()
    assert_close(losses[0].total, weighted)
    for loss in losses:
        loss.total.backward()
    for name, parameter in of_one.items():
        uses = [name]
        if name.startswith("layers.0.") and "norm" not in name:
            uses = [name.replace("layers.0.", f"layers.{layer}.") for layer in range(3)]
        summed = torch.stack([of_copies[use].grad for use in uses]).sum(0)
        assert_close(parameter.grad, summed, max_error=2e-4, rms_error=2e-5, what=name)


def write(model: Transformer, folder: Path) -> None:
    folder.mkdir()
    write_config(folder, model.config)
    tensors = {name: view for weight in weights(model) for name, view in weight.split(weight.parameter).items()}
    write_tensors(tensors, folder / "model.safetensors")
    write_index(folder / INDEX, [folder / "model.safetensors"])


@pytest.mark.parametrize("tie", [False, True], ids=["head of its own", "tied embeddings"])
def test_a_checkpoint_holds_shared_weights_once_and_loads(tmp_path, tie):
    model = model_of(shared(tie_embeddings=tie))
    write(model, tmp_path / "saved")
    names = set(read_index(tmp_path / "saved" / INDEX))
    assert {n for n in names if "norm" not in n and n.startswith("layers.")} == {
        n for n in names if "norm" not in n and n.startswith("layers.0.")
    }
    assert ("lm_head.weight" in names) == (not tie)

    again = Transformer(model.config)
    load_weights(again, tmp_path / "saved")
    for (name, loaded), original in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(loaded, original), name
    for rank in range(2):
        pool = ExpertPool(model.config, rank, 2)
        load_weights(pool, tmp_path / "saved")
        held = slice(2 * rank, 2 * rank + 2)
        assert torch.equal(pool.layers[0]["mlp"]["experts"].down, model.layers[0].mlp.experts.down[held])
        assert len(pool.held[0]) == 2 and len(list(pool.parameters())) == 2


def test_layer_norm_takes_the_mean_away_and_adds_a_bias():
    model = model_of(tiny_model(layers=1, norm="layer"))
    norm, x_TD = model.layers[0].input_layernorm, torch.randn(3, 32, generator=torch.Generator().manual_seed(1)) + 5
    assert torch.equal(norm.bias, torch.zeros(32)), "initialised to 0"
    norm.bias.data += 0.25
    wide_TD = x_TD.double()
    centred_TD = wide_TD - wide_TD.mean(1, keepdim=True)
    want_TD = centred_TD / (centred_TD.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight.double() + 0.25
    assert_close(norm(x_TD), want_TD)
