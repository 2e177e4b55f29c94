"""The optimizer of a rank's weights, by the ZeRO stage that a recipe asks for."""

from __future__ import annotations

from collections import Counter

import torch

from expertmesh.parallel.fully_sharded import FullySharded, Units
from expertmesh.parallel.optimizer import TrainingOptimizer
from expertmesh.parallel.shard import WHOLE
from expertmesh.parallel.zero import build_zero
from expertmesh.system.model.experts import RoutedExperts
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import weights
from expertmesh.system.train.config import TrainConfig
from expertmesh.system.train.loss import LanguageModelLoss


def build_optimizer(loss: LanguageModelLoss, config: TrainConfig) -> TrainingOptimizer:
    """For the weights of `loss`, which have their values; every rank calls it. At stage 3 others take their place."""
    held, tied = list(weights(loss.model)), loss.model.tied_weight
    decayed = [weight.parameter for weight in held if weight.is_matrix]
    clipping, decay, betas = config.gradient_clipping, config.weight_decay, config.adam_betas
    if config.zero_stage == 3:
        units = units_of(loss.model)
        dtype = getattr(torch, config.dtype)
        return FullySharded(
            loss, units, decayed, dtype=dtype, gradient_clipping=clipping, weight_decay=decay, betas=betas
        )
    dense = [weight for weight in held if not weight.is_expert and weight.parameter is not tied]
    return build_zero(
        loss,
        [weight.parameter for weight in held if weight.is_expert],
        [weight.parameter for weight in dense if weight.shard == WHOLE],
        decayed,
        tied_parameters=[] if tied is None else [tied],
        ends=loss.groups.ends,
        stage=config.zero_stage,
        gradient_clipping=clipping,
        weight_decay=decay,
        betas=betas,
    )


def units_of(model: Transformer) -> Units:
    """What of `model` is sharded together. Layers that share weights come with the rest of the model."""
    holders = Counter(parameter for layer in model.layers for parameter in layer.parameters())
    layers = [layer for layer in model.layers if all(holders[parameter] == 1 for parameter in layer.parameters())]
    return Units([module for module in model.modules() if isinstance(module, RoutedExperts)], layers)
