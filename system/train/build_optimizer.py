"""The optimizer of a rank's weights, by the ZeRO stage that a recipe asks for."""

from __future__ import annotations

from expertmesh.parallel.optimizer import TrainingOptimizer
from expertmesh.parallel.shard import WHOLE
from expertmesh.parallel.zero import build_zero
from expertmesh.system.model.weights import weights
from expertmesh.system.train.config import TrainConfig
from expertmesh.system.train.loss import LanguageModelLoss


def build_optimizer(loss: LanguageModelLoss, config: TrainConfig) -> TrainingOptimizer:
    """For the weights of `loss`, which are there; every rank calls it."""
    held, tied = list(weights(loss.model)), loss.model.tied_weight
    dense = [weight for weight in held if not weight.is_expert and weight.parameter is not tied]
    return build_zero(
        loss,
        [weight.parameter for weight in held if weight.is_expert],
        [weight.parameter for weight in dense if weight.shard == WHOLE],
        [weight.parameter for weight in held if weight.is_matrix],
        tied_parameters=[] if tied is None else [tied],
        ends=loss.groups.ends,
        stage=config.zero_stage,
        gradient_clipping=config.gradient_clipping,
        weight_decay=config.weight_decay,
        betas=config.adam_betas,
    )
