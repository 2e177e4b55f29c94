"""The optimizer of a rank's weights, by the ZeRO stage that a recipe asks for."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection

import torch
from torch import nn

from expertmesh.parallel.fully_sharded import FullySharded, Units
from expertmesh.parallel.optimizer import TrainingOptimizer
from expertmesh.parallel.shard import WHOLE, mark, shard_of
from expertmesh.parallel.zero import Alike, build_zero
from expertmesh.system.model.experts import RoutedExperts
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import Weight, weights
from expertmesh.system.train.config import TrainConfig
from expertmesh.system.train.loss import LanguageModelLoss

Fill = Callable[[nn.Module, str, Collection[nn.Module]], None]
"""Gives the weights of a part of a model, of that name, their values, but for those of some modules in it."""


def build_optimizer(loss: LanguageModelLoss, config: TrainConfig, device: str, fill: Fill) -> TrainingOptimizer:
    """For the weights of `loss`, which `fill` gives their values; every rank calls it.

    At stage 3 shards take their place. Then `loss` may be on the meta device: its parts come
    to `device` one after the other, so that a rank has room for its shards and one part.
    """
    if config.zero_stage == 3:
        return _fully_sharded(loss, config, device, fill)
    fill(loss.model, "", ())
    return build_zero(
        loss,
        _held_alike(loss),
        [weight.parameter for weight in weights(loss.model) if weight.is_matrix],
        stage=config.zero_stage,
        gradient_clipping=config.gradient_clipping,
        weight_decay=config.weight_decay,
        betas=config.adam_betas,
    )


def _held_alike(loss: LanguageModelLoss) -> list[Alike]:
    """All but dense weights that ranks with the same part of them hold, which split the batch or its sequences."""
    groups, model = loss.groups, loss.model
    experts = defaultdict[int, list[nn.Parameter]](list)  # by the degree of their layers
    for weight in weights(model):
        if weight.experts is not None:
            experts[groups.of_layer(weight.experts).expert_size].append(weight.parameter)
    # Ranks of a tensor group see different tokens, or heads.
    replicated = [weight.parameter for weight in weights(model) if _is_replicated(weight, model)]
    tied = [] if model.tied_weight is None else [model.tied_weight]
    found = [Alike("replicated", replicated, groups.token), Alike("tied", tied, groups.ends)]
    for of_layer in (groups, *groups.narrower.values()):
        degree = of_layer.expert_size
        found.append(Alike(f"experts on {degree} ranks", experts[degree], of_layer.expert_data))
    return found


def _fully_sharded(loss: LanguageModelLoss, config: TrainConfig, device: str, fill: Fill) -> FullySharded:
    """No list of parameters outlives its line: it would keep whole what is to be shards."""
    model = loss.model
    name_of = {module: name for name, module in model.named_modules()}
    done: list[nn.Module] = []

    def begin(part: nn.Module) -> None:
        part = model if part is loss else part
        _to_device(part, device)
        fill(part, name_of[part], done)
        done.append(part)

    def names(are_meant: Callable[[Weight], bool]) -> set[str]:
        parameters = {weight.parameter for weight in weights(model) if are_meant(weight)}
        return {name for name, parameter in loss.named_parameters() if parameter in parameters}

    return FullySharded(
        loss,
        units_of(model),
        lambda experts: loss.groups.of_layer(experts.num_experts).expert_data,
        device,
        begin,
        decayed=names(lambda weight: weight.is_matrix),
        replicated=names(lambda weight: _is_replicated(weight, model)),
        tied=names(lambda weight: weight.parameter is model.tied_weight),
        dtype=getattr(torch, config.dtype),
        gradient_clipping=config.gradient_clipping,
        weight_decay=config.weight_decay,
        betas=config.adam_betas,
    )


def _is_replicated(weight: Weight, model: Transformer) -> bool:
    """Whether every rank of a tensor group has it whole."""
    return not weight.is_expert and weight.shard == WHOLE and weight.parameter is not model.tied_weight


def _to_device(part: nn.Module, device: str) -> None:
    """Give parameters that are on the meta device memory; wherever they are held, they stay the same objects."""
    for parameter in part.parameters():
        if parameter.is_meta:
            there = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
            mark(there, shard_of(parameter))
            torch.utils.swap_tensors(parameter, there)


def units_of(model: Transformer) -> Units:
    """What of `model` is sharded together. Parts that share weights come with the rest of the model."""
    parts = [model.embed_tokens, *model.layers, model.lm_head]
    holders = Counter(parameter for part in parts for parameter in part.parameters())
    alone = [part for part in parts if {holders[parameter] for parameter in part.parameters()} == {1}]
    return Units([module for module in model.modules() if isinstance(module, RoutedExperts)], alone)
