"""Gives every rank copies of hot experts while training, as the load of the step before says.

Every rank sees the load of the whole batch, so all come to the same choice, for layers of other pipeline stages too.
The choice is a part of the state of a run: one that is resumed goes on bit for bit. Where experts also change ranks
(rebalancing.py), that goes by all of their load: moving costs once, copies in each step, so these are for what moving
cannot make even.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
import torch.distributed as dist

from expertmesh.parallel.all_to_all import Lane
from expertmesh.parallel.dispatch_config import DispatchConfig
from expertmesh.parallel.expert_copies import ExpertCopies
from expertmesh.parallel.groups import Groups
from expertmesh.parallel.hot_experts import CopyDecision, CopyPrices, choose_copies
from expertmesh.parallel.placement import Placement
from expertmesh.parallel.wire import WIRES
from expertmesh.system.model.build_experts import build_experts
from expertmesh.system.model.moe import MoE
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.train.config import TrainConfig
from expertmesh.system.train.rebalancing import CROSSINGS

log = logging.getLogger(__name__)


class Copying:
    """`copied` says which experts of each layer have copies; layers that share their weights do so under the first."""

    def __init__(
        self,
        model: Transformer,
        groups: Groups,
        config: TrainConfig,
        dispatch: DispatchConfig,
        lanes: Mapping[dist.ProcessGroup, Lane],
        placements: Mapping[int, Placement] | None,
    ) -> None:
        """`lanes`: for weights, among the ranks of each group.

        `placements`: where experts lie, which may change between steps; None: in order.
        """
        self.config, self._most = model.config, config.expert_copies
        self._held = {moe.experts_of_layer.layer: moe for moe in model.modules() if isinstance(moe, MoE)}
        # To each layer with experts the one whose weights it has; rows and copies are those of all its uses.
        sparse = self.config.moe_layers
        self._owners = [sparse[0] if self.config.share_layers else layer for layer in sparse]
        experts = {layer: self.config.moe_of(layer).ffn_experts for layer in self._owners}
        groups_of = {layer: groups.of_layer(count) for layer, count in experts.items()}
        # Where each rank has all experts of a layer there is nothing to copy.
        self._lanes = {layer: lanes[of.expert] for layer, of in groups_of.items() if of.expert is not None}
        self.copied: dict[int, tuple[int, ...]] = dict.fromkeys(self._lanes, ())
        self._placements = placements or {
            layer: Placement.contiguous(experts[layer], groups_of[layer].expert_size) for layer in self.copied
        }
        # Of all tokens, on the ranks of one expert-parallel group.
        self._shares = {layer: groups_of[layer].expert_size / groups.token_size for layer in self.copied}
        crossings = CROSSINGS - (dispatch.kind == "all_gather")  # which sends every row to all ranks, wanted or not
        row_bytes = crossings * WIRES[dispatch.wire].row_bytes(self.config.hidden_size, torch.float32)
        passes = config.micro_batches * len(self._owners) // len(experts)
        self._prices = {
            layer: CopyPrices(row_bytes, 2 * passes * self._expert_bytes(layer) // groups.expert_tensor_size)
            for layer in self.copied
        }

    def _expert_bytes(self, layer: int) -> int:
        with torch.device("meta"):
            expert = build_experts(self.config.moe_of(layer), self.config.hidden_size, range(1))
        return sum(parameter.nbytes for parameter in expert.parameters())

    def count(self, loads_N: list[torch.Tensor]) -> None:
        """Take note of a step: the load of each layer with experts, over all ranks."""
        self._loads = dict.fromkeys(self.copied, torch.zeros((), dtype=torch.int64))
        for layer, load_N in zip(self._owners, loads_N, strict=True):
            if layer in self.copied:
                self._loads[layer] = self._loads[layer] + load_N

    def choose(self) -> list[CopyDecision]:
        """Choose by the step that was counted, for the next; returns what changes."""
        changes = []
        for layer, load_N in self._loads.items():
            moe = self.config.moe_of(layer)
            placement, prices, share = self._placements[layer], self._prices[layer], self._shares[layer]
            load_E = [load * share for load in load_N[: moe.ffn_experts].tolist()]
            tokens = load_N.sum().item() / moe.top_k * share
            decision = choose_copies(layer, load_E, tokens, placement, self.copied[layer], self._most, prices)
            if decision.after != decision.before:
                log.info("%s", decision)
                changes.append(decision)
        self.copied |= {decision.layer: decision.after for decision in changes}
        self._apply()  # also where nothing changes: experts may have changed ranks
        return changes

    def state(self) -> dict[str, list[int]]:
        """What a checkpoint says of it."""
        return {str(layer): list(experts) for layer, experts in self.copied.items() if experts}

    def resume(self, state: Mapping[str, list[int]]) -> None:
        """Layers that have no copies in this layout are passed over."""
        known = {int(layer): tuple(experts[: self._most]) for layer, experts in state.items()}
        self.copied |= {layer: experts for layer, experts in known.items() if layer in self.copied}
        self._apply()

    def _apply(self) -> None:
        for layer, moe in self._held.items():
            if (experts := self.copied.get(layer)) is not None:
                placement, lane = self._placements[layer], self._lanes[layer]
                moe.copy_experts(ExpertCopies(layer, experts, placement, lane) if experts else None)
