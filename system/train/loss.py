"""What training minimises, and what one batch tells about its routing on the way."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from expertmesh.kernels.balance_loss import balance_loss, heterogeneous_eta
from expertmesh.kernels.routing import expert_counts
from expertmesh.kernels.z_loss import z_loss
from expertmesh.parallel.dispatchers import Dispatcher
from expertmesh.parallel.groups import Groups
from expertmesh.system.model.attention import CausalAttend
from expertmesh.system.model.transformer import Transformer


class BatchLoss(NamedTuple):
    """Losses of this rank's part of the batch; `load_LN` is of the whole batch."""

    cross_entropy: torch.Tensor  # mean over this rank's tokens, nats
    balance: torch.Tensor  # sum over layers, not yet weighted
    z: torch.Tensor  # sum over layers, not yet weighted
    load_LN: torch.Tensor  # int64 slots on each expert of each layer, over all ranks
    entropy_L: torch.Tensor  # mean over this rank's tokens of the router's entropy, nats; no gradient

    def total(self, balance_loss_weight: float, z_loss_weight: float = 0.0) -> torch.Tensor:
        """L = L_CE + beta * L_b (MoE++, arXiv 2410.07348, section 3.3) + weight * L_z, summed over layers."""
        return self.cross_entropy + balance_loss_weight * self.balance + z_loss_weight * self.z


class LanguageModelLoss(nn.Module):
    """A model that answers a batch of token sequences with its losses.

    The balance loss uses the load of the whole batch and the probabilities of this rank's tokens. Its mean over ranks
    is then the loss of the whole batch, so that the number of ranks does not change what is trained.
    """

    def __init__(self, model: Transformer, dispatcher: Dispatcher, groups: Groups) -> None:
        super().__init__()
        self.model, self.dispatcher, self.groups = model, dispatcher, groups
        moe = model.config.moe
        eta_N = heterogeneous_eta(moe.ffn_experts, moe.zero_computation_experts, moe.tau)
        self.register_buffer("eta_N", eta_N, persistent=False)

    def forward(self, tokens_BS1: torch.Tensor) -> BatchLoss:
        """tokens_BS1: int64 [B, S+1], this rank's sequences; position s predicts token s+1."""
        inputs_BS, targets_BS = tokens_BS1[:, :-1], tokens_BS1[:, 1:]
        batch_size, sequence_length = inputs_BS.shape
        positions_T = torch.arange(sequence_length, device=inputs_BS.device).repeat(batch_size)
        hidden_TD, routings = self.model(
            inputs_BS.reshape(-1), positions_T, CausalAttend(sequence_length), self.dispatcher
        )
        logits_TV = self.model.lm_head(hidden_TD).float()
        cross_entropy = F.cross_entropy(logits_TV, targets_BS.reshape(-1), reduction="sum") / max(targets_BS.numel(), 1)

        moe, layers = self.model.config.moe, len(routings)
        load_LN = torch.zeros(layers, moe.num_experts, dtype=torch.int64, device=inputs_BS.device)
        for layer, routing in enumerate(routings):
            load_LN[layer] = expert_counts(routing.experts_TK, moe.num_experts)
        if self.groups.data is not None:
            dist.all_reduce(load_LN, group=self.groups.data)
        balance = z = cross_entropy.new_zeros(())
        entropy_L = cross_entropy.new_zeros(layers)
        for layer, (routing, counts_N) in enumerate(zip(routings, load_LN, strict=True)):
            tokens = int(counts_N.sum()) // moe.top_k
            balance = balance + balance_loss(routing.probabilities_TN, counts_N, tokens, self.eta_N)
            z = z + z_loss(routing.logits_TN)
            entropy_L[layer] = _entropy(routing.probabilities_TN.detach())
        return BatchLoss(cross_entropy, balance, z, load_LN, entropy_L)


def _entropy(probabilities_TN: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of -sum p log p: log N where the router cannot tell experts apart, 0 where it is sure."""
    return torch.special.entr(probabilities_TN).sum() / max(len(probabilities_TN), 1)
