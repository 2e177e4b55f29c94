"""Our MoE layer as a guest in a model that another framework builds and trains.

In our own model the frame around a layer gives it what it needs: the routing decision of the MoE layer before, a
dispatcher, losses over the whole batch, a step of its selection bias. A guest finds these itself; what is left to the
host is in megatron.py and deepspeed.py. Tokens and weights stay those of `system/model/moe.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from expertmesh.kernels.router_sums import RouterSums
from expertmesh.kernels.routing import Routing
from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.build_dispatcher import build_dispatcher
from expertmesh.parallel.dispatch_config import DispatchConfig
from expertmesh.parallel.dispatchers import Dispatcher, LocalDispatcher
from expertmesh.parallel.groups import Groups
from expertmesh.parallel.placement import expert_shard
from expertmesh.system.model.attend import CausalAttend
from expertmesh.system.model.context import Context
from expertmesh.system.model.experts_config import StructuredConfig, SwiGLUConfig
from expertmesh.system.model.moe import MoE
from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.model.router_loss import router_balance_loss, sums_of
from expertmesh.system.model.weights import initialise


class Chain:
    """The MoE layers of one model, in the order they were built: a gating residual reads the decision before its own.

    Each layer leaves its decision under its own number, so that running one layer again reads what it read before.
    """

    def __init__(self) -> None:
        self._decisions: list[Routing | None] = []

    def join(self) -> int:
        """The number of one more layer, from 0."""
        self._decisions.append(None)
        return len(self._decisions) - 1

    def before(self, number: int) -> Routing | None:
        return self._decisions[number - 1] if number else None

    def decided(self, number: int, routing: Routing) -> None:
        self._decisions[number] = routing


class RouterLosses(NamedTuple):
    """Of one layer and this rank's tokens; their mean over ranks is that of the whole batch."""

    balance: torch.Tensor  # not weighted
    z: torch.Tensor
    total: torch.Tensor  # both by their weights: what the host adds to its own loss
    load_N: torch.Tensor  # int64 slots that chose each expert, over all ranks


class GuestMoE(nn.Module):
    """One layer with the experts of `shard`. Weights are drawn alike on all ranks that seeded torch alike.

    `connect` tells it of other ranks; until then it is alone, and with a part of the experts cannot answer.
    """

    def __init__(
        self, config: MoEConfig, hidden_size: int, shard: range, chain: Chain, standard_deviation: float
    ) -> None:
        super().__init__()
        refuse_what_a_guest_cannot(config, hidden_size)
        self.config, self.chain, self.number = config, chain, chain.join()
        self.moe = MoE(config, hidden_size, self.number, shard, follows_moe=self.number > 0)
        # By name alone, so that any number of expert-parallel ranks begins with the same model.
        initialise(self.moe, int(torch.randint(2**62, ())), standard_deviation)
        self.traffic = Traffic()
        self.dispatcher: Dispatcher | None = LocalDispatcher() if len(shard) == config.ffn_experts else None
        self.token_group: dist.ProcessGroup | None = None
        self.load_N: torch.Tensor | None = None  # since the selection biases last moved

    def connect(self, expert_group: dist.ProcessGroup, token_group: dist.ProcessGroup, device: str) -> None:
        """`expert_group` together holds every expert once; `token_group` splits the tokens of a batch."""
        groups = Groups(expert=expert_group if expert_group.size() > 1 else None)
        self.dispatcher = build_dispatcher(groups, DispatchConfig(), self.traffic, device)
        self.token_group = token_group if token_group.size() > 1 else None

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, RouterLosses]:
        """[T, D] to [T, D], and what the router costs."""
        if self.dispatcher is None:
            raise ValueError("this layer has a part of its experts and was not told yet who has the others")
        positions_T = torch.arange(len(x_TD), device=x_TD.device)  # asked by nothing that a guest may have
        context = Context(positions_T, CausalAttend(len(x_TD)), self.dispatcher, layer=self.number)
        y_TD, routing = self.moe(x_TD, self.chain.before(self.number), context)
        self.chain.decided(self.number, routing)
        return y_TD, self._losses(routing)

    def _losses(self, routing: Routing) -> RouterLosses:
        config, sums = self.config, sums_of(routing, self.config)
        counted = torch.stack([sums.counts_N, sums.firsts_N])
        if self.token_group is not None:
            dist.all_reduce(counted, group=self.token_group)
        load_N, first_N = counted
        balance = router_balance_loss(sums, config, load_N, first_N, self._mean_over_ranks)
        if self.training and torch.is_grad_enabled():
            self.load_N = load_N if self.load_N is None else self.load_N + load_N
        total = config.balance_loss_weight * balance + config.z_loss_weight * sums.z_loss
        return RouterLosses(balance, sums.z_loss, total, load_N)

    def _mean_over_ranks(self, sums: RouterSums) -> torch.Tensor:
        probabilities_N = sums.probabilities_N.detach()
        flat = torch.cat([probabilities_N, probabilities_N.new_tensor([sums.tokens])])
        if self.token_group is not None:
            dist.all_reduce(flat, group=self.token_group)
        return flat[:-1] / flat[-1].clamp(min=1)


def refuse_what_a_guest_cannot(config: MoEConfig, hidden_size: int) -> None:
    """A host tells a layer neither the step nor the sequence that a token is of.

    Raises:
        ValueError: for what needs to know, or does not fit the host's hidden size.
    """
    asks = {
        f"noise={config.noise}": config.noise != "none",
        "capacity": config.capacity is not None,
        "pyramid": bool(config.pyramid),
        f"balance_over={config.balance_over}": config.balance_over != "micro_batch",
        "expert.nested": isinstance(config.expert, SwiGLUConfig) and bool(config.expert.nested),
        "expert.guided": isinstance(config.expert, StructuredConfig) and config.expert.guided,
    }
    for key, asked in asks.items():
        if asked:
            raise ValueError(f"moe.{key} works in our own trainer only: no other tells a layer its step and sequences")
    config.expert.check(hidden_size)


def expert_part(config: MoEConfig, rank: int, size: int) -> range:
    """The FFN experts of expert-parallel rank `rank`; hosts want as many on each."""
    if config.ffn_experts % size:
        raise ValueError(f"{size} expert-parallel ranks do not divide moe.ffn_experts={config.ffn_experts}")
    return expert_shard(config.ffn_experts, rank, size)


def update_selection_biases(model: nn.Module) -> None:
    """After an update of `model`: move the selection biases (`moe.selection_bias`) of all our layers towards even load.

    To be called on every rank; without it these biases stay what they are.
    """
    for module in model.modules():
        if isinstance(module, GuestMoE) and module.load_N is not None:
            module.moe.gate.balance(module.load_N)
            module.load_N = None
