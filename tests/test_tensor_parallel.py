"""How a model is cut into the parts of tensor-parallel ranks: which parts, what is refused, and Megatron's layers.

That the parts train what the whole trains is shown, layout by layout, in test_parallel.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from numerics import assert_close
from ranks import run_ranks, run_threads
from tiny import tiny_model
from torch import nn

from expertmesh.parallel.groups import Groups, build_groups
from expertmesh.parallel.shard import WHOLE
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.parallel.token_split import TokenSplit
from expertmesh.system.model.check_split import check_split
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.tensor_parallel import SplitEmbedding, parallel_transformer
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import initialise, weights

CHANGES: list[tuple[dict[str, Any], str]] = [
    ({}, "grouped queries, routed experts"),
    ({"tie_embeddings": True, "dense_layers": (1,), "dense": {"hidden_size": 40}}, "tied, a dense layer"),
    (
        {"moe": {"shared": {"hidden_size": 24, "mixing": "sigmoid"}}, "share_layers": True},
        "a shared expert, one for all",
    ),
]


def config_of(changes: dict[str, Any]) -> ModelConfig:
    if changes.get("share_layers"):
        changes = changes | {"moe": changes["moe"] | {"gating_residual": False}}
    return ModelConfig(**tiny_model(**changes).model_dump())


@pytest.mark.parametrize("changes, reason", CHANGES, ids=[reason for _, reason in CHANGES])
def test_parts_are_those_of_the_whole_and_cover_it(changes, reason):
    config, ranks = config_of(changes), 2
    whole = Transformer(config)
    initialise(whole, seed=3, standard_deviation=0.2)
    full = {name: view for w in weights(whole) for name, view in w.split(w.parameter.detach()).items()}

    def rank_main(group: dist.ProcessGroup) -> dict[str, int]:
        groups = Groups(rank=group.rank(), tensor=group, token=group, expert_tensor=group)
        model = parallel_transformer(config, groups)
        initialise(model, seed=3, standard_deviation=0.2)
        assert model.config == config
        sizes = {}
        for weight in weights(model):
            assert weight.shard in (WHOLE, weight.shard._replace(rank=group.rank(), of=ranks))
            for name, view in weight.split(weight.parameter.detach()).items():
                assert torch.equal(view, full[name][weight.shard.place(view.shape)]), name
                sizes[name] = view.numel() * weight.shard.of
        return sizes

    expected = {name: math.prod(tensor.shape) for name, tensor in full.items()}
    for sizes in run_threads(rank_main, ranks):
        assert sizes == expected


def test_what_a_rank_holds_is_about_its_share():
    config = tiny_model(dense_layers=(0, 1, 2), dense={"hidden_size": 64})

    def count(group: dist.ProcessGroup) -> int:
        model = parallel_transformer(config, Groups(rank=group.rank(), tensor=group, token=group))
        return sum(parameter.numel() for parameter in model.parameters())

    norms = (2 * config.layers + 1) * config.hidden_size
    assert run_threads(count, 2) == [(config.num_params() - norms) // 2 + norms] * 2


def test_a_vocabulary_in_runs():
    table_VD, tokens_T = torch.randn(6, 3), torch.tensor([0, 5, 2, 3])

    def rank_main(group: dist.ProcessGroup) -> torch.Tensor:
        part = nn.Parameter(table_VD.chunk(2)[group.rank()])
        return SplitEmbedding(part, group.rank(), TokenSplit(group))(tokens_T).detach()

    assert torch.equal(torch.cat(run_threads(rank_main, 2)), table_VD[tokens_T])


MIXTURE = {"kind": "mixture", "experts": 2, "top_k": 1, "heads": 2, "kv_heads": 2, "head_dim": 8}
VERSATILE = {"kind": "versatile", "hidden_size": 32}
REFUSED: list[tuple[dict[str, Any], int, int, str, str]] = [
    ({}, 3, 1, "model.attention.heads=4: parallel.tp=3 does not divide it", "heads"),
    (
        {},
        4,
        1,
        "model.attention.kv_heads=2: parallel.tp=4 does not divide it; take a multiple of 4, or tp one of [1, 2]",
        "fewer key-value heads than ranks",
    ),
    ({"vocab_size": 511}, 2, 1, "model.vocab_size=511: parallel.tp=2 does not divide it", "an odd vocabulary"),
    ({"moe": {"shared": {"hidden_size": 7}}}, 2, 1, "model.moe.shared.hidden_size=7: parallel.tp=2", "shared expert"),
    (
        {"dense_layers": (0,), "dense": {"hidden_size": 9}},
        2,
        1,
        "model.dense.hidden_size=9: parallel.tp=2 does not divide it",
        "dense network",
    ),
    (
        {"dense_layers": (0,), "dense": VERSATILE},
        2,
        1,
        "model.dense.kind=versatile: this kind of network is not split over ranks yet; take parallel.tp=1, not 2",
        "a network that loops",
    ),
    ({}, 1, 3, "model.moe.expert.hidden_size=32: parallel.etp=3 does not divide it", "hidden units of experts"),
    (
        {"moe": {"expert": {"kind": "spark", "hidden_size": 32, "kept": 4}}},
        1,
        2,
        "model.moe.expert.kind=spark: this kind of network is not split over ranks yet; take parallel.etp=1, not 2",
        "experts whose units know of each other",
    ),
    (
        {"moe": {"expert": {"hidden_size": 32, "nested": [0.5, 1]}}},
        1,
        2,
        "model.moe.expert.nested: prefixes of the hidden units are not split over ranks yet",
        "nested experts",
    ),
    (
        {"attention": MIXTURE},
        2,
        1,
        "model.attention.kind=mixture: attention experts are not split",
        "attention experts",
    ),
    (
        {"attention": {"heads": 4, "kv_heads": 2, "head_dim": 8, "qk_norm": "width"}},
        2,
        1,
        "model.attention.qk_norm=width: a norm over all heads is not split over ranks yet",
        "a norm over all heads",
    ),
    (
        {"attention": {"heads": 4, "kv_heads": 2, "head_dim": 8, "output_bias": True}},
        2,
        1,
        "model.attention.output_bias=true: a bias behind a sum over ranks is not split over ranks yet",
        "it would be added by each rank",
    ),
    (
        {"depth": {"layers": [1]}, "moe": {"gating_residual": False}},
        2,
        1,
        "model.depth: the choice among all tokens of a sequence is not split over ranks yet",
        "mixture of depths",
    ),
]


@pytest.mark.parametrize("changes, tp, etp, words, reason", REFUSED, ids=[reason for *_, reason in REFUSED])
def test_what_cannot_be_split_is_refused_in_one_line(changes, tp, etp, words, reason):
    config, sizes = config_of(changes), ParallelSizes(tp=tp, etp=etp, dp=etp)
    check_split(config, ParallelSizes())
    with pytest.raises(ValueError) as error:
        check_split(config, sizes)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_context_parallel_has_no_mixture_of_depths():
    config = config_of({"depth": {"layers": [1]}, "moe": {"gating_residual": False}})
    with pytest.raises(ValueError, match="model.depth: .*; take parallel.cp=1, not 2"):
        check_split(config, ParallelSizes(cp=2))


def test_a_vocabulary_that_is_not_known_yet_is_not_looked_at():
    check_split(tiny_model(vocab_size=None), ParallelSizes(tp=2, etp=2))


def check_against_megatron() -> None:
    """Its column- and row-parallel linear maps with an all-reduce; ours with tokens gathered and scattered."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    groups = build_groups(ParallelSizes(tp=2))
    config = tiny_model(dense_layers=(0, 1, 2), dense={"kind": "mlp", "hidden_size": 24, "activation": "relu"})
    model = parallel_transformer(config, groups)
    initialise(model, seed=3, standard_deviation=0.2)
    mlp = model.layers[0].mlp

    cpu = {"use_cpu_initialization": True, "gradient_accumulation_fusion": False}
    theirs = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2, tensor_model_parallel_size=2, **cpu)
    common = {"config": theirs, "init_method": nn.init.zeros_, "bias": False, "skip_bias_add": False}
    up = ColumnParallelLinear(32, 24, gather_output=False, **common)
    down = RowParallelLinear(24, 32, input_is_parallel=True, **common)
    up.weight.data, down.weight.data = mlp.up_proj.weight.data.clone(), mlp.down_proj.weight.data.clone()

    generator = torch.Generator().manual_seed(4)
    x_TD, grad_TD = torch.randn(6, 32, generator=generator), torch.randn(6, 32, generator=generator)
    all_TD = x_TD.clone().requires_grad_()
    wanted_TD = down(torch.relu(up(all_TD)[0]))[0]
    wanted_TD.backward(grad_TD)
    tokens = TokenSplit(groups.tensor)
    mine_TD = tokens.mine(x_TD).clone().requires_grad_()
    got_TD = mlp(mine_TD, None, None)[0]
    got_TD.backward(tokens.mine(grad_TD))

    assert_close(got_TD, tokens.mine(wanted_TD), what="answers")
    assert_close(mine_TD.grad, tokens.mine(all_TD.grad), what="gradient of tokens")
    assert_close(mlp.up_proj.weight.grad, up.weight.grad, what="gradient of the column-parallel weight")
    assert_close(mlp.down_proj.weight.grad, down.weight.grad, what="gradient of the row-parallel weight")


def test_a_split_network_is_megatrons():
    run_ranks(check_against_megatron, 2)
