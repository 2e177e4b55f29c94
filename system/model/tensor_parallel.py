"""A model whose weights are split over the ranks of a tensor-parallel group, made of the model that knows of none.

A rank holds a narrower model: some of the heads, some of the hidden units of dense networks, shared experts and routed
experts, a run of the vocabulary. So it is built by the same classes from a narrower config, and its halves compute
parts of a sum. What is added from outside is the way of the tokens into and out of such a half (token_split.py), by
hooks, and a mark on each parameter that says which part of the full weight it is (shard.py).

    embedding [V/tp]   reduce-scatter   norm [T/tp]   gather   heads/tp   reduce-scatter   + residual [T/tp]   ...
    ...   norm [T/tp]   router, dispatch, F/etp of each expert   + residual [T/tp]   norm   gather   head [V/tp]

That is Megatron's split (arXiv 1909.08053, section 3; with sequence parallelism, arXiv 2205.05198), and gives what its
column- and row-parallel layers give; those move tokens in each linear map, by calls that name CUDA.

Weights that are not split, such as norms and routers, see a rank's own tokens, or give their answer to its own heads:
either way each rank has a part of their gradient, and the sum over the group is the whole.

Legend: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import nn

from expertmesh.parallel.groups import Groups
from expertmesh.parallel.pipeline import runs_of_layers
from expertmesh.parallel.placement import expert_shard
from expertmesh.parallel.shard import Shard, mark
from expertmesh.parallel.token_split import TokenSplit
from expertmesh.system.model.attention import Attention
from expertmesh.system.model.attention_config import AttentionConfig
from expertmesh.system.model.block import Elsewhere
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.dense import MLP, SwiGLU
from expertmesh.system.model.experts import MLPExperts, SwiGLUExperts
from expertmesh.system.model.latent_attention import LatentAttention
from expertmesh.system.model.transformer import Transformer

# Of each class that is split, which linear map along which dimension: 0 its outputs (column), 1 its inputs (row).
LINEAR_MAPS: dict[type[nn.Module], dict[str, int]] = {
    Attention: {"q_proj": 0, "q_b_proj": 0, "k_proj": 0, "v_proj": 0, "gate_proj": 0, "o_proj": 1},
    LatentAttention: {"q_proj": 0, "q_b_proj": 0, "kv_b_proj": 0, "o_proj": 1},
    SwiGLU: {"gate_proj": 0, "up_proj": 0, "down_proj": 1},
    MLP: {"up_proj": 0, "down_proj": 1},
}
# Of each kind of experts that is split, which parameter along which dimension of one expert's tensor.
EXPERT_WEIGHTS: dict[type[nn.Module], dict[str, int]] = {
    SwiGLUExperts: {"gate_up": 0, "down": 1},
    MLPExperts: {"up": 0, "down": 1},
}


def parallel_transformer(config: ModelConfig, groups: Groups) -> Transformer:
    """The part of a model of `config` that a rank of `groups` holds; weights are uninitialised.

    Its `config` is that of the whole model, which `check_split` has nothing against.
    """
    narrow = _narrow(config, groups.tensor_size, groups.expert_tensor_size)
    stages = groups.pipeline_size * groups.interleave
    runs = runs_of_layers(config.layers, stages)[groups.pipeline_rank :: groups.pipeline_size]
    model = Transformer(narrow, _shards(config, groups), runs)
    model.config = config
    if groups.expert_tensor is not None:
        _mark_experts(model, groups)
    if groups.tensor is not None:
        _split_halves(model, groups)
    return model


def _shards(config: ModelConfig, groups: Groups) -> list[range]:
    """The FFN experts of each layer that a rank holds."""
    held = [range(0)] * config.layers
    for layer in config.moe_layers:
        experts = config.moe_of(layer).ffn_experts
        of_layer = groups.of_layer(experts)
        held[layer] = expert_shard(experts, of_layer.expert_rank, of_layer.expert_size)
    return held


def _narrow(config: ModelConfig, tp: int, etp: int) -> ModelConfig:
    """The config of one rank's part."""
    attention, moe = config.attention, config.moe
    heads = ("heads", "kv_heads") if isinstance(attention, AttentionConfig) else ("heads",)
    changes: dict[str, Any] = {"attention": _divided(attention, tp, *heads)} if tp > 1 else {}
    if tp > 1 and config.dense is not None:
        changes["dense"] = _divided(config.dense, tp, "hidden_size")
    if tp > 1 and config.vocab_size is not None:
        changes["vocab_size"] = config.vocab_size // tp
    of_moe: dict[str, Any] = {}
    if tp > 1 and moe.shared is not None:
        of_moe["shared"] = _divided(moe.shared, tp, "hidden_size")
    if etp > 1:
        of_moe["expert"] = _divided(moe.expert, etp, "hidden_size")
    return config.model_copy(update=changes | {"moe": moe.model_copy(update=of_moe)})


def _divided(section: BaseModel, ranks: int, *keys: str) -> BaseModel:
    return section.model_copy(update={key: getattr(section, key) // ranks for key in keys})


def _mark_experts(model: Transformer, groups: Groups) -> None:
    place = (groups.expert_tensor_rank, groups.expert_tensor_size)
    for module in model.modules():
        for name, dim in EXPERT_WEIGHTS.get(type(module), {}).items():
            mark(getattr(module, name), Shard(dim, *place))


def _split_halves(model: Transformer, groups: Groups) -> None:
    place, tokens = (groups.tensor_rank, groups.tensor_size), TokenSplit(groups.tensor)

    def enter(where: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tokens.gather(args[0], where), *args[1:]

    def leave(where: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):  # an answer, and what was decided on the way
            return tokens.reduce_scatter(output[0], where), *output[1:]
        return tokens.reduce_scatter(output, where)

    for path, module in model.named_modules():
        for kind, maps in LINEAR_MAPS.items():
            if not isinstance(module, kind):
                continue
            where = f"layer {path.split('.')[1]}"
            module.register_forward_pre_hook(partial(enter, where))
            module.register_forward_hook(partial(leave, where))
            for name, dim in maps.items():
                for parameter_name, parameter in _parameters_of(module, name):
                    assert dim == 0 or parameter_name != "bias", "a bias behind a sum over ranks"
                    mark(parameter, Shard(dim, *place))

    if not isinstance(model.embed_tokens, Elsewhere):
        model.embed_tokens = SplitEmbedding(model.embed_tokens.weight, groups.tensor_rank, tokens)
    model.lm_head.register_forward_pre_hook(partial(enter, "head"))
    for part in (model.embed_tokens, model.lm_head):
        for weight in part.parameters():  # one and the same where they are tied
            mark(weight, Shard(0, *place))


def _parameters_of(module: nn.Module, name: str) -> list[tuple[str, nn.Parameter]]:
    """Those of a linear map that some forms of the module lack."""
    part = getattr(module, name, None)
    return [] if part is None else list(part.named_parameters())


class SplitEmbedding(nn.Module):
    """Vectors of a run of the vocabulary; takes all T token ids, answers this rank's tokens."""

    def __init__(self, weight: nn.Parameter, rank: int, tokens: TokenSplit) -> None:
        super().__init__()
        self.weight, self.tokens = weight, tokens
        self.first = rank * len(weight)

    def forward(self, tokens_T: torch.Tensor) -> torch.Tensor:
        inside_T = tokens_T - self.first
        here_T = (inside_T >= 0) & (inside_T < len(self.weight))
        x_TD = F.embedding(inside_T.where(here_T, 0), self.weight) * here_T[:, None]
        return self.tokens.reduce_scatter(x_TD, "embedding")
