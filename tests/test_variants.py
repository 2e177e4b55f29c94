"""Every architecture through the same three checks: one rank, expert parallel, served split.

Each shipped recipe is one; the rows below add what the recipes leave out. Expert parallel must give the losses, the
load and every gradient of one rank; serving in two pools must give the tokens of serving joined.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from numerics import assert_close
from ranks import run_threads
from serving import answers, split_in_threads
from tiny import VOCAB_SIZE, prepare_tiny_data, write_random_checkpoint

from expertmesh.launch.recipe import load_recipe, shipped_recipes
from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.dispatchers import AllToAllDispatcher, LocalDispatcher
from expertmesh.parallel.groups import Groups
from expertmesh.system.model.checkpoint import open_checkpoint
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.context import TrainingStep
from expertmesh.system.model.transformer import Transformer, shards
from expertmesh.system.model.weights import initialise, weights
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.request import Request, Sampling
from expertmesh.system.serve.workers import joined_engine
from expertmesh.system.train.loss import BatchLoss, LanguageModelLoss

PLAIN = {"zero_experts": 0, "copy_experts": 0, "constant_experts": 0, "gating_residual": False}
MLPS = {
    "moe": {**PLAIN, "expert": {"kind": "mlp", "hidden_size": 24}},
    "model": {"dense_layers": [0], "dense": {"kind": "mlp", "hidden_size": 40, "activation": "relu"}},
}
GQA = {"heads": 4, "kv_heads": 2, "head_dim": 8}
MLA = {"kind": "mla", "heads": 4, "kv_rank": 12, "nope_head_dim": 8, "rope_head_dim": 4, "value_head_dim": 6}
MIXTURE = {"kind": "mixture", "experts": 4, "top_k": 4, "heads": 4, "kv_heads": 2, "head_dim": 8}
GELU_GATE = {"hidden_size": 16, "activation": "gelu", "bias": True}
BAM = {
    "moe": {**PLAIN, "top_k": 1, "balance_loss": "switch", "z_loss_weight": 0.01},
    "model": {"block": "parallel"},
}
STRUCTURED = {"kind": "structured", "hidden_size": 24}
GSHARD = {**PLAIN, "balance_loss": "gshard"}
TIGHT = {"factor": 0.75, "order": "random"}  # so small that every layer drops some slots
SIGMOID = {**PLAIN, "gate_mode": "sigmoid", "selection_bias": True, "gate_scale": 2.5, "ffn_experts": 8}


@dataclass(frozen=True)
class Variant:
    name: str
    moe: dict[str, Any] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    def config(self) -> ModelConfig:
        moe = {"ffn_experts": 4, "expert": {"hidden_size": 24}, "balance_loss_weight": 0.1, **self.moe}
        shape = {"vocab_size": VOCAB_SIZE, "layers": 3, "hidden_size": 32, "context_length": 64}
        return ModelConfig(**shape, moe=moe, attention=self.attention or GQA, **self.model)


VARIANTS = [
    Variant("MoE++, gates as released", moe={"gate_mode": "released"}),
    Variant("MoE++, many of each kind", moe={"zero_experts": 2, "copy_experts": 3, "constant_experts": 4, "top_k": 4}),
    Variant("MoE++, a dense layer between", model={"dense_layers": [1], "dense": {"hidden_size": 40}}),
    Variant("sigmoid gate without groups, latent attention without query rank", moe=SIGMOID, attention=MLA),
    Variant("GPT, dense and routed MLPs", **MLPS),
    Variant(
        "StructuredFFN, block-dense",
        moe={"expert": {**STRUCTURED, "form": "block_dense", "rank": 8, "blocks": 2}},
    ),
    Variant(
        "StructuredFFN, guided",
        moe={"expert": {**STRUCTURED, "form": "block_shuffle", "blocks": 2, "guided": True}},
    ),
    Variant("Spark, gate and up of the whole token", moe={"expert": {"kind": "spark", "hidden_size": 24, "kept": 4}}),
    Variant("MoFME among zero-computation experts", moe={"expert": {"kind": "modulated", "adaptor_size": 20}}),
    Variant(
        "VersatileFFN in dense layers among the others",
        model={"dense_layers": [0, 2], "dense": {"kind": "versatile", "hidden_size": 24, "slices": 6, "loops": 3}},
    ),
    Variant("gated attention, a gate for each number", attention={**GQA, "output_gate": "element"}),
    Variant("stick-breaking attention", attention={**GQA, "rope_theta": None, "weighting": "stick_breaking"}),
    Variant("BAM, shared keys and values", attention=MIXTURE, **BAM),
    Variant(
        "DeepSpeed-MoE, top-1 with random token selection",
        moe={**GSHARD, "top_k": 1, "noise": "jitter", "capacity": TIGHT},
        model={"dense_layers": [0], "dense": {"kind": "mlp", "hidden_size": 40}},
    ),
    Variant("DeepSpeed-MoE, top-1 by lot", moe={**GSHARD, "top_k": 1, "noise": "gumbel", "capacity": TIGHT}),
    Variant(
        "DeepSpeed-MoE, top-2",
        moe={**GSHARD, "gate_mode": "mixtral", "noise": "gumbel_second", "capacity": {"factor": 0.75}},
    ),
    Variant("pyramid with zero-computation experts", moe={"ffn_experts": [2, 8, 4], "gating_residual": False}),
    Variant(
        "WideNet",
        moe={
            **PLAIN,
            "expert": {"kind": "mlp", "hidden_size": 24},
            "noise": "normal",
            "balance_loss": "switch",
            "capacity": {"factor": 0.75},
        },
        model={"share_layers": True, "norm": "layer"},
    ),
    Variant("MoE++, the released router", moe={"gate_mode": "released", "gate": {"hidden_size": 9}, "logits_norm": 1}),
    Variant("MoE++, heterogeneous capacity", moe={"capacity": {"factor": 0.75}}),
    Variant(
        "mixture of depths, one router",
        moe={"gating_residual": False, "capacity": TIGHT},
        attention={**GQA, "sliding_window": 8},
        model={"depth": {"layers": [0, 2], "kept": 0.4}},
    ),
    Variant(
        "mixture of depths, a router for each layer",
        moe={**PLAIN, "noise": "jitter"},
        attention=MLA,
        model={"depth": {"layers": [1, 2], "shared_router": False}, "dense_layers": [2], "dense": {"hidden_size": 40}},
    ),
    Variant("tied embeddings, output bias", attention={**GQA, "output_bias": True}, model={"tie_embeddings": True}),
]


class Shipped:
    """A recipe's architecture, with the vocabulary of these tests."""

    def __init__(self, name: str) -> None:
        self.name = name

    def config(self) -> ModelConfig:
        return load_recipe(self.name, []).model.model_copy(update={"vocab_size": VOCAB_SIZE})


EACH = pytest.mark.parametrize(
    "variant", [*map(Shipped, shipped_recipes()), *VARIANTS], ids=lambda variant: variant.name
)


def made(config: ModelConfig, rank: int = 0, size: int = 1) -> Transformer:
    model = Transformer(config, shards(config, rank, size))
    initialise(model, seed=5, standard_deviation=0.2)
    for layer in config.moe_layers:
        bias = model.layers[layer].mlp.gate.e_score_correction_bias
        if bias is not None:  # large enough to change who is chosen
            bias.data = torch.linspace(-0.2, 0.2, len(bias)).roll(layer)
    return model


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    found = {}
    for weight in weights(model):
        if weight.parameter.requires_grad:
            assert weight.parameter.grad is not None, f"no gradient of {list(weight.split(weight.parameter))[0]}"
            found.update(weight.split(weight.parameter.grad))
    return found


@EACH
def test_parameters_are_counted(variant):
    config = variant.config()
    assert config.num_params() == sum(p.numel() for p in Transformer(config).parameters())


@EACH
def test_expert_parallel_equals_one_rank(variant):
    """A step of training, with its noise, lots and dropped slots; then validation, which has none.

    In float64, but for routers: in float32 some gradients of two numbers nearly cancel, and rounding is what is left.
    """
    config = variant.config()
    tokens_BS1 = torch.randint(0, VOCAB_SIZE, (4, 17), generator=torch.Generator().manual_seed(2))

    def both(loss: LanguageModelLoss, sequences: range) -> tuple[BatchLoss, BatchLoss]:
        mine_BS1 = tokens_BS1[sequences.start : sequences.stop]
        trained = loss(mine_BS1, TrainingStep(3, 10, 7, sequences, 16))
        trained.total.backward()
        with torch.no_grad():
            return trained, loss(mine_BS1)

    single = made(config).double()
    whole = both(LanguageModelLoss(single, LocalDispatcher(), Groups()), range(4))
    expected = gradients(single)
    if config.moe.capacity and config.moe.capacity.factor < 1:
        assert whole[0].dropped_L.all() and not whole[1].dropped_L.any()

    def rank_main(group: dist.ProcessGroup) -> tuple[tuple[BatchLoss, BatchLoss], dict[str, torch.Tensor]]:
        model = made(config, group.rank(), group.size()).double()
        groups = Groups(rank=group.rank(), data=group, token=group, expert=group)
        loss = LanguageModelLoss(model, AllToAllDispatcher(group, Traffic()), groups)
        return both(loss, range(2 * group.rank(), 2 * group.rank() + 2)), gradients(model)

    ranks = run_threads(rank_main, 2)
    for pass_, wanted in enumerate(whole):
        parts = [losses[pass_] for losses, _ in ranks]
        # Where validation sends unequal numbers of tokens through a layer, only cross entropy is a mean over ranks.
        for name in ("cross_entropy",) if pass_ else ("total", "cross_entropy", "balance_L", "z_L", "entropy_L"):
            mean = torch.stack([getattr(part, name) for part in parts]).mean(0)
            assert_close(mean, getattr(wanted, name), what=name)
        for part in parts:
            assert torch.equal(part.dropped_L, wanted.dropped_L)
            assert all(torch.equal(mine, all_) for mine, all_ in zip(part.loads_N, wanted.loads_N, strict=True))
    for name, gradient in expected.items():
        # A rank's loss is the mean of its half of the tokens; whoever holds a weight has part of its gradient.
        of_ranks = [found[name] for _, found in ranks if name in found]
        assert_close(torch.stack(of_ranks).sum(0) / 2, gradient, max_error=5e-6, rms_error=1e-6, what=name)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("variants")
    prepare_tiny_data(run_dir)
    return run_dir


@EACH
def test_serving_split_says_what_joined_says(variant, tokenizer, tmp_path):
    shutil.copytree(tokenizer / "data" / "tokenizer", tmp_path / "data" / "tokenizer")
    checkpoint = open_checkpoint(write_random_checkpoint(tmp_path, variant.config()))
    generator = torch.Generator().manual_seed(3)
    sampling = Sampling(max_tokens=16, temperature=0, ignore_eos=True)
    requests = [
        Request(f"r{n}", torch.randint(5, 300, (n,), generator=generator).tolist(), sampling) for n in (1, 12, 30)
    ]
    joined = answers(joined_engine(checkpoint, ServeConfig()), requests)

    for micro_batches, (attention, ffn) in enumerate([(1, 1), (2, 1), (1, 2), (2, 3)], 1):
        config = ServeConfig(micro_batches=micro_batches)
        assert split_in_threads(checkpoint, config, attention, ffn, requests) == [joined] * attention, (attention, ffn)


def test_selection_bias_moves_towards_an_even_load():
    config = Variant("sigmoid", moe=SIGMOID, model={"dense_layers": [0], "dense": {"hidden_size": 40}}).config()
    model = Transformer(config)
    initialise(model, seed=0, standard_deviation=0.02)
    model.balance([torch.tensor([9, 1, 4, 4, 4, 4, 4, 2]), torch.tensor([4] * 8)])
    bias_N = model.layers[1].mlp.gate.e_score_correction_bias
    assert_close(bias_N, 0.001 * torch.tensor([-1.0, 1, 0, 0, 0, 0, 0, 1]))
    assert not model.layers[2].mlp.gate.e_score_correction_bias.any()
