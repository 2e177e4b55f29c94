"""What training minimises, and what one batch tells about its routing on the way."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from expertmesh.kernels.balance_loss import balance_loss, heterogeneous_eta
from expertmesh.kernels.mutual_information import mutual_information_loss
from expertmesh.kernels.routing import Routing, expert_counts
from expertmesh.kernels.z_loss import z_loss
from expertmesh.parallel.cross_entropy import total_cross_entropy
from expertmesh.parallel.dispatchers import Dispatcher
from expertmesh.parallel.groups import Groups
from expertmesh.parallel.sequence_split import SequenceSplit
from expertmesh.parallel.token_split import TokenSplit
from expertmesh.system.model.attend import Attend, CausalAttend, ContextAttend
from expertmesh.system.model.attention_config import MixtureAttentionConfig
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.context import Context, Decisions, DepthChoice, Spread, TrainingStep
from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.model.transformer import Transformer


class BatchLoss(NamedTuple):
    """Losses of this rank's part of the batch, those of layers not yet weighted; counts are of the whole batch.

    L: the layers that have experts.
    """

    total: torch.Tensor  # cross entropy and the others by their weights; its gradients are summed over a tensor group
    cross_entropy: torch.Tensor  # mean over the tokens of this rank's sequences that its context rank has, nats
    balance_L: torch.Tensor
    z_L: torch.Tensor
    loads_N: list[torch.Tensor]  # int64 slots that chose each expert, of each layer
    dropped_L: torch.Tensor  # int64 slots that a full expert dropped
    entropy_L: torch.Tensor  # mean over this rank's tokens of the router's entropy, nats; no gradient


class _Counts(NamedTuple):
    """Of one layer, over all ranks."""

    load_N: torch.Tensor  # slots that chose each expert
    first_N: torch.Tensor  # tokens whose first choice it was
    dropped: torch.Tensor


class LanguageModelLoss(nn.Module):
    """A model that answers a batch of token sequences with its losses.

    Balance losses use the load of the whole batch and the probabilities of this rank's tokens. Their mean over ranks
    is then the loss of the whole batch, so that the number of ranks does not change what is trained. Ranks of a tensor
    group have the same sequences and the same cross entropy, of which each has a part of the gradient; of the other
    losses each adds its own tokens' share.
    """

    def __init__(self, model: Transformer, dispatcher: Dispatcher, groups: Groups) -> None:
        super().__init__()
        self.model, self.dispatcher, self.groups = model, dispatcher, groups

    def forward(self, tokens_BS1: torch.Tensor, training: TrainingStep | None = None) -> BatchLoss:
        """tokens_BS1: int64 [B, S+1], this rank's sequences; position s predicts token s+1. `training` None: no update.

        Only with `training` are slots dropped, is noise added, and does a nested model use a part of its width.
        """
        config, device = self.model.config, tokens_BS1.device
        batch_size, sequence_length = len(tokens_BS1), tokens_BS1.shape[1] - 1
        split = SequenceSplit(self.groups.context, sequence_length)
        positions_C = split.positions_C(device)
        inputs_BC, targets_BC = tokens_BS1[:, positions_C], tokens_BS1[:, positions_C + 1]
        width = draw_width(config, training)
        attend: Attend = CausalAttend(sequence_length) if self.groups.context is None else ContextAttend(split)
        context = Context(positions_C.repeat(batch_size), attend, self.dispatcher, training, width)
        context = context._replace(spread=Spread(split, TokenSplit(self.groups.tensor)))
        hidden_TD, decisions = self.model(inputs_BC.reshape(-1), context)
        logits_TV = self.model.lm_head(hidden_TD).float()
        total = total_cross_entropy(logits_TV, targets_BC.reshape(-1), self.groups.tensor)
        mean_entropy = total / max(targets_BC.numel(), 1)

        layers = [config.moe_of(layer) for layer in config.moe_layers]
        routings = [decided.experts for decided in decisions if decided.experts is not None]
        counts = self._count(routings, layers, device)

        def stacked(values: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack(values) if values else mean_entropy.new_zeros(0)

        balance_L = stacked([self._balance(*layer) for layer in zip(routings, layers, counts, strict=True)])
        z_L = stacked([z_loss(routing.logits_TN) for routing in routings])
        weighted = config.moe.balance_loss_weight * balance_L.sum() + config.moe.z_loss_weight * z_L.sum()
        return BatchLoss(
            total=mean_entropy + (weighted + self._beside_experts(decisions)) / self.groups.tensor_size,
            cross_entropy=mean_entropy,
            balance_L=balance_L,
            z_L=z_L,
            loads_N=[counted.load_N for counted in counts],
            dropped_L=stacked([counted.dropped for counted in counts]),
            entropy_L=stacked([_entropy(routing.probabilities_TN.detach()) for routing in routings]),
        )

    def _count(self, routings: list[Routing], layers: list[MoEConfig], device: torch.device) -> list[_Counts]:
        """Who chose whom in the whole batch: one collective for all layers."""
        parts: list[torch.Tensor] = [torch.zeros(0, dtype=torch.int64, device=device)]
        for routing, moe in zip(routings, layers, strict=True):
            parts.append(expert_counts(routing.chosen_TK, moe.num_experts))
            parts.append(expert_counts(routing.chosen_TK[:, :1], moe.num_experts))
            parts.append((routing.chosen_TK != routing.experts_TK).sum()[None])
        flat = torch.cat(parts)
        if self.groups.token is not None:
            dist.all_reduce(flat, group=self.groups.token)
        sizes = [size for moe in layers for size in (moe.num_experts, moe.num_experts, 1)]
        pieces = iter(flat.split(sizes))
        return [_Counts(next(pieces), next(pieces), next(pieces)[0]) for _ in layers]

    def _balance(self, routing: Routing, moe: MoEConfig, counts: _Counts) -> torch.Tensor:
        probabilities_TN = routing.probabilities_TN
        if moe.balance_loss == "mutual_information":
            return mutual_information_loss(probabilities_TN, self._mean_over_ranks(probabilities_TN))
        tokens = int(counts.load_N.sum()) // moe.top_k
        experts = moe.num_experts
        if moe.balance_loss == "heterogeneous":
            eta_N = heterogeneous_eta(moe.ffn_experts, moe.zero_computation_experts, moe.tau)
            return balance_loss(probabilities_TN, counts.load_N, tokens, eta_N.to(probabilities_TN.device))
        # Both are 1 where all experts are used alike. Switch counts all choices (arXiv 2101.03961, equation 4), GShard
        # and DeepSpeed the first ones (arXiv 2006.16668, algorithm 1).
        even = probabilities_TN.new_full((experts,), float(experts))
        if moe.balance_loss == "switch":
            return balance_loss(probabilities_TN, counts.load_N, tokens, even / moe.top_k)
        return balance_loss(probabilities_TN, counts.first_N, tokens, even)

    def _mean_over_ranks(self, probabilities_TN: torch.Tensor) -> torch.Tensor:
        """Mean probability of each expert over the tokens of all ranks."""
        sums = torch.cat([probabilities_TN.detach().sum(0), probabilities_TN.new_tensor([len(probabilities_TN)])])
        if self.groups.token is not None:
            dist.all_reduce(sums, group=self.groups.token)
        return sums[:-1] / sums[-1].clamp(min=1)

    def _beside_experts(self, decisions: list[Decisions]) -> torch.Tensor | float:
        """What other routers than those of the experts add, by its weight."""
        total: torch.Tensor | float = 0.0
        attention, depth = self.model.config.attention, self.model.config.depth
        for decided in decisions:
            if decided.attentions is not None:
                assert isinstance(attention, MixtureAttentionConfig)
                if attention.balance_loss_weight:
                    probabilities_TN = decided.attentions.probabilities_TN
                    information = mutual_information_loss(probabilities_TN, self._mean_over_ranks(probabilities_TN))
                    total = total + attention.balance_loss_weight * information
            if decided.depth is not None:
                assert depth is not None
                total = total + depth.loss_weight * _depth_loss(decided.depth)
        return total


def draw_width(config: ModelConfig, training: TrainingStep | None) -> float:
    """The share of nested experts' hidden units for this step, the same in all layers (MatFormer, arXiv 2310.07707)."""
    shares = config.nested_shares
    if training is None or not shares:
        return 1.0
    return random.Random(f"{training.seed}:{training.step}:width").choice(shares)


def _depth_loss(choice: DepthChoice) -> torch.Tensor:
    """Teaches the router of a mixture of depths to know without the others whom it sends through (gamma-MoD)."""
    return F.cross_entropy(choice.logits_T2, choice.chosen_T.long(), reduction="sum") / max(len(choice.chosen_T), 1)


def _entropy(probabilities_TN: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of -sum p log p: log N where the router cannot tell experts apart, 0 where it is sure."""
    return torch.special.entr(probabilities_TN).sum() / max(len(probabilities_TN), 1)
