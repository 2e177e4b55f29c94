"""Moves the experts of a model in training to where the load says that they should lie.

Every rank sees the load of the whole batch, so all come to the same decision: nothing need be agreed on. Experts only
change places: none is copied, so that each has one weight, one gradient and one state of the optimizer. A checkpoint
knows experts by name alone; a resumed run begins with them in order and moves them again when it is time.
"""

from __future__ import annotations

import logging

import torch

from expertmesh.parallel.groups import Groups
from expertmesh.parallel.optimizer import AdamState, TrainingOptimizer
from expertmesh.parallel.placement import Placement
from expertmesh.parallel.rebalance import Decision, Prices, decide, move_experts
from expertmesh.parallel.whereabouts import inside
from expertmesh.system.model.transformer import Transformer

log = logging.getLogger(__name__)

CROSSINGS = 4  # of a row in a step: there and back, and both gradients


class Rebalancing:
    """`placements` says where the experts of each layer lie, for the dispatcher that brings rows there."""

    def __init__(self, model: Transformer, groups: Groups) -> None:
        self._hidden_size = model.config.hidden_size
        # Layers that share their weights have one place for them, under the number of the first.
        self._owners = [model.layers[layer].mlp for layer in model.config.moe_layers]
        self._moe = {owner.experts_of_layer.layer: owner for owner in self._owners}
        self._groups = {layer: groups.of_layer(moe.experts_of_layer.num_experts) for layer, moe in self._moe.items()}
        self.placements = {
            layer: Placement.contiguous(moe.experts_of_layer.num_experts, self._groups[layer].expert_size)
            for layer, moe in self._moe.items()
        }
        self._forget()

    def _forget(self) -> None:
        self._steps = 0
        self._rows = {layer: [0.0] * placement.num_experts for layer, placement in self.placements.items()}

    def count(self, loads_N: list[torch.Tensor]) -> None:
        """Take note of a step: the load of each layer with experts, over all ranks."""
        self._steps += 1
        for owner, load_N in zip(self._owners, loads_N, strict=True):
            layer, experts = owner.experts_of_layer.layer, owner.experts_of_layer.num_experts
            self._rows[layer] = [sum(pair) for pair in zip(self._rows[layer], load_N[:experts].tolist(), strict=True)]

    def rebalance(self, zero: TrainingOptimizer, steps: int) -> list[Decision]:
        """Move what should be moved by the load since the last call, for the `steps` to come. Every rank calls it."""
        # With one expert a rank, or fewer, nothing is gained by another order of ranks.
        layers = [layer for layer, placement in self.placements.items() if placement.slots > placement.ranks > 1]
        decisions = [self._rebalance(layer, zero, steps) for layer in layers]
        self._forget()
        return decisions

    def _rebalance(self, layer: int, zero: TrainingOptimizer, steps: int) -> Decision:
        experts = self._moe[layer].experts
        parameters = [parameter for parameter in experts.parameters() if parameter.numel()]
        floats = 1 + len(AdamState._fields)  # a float32 weight and its moments
        prices = Prices(
            row_bytes=CROSSINGS * self._hidden_size * parameters[0].element_size(),
            expert_bytes=sum(parameter.numel() // len(parameter) for parameter in parameters) * floats * 4,
            steps=steps,
        )
        load_E = [rows / max(self._steps, 1) for rows in self._rows[layer]]
        decision = decide(layer, load_E, self.placements[layer], prices)
        log.info("%s", decision)
        if decision.moves:
            groups = self._groups[layer]
            assert groups.expert is not None
            with inside(f"layer {layer} moves of experts"):
                move_experts(parameters, zero, decision.before, decision.after, groups.expert)
            self.placements[layer] = decision.after
            experts.shard = decision.after.held(groups.expert_rank)
        return decision
