"""Every architecture through the same three checks: one rank, expert parallel, served split.

A row is a config of the same parts. Expert parallel must give the losses, the load and every gradient of one rank;
serving in two pools must give the tokens of serving joined.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import torch.distributed as dist
from numerics import assert_close
from ranks import run_threads
from test_link import answers
from tiny import VOCAB_SIZE, prepare_tiny_data, write_random_checkpoint

from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.dispatchers import AllToAllDispatcher, LocalDispatcher
from expertmesh.parallel.groups import Groups
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import initialise, weights
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.request import Request, Sampling
from expertmesh.system.serve.workers import attention_engine, joined_engine, run_ffn_worker
from expertmesh.system.train.loss import LanguageModelLoss

PLAIN = {"zero_experts": 0, "copy_experts": 0, "constant_experts": 0, "gating_residual": False}
GQA = {"heads": 4, "kv_heads": 2, "head_dim": 8}
MLA = {"kind": "mla", "heads": 4, "kv_rank": 12, "nope_head_dim": 8, "rope_head_dim": 4, "value_head_dim": 6}
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
    Variant("MoE++, gates as in the paper"),
    Variant("MoE++, gates as released", moe={"gate_mode": "released"}),
    Variant("MoE++, many of each kind", moe={"zero_experts": 2, "copy_experts": 3, "constant_experts": 4, "top_k": 4}),
    Variant("MoE++, a dense layer between", model={"dense_layers": [1], "dense": {"hidden_size": 40}}),
    Variant("Mixtral", moe={**PLAIN, "gate_mode": "mixtral"}, attention={**GQA, "sliding_window": 8}),
    Variant("Qwen3-MoE", moe={**PLAIN, "gate_mode": "mixtral"}, attention={**GQA, "qk_norm": "head"}),
    Variant("OLMoE", moe=PLAIN, attention={**GQA, "kv_heads": 4, "qk_norm": "width"}),
    Variant(
        "Qwen2-MoE",
        moe={**PLAIN, "shared": {"hidden_size": 20, "mixing": "sigmoid"}},
        attention={**GQA, "qkv_bias": True},
    ),
    Variant(
        "DeepSeek-V3",
        moe={**SIGMOID, "groups": {"count": 4, "chosen": 2}, "top_k": 3, "shared": {"hidden_size": 24}},
        attention={**MLA, "query_rank": 16},
        model={"dense_layers": [0], "dense": {"hidden_size": 40}},
    ),
    Variant("sigmoid gate without groups, latent attention without query rank", moe=SIGMOID, attention=MLA),
    Variant(
        "Step-3",
        moe={**PLAIN, "shared": {"hidden_size": 24}, "top_k": 3},
        attention={"heads": 4, "kv_heads": 1, "head_dim": 8, "query_rank": 12},
        model={"dense_layers": [0, 2], "dense": {"hidden_size": 40}},
    ),
    Variant("Llama, dense", moe=PLAIN, model={"dense_layers": [0, 1, 2], "dense": {"hidden_size": 40}}),
    Variant("tied embeddings, output bias", attention={**GQA, "output_bias": True}, model={"tie_embeddings": True}),
]
EACH = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)


def made(config: ModelConfig, rank: int = 0, size: int = 1) -> Transformer:
    model = Transformer(config, rank, size)
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
    config = variant.config()
    tokens_BS1 = torch.randint(0, VOCAB_SIZE, (4, 17), generator=torch.Generator().manual_seed(2))
    single = made(config)
    loss = LanguageModelLoss(single, LocalDispatcher(), Groups())(tokens_BS1)
    loss.total.backward()
    expected = gradients(single)

    def rank_main(group: dist.ProcessGroup) -> tuple[float, list[torch.Tensor], dict[str, torch.Tensor]]:
        model = made(config, group.rank(), group.size())
        groups = Groups(rank=group.rank(), data=group, expert=group)
        mine_BS1 = tokens_BS1.chunk(group.size())[group.rank()]
        part = LanguageModelLoss(model, AllToAllDispatcher(group, Traffic()), groups)(mine_BS1)
        part.total.backward()
        return part.total.item(), part.loads_N, gradients(model)

    ranks = run_threads(rank_main, 2)
    assert sum(total for total, _, _ in ranks) / 2 == pytest.approx(loss.total.item(), rel=2e-6)
    for _, loads_N, _ in ranks:
        assert all(torch.equal(found, wanted) for found, wanted in zip(loads_N, loss.loads_N, strict=True))
    for name, gradient in expected.items():
        # A rank's loss is the mean of its half of the tokens; whoever holds a weight has part of its gradient.
        parts = [found[name] for _, _, found in ranks if name in found]
        assert_close(torch.stack(parts).sum(0) / 2, gradient, max_error=2e-4, rms_error=2e-5, what=name)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("variants")
    prepare_tiny_data(run_dir)
    return run_dir


@EACH
def test_serving_split_says_what_joined_says(variant, tokenizer, tmp_path):
    shutil.copytree(tokenizer / "data" / "tokenizer", tmp_path / "data" / "tokenizer")
    checkpoint = write_random_checkpoint(tmp_path, variant.config())
    generator = torch.Generator().manual_seed(3)
    sampling = Sampling(max_tokens=16, temperature=0, ignore_eos=True)
    requests = [
        Request(f"r{n}", torch.randint(5, 300, (n,), generator=generator).tolist(), sampling) for n in (1, 12, 30)
    ]
    joined = answers(joined_engine(checkpoint, ServeConfig()), requests)

    store, config = dist.HashStore(), ServeConfig(micro_batches=2)
    store.set_timeout(timedelta(seconds=30))
    pool = [
        Thread(target=run_ffn_worker, args=(checkpoint, config, rank, 2, 1, store), daemon=True) for rank in range(2)
    ]
    for worker in pool:
        worker.start()
    split = answers(attention_engine(checkpoint, config, 0, 2, store), requests)
    assert split == joined


def test_selection_bias_moves_towards_an_even_load():
    config = VARIANTS[8].config()
    model = Transformer(config)
    initialise(model, seed=0, standard_deviation=0.02)
    model.balance([torch.tensor([9, 1, 4, 4, 4, 4, 4, 2]), torch.tensor([4] * 8)])
    bias_N = model.layers[1].mlp.gate.e_score_correction_bias
    assert_close(bias_N, 0.001 * torch.tensor([-1.0, 1, 0, 0, 0, 0, 0, 1]))
    assert not model.layers[2].mlp.gate.e_score_correction_bias.any()
