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
    experts = [weight.parameter for weight in held if weight.is_expert]
    decayed = [weight.parameter for weight in held if weight.is_matrix]
    tied_parameters = [] if tied is None else [tied]
    replicated = [w.parameter for w in held if not w.is_expert and w.shard == WHOLE and w.parameter is not tied]
    clipping, decay, betas = config.gradient_clipping, config.weight_decay, config.adam_betas
    if config.zero_stage == 3:
        return FullySharded(
            loss,
            units_of(loss.model),
            decayed,
            replicated,
            tied_parameters,
            dtype=getattr(torch, config.dtype),
            gradient_clipping=clipping,
            weight_decay=decay,
            betas=betas,
        )
    return build_zero(
        loss,
        experts,
        replicated,
        decayed,
        tied_parameters=tied_parameters,
        ends=loss.groups.ends,
        stage=config.zero_stage,
        gradient_clipping=clipping,
        weight_decay=decay,
        betas=betas,
    )


def units_of(model: Transformer) -> Units:
    """What of `model` is sharded together. Parts that share weights come with the rest of the model."""
    parts = [model.embed_tokens, *model.layers, model.lm_head]
    holders = Counter(parameter for part in parts for parameter in part.parameters())
    alone = [part for part in parts if {holders[parameter] for parameter in part.parameters()} == {1}]
    return Units([module for module in model.modules() if isinstance(module, RoutedExperts)], alone)
