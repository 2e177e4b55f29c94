"""The router: which experts a token goes to, helped by what the MoE layer before decided for it."""

from __future__ import annotations

import torch
from torch import nn

from expertmesh.kernels.capacity import capacities, serve_within
from expertmesh.kernels.routing import (
    TINY,
    ExpertGroups,
    Residual,
    Routing,
    add_residual,
    route,
    route_sigmoid,
    sigmoid_weights,
)
from expertmesh.system.model.context import Context, TrainingStep
from expertmesh.system.model.gate import TwoLayerGate
from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.model.replay import choices_of_layer

JITTER = 0.01  # DeepSpeed's multiplicative_jitter


class Router(nn.Module):
    """A map to expert logits, plus the gating residual of MoE++ (arXiv 2410.07348, equation 6), and the choice.

    Everything is float32, whatever the dtype of the model: a rounded logit sends a token elsewhere.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, follows_moe: bool) -> None:
        super().__init__()
        self.config = config
        experts = config.num_experts
        self.weight: nn.Parameter | None = None
        self.layers: TwoLayerGate | None = None
        if config.gate is None:
            self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        else:
            self.layers = TwoLayerGate(config.gate, hidden_size, experts)
        self.scale_adapter: nn.Parameter | None = None
        if config.scale_adapter:
            self.scale_adapter = nn.Parameter(torch.empty(experts, hidden_size))
        self.e_score_correction_bias: nn.Parameter | None = None  # moved by the load, not by a gradient
        if config.selection_bias:
            self.e_score_correction_bias = nn.Parameter(torch.empty(experts), requires_grad=False)
        self.groups = ExpertGroups(config.groups.count, config.groups.chosen) if config.groups else None
        self.gate_map: nn.Parameter | None = None
        if config.gating_residual and follows_moe:
            self.gate_map = nn.Parameter(torch.empty(experts, experts))

    def forward(self, x_TD: torch.Tensor, previous: Routing | None, context: Context) -> Routing:
        config, training = self.config, context.training
        logits_TN, residual = self._logits(x_TD, context), self._residual(previous)
        normed, noisy = config.logits_norm is not None, training and config.noise not in ("none", "jitter")
        if normed or noisy:  # of complete logits; else the pass that chooses completes them on its way
            logits_TN, residual = add_residual(logits_TN, residual), None
        scores_TN = logits_TN
        if config.logits_norm is not None:  # an option of the released MoE++; the next layer reads the logits without
            scores_TN = config.logits_norm * scores_TN / scores_TN.std(dim=1, keepdim=True)
        if training and config.noise == "normal":  # WideNet: a standard deviation of 1/N
            lots_TN = self._lots(context, config.num_experts)
            scores_TN = scores_TN + torch.special.ndtri(lots_TN) / config.num_experts
        replayed_TK = None
        if context.replay is not None:
            replayed_TK = choices_of_layer(context.replay, context.layer, len(x_TD), config.top_k).to(x_TD.device)
        if config.gate_mode == "sigmoid":
            bias_N = self.e_score_correction_bias
            routing = route_sigmoid(scores_TN, config.top_k, bias_N, self.groups, residual)
            if replayed_TK is not None:
                weights_TK = sigmoid_weights(routing.logits_TN, replayed_TK)
                routing = routing._replace(experts_TK=replayed_TK, chosen_TK=replayed_TK, weights_TK=weights_TK)
        else:
            ranking_TN = self._ranking(scores_TN, context) if replayed_TK is None else _rank(replayed_TK, scores_TN)
            routing = route(scores_TN, config.top_k, config.gate_mode, config.zero_experts, ranking_TN, residual)
        if scores_TN is not logits_TN:
            routing = routing._replace(logits_TN=logits_TN)
        if self.scale_adapter is not None:  # AdaMoE (arXiv 2510.14300): who is chosen does not depend on it
            scales_TN = x_TD.float() @ self.scale_adapter.float().T
            routing = routing._replace(weights_TK=routing.weights_TK + scales_TN.gather(1, routing.experts_TK))
        if training and config.capacity:
            routing = self._within_capacity(routing, training, context)
        return routing._replace(weights_TK=routing.weights_TK * config.gate_scale)

    def _logits(self, x_TD: torch.Tensor, context: Context) -> torch.Tensor:
        """Without the gating residual."""
        x_TD = x_TD.float()
        if context.training and self.config.noise == "jitter":  # DeepSpeed: factors from 1 - JITTER to 1 + JITTER
            x_TD = x_TD * (1 + JITTER * (2 * self._lots(context, x_TD.shape[1]) - 1))
        if self.layers is not None:
            return self.layers(x_TD)
        assert self.weight is not None
        return x_TD @ self.weight.float().T

    def _residual(self, previous: Routing | None) -> Residual | None:
        if self.gate_map is None:
            return None
        assert previous is not None, "a gating residual needs the logits of the layer before"
        return Residual(previous.logits_TN, self.gate_map.float())

    def _lots(self, context: Context, width: int) -> torch.Tensor:
        assert context.training is not None
        lots_TX = context.training.lots(context.layer, "router", width, context.positions_T.device)
        return lots_TX if context.spread is None else context.spread.mine(lots_TX)

    def _ranking(self, logits_TN: torch.Tensor, context: Context) -> torch.Tensor | None:
        """Noisy logits to choose by; None: the logits themselves.

        Adding Gumbel noise draws an expert from their softmax. DeepSpeed does it for the one choice ("RSample"), or
        for the second of two, after the first was taken without.
        """
        if context.training is None or not self.config.noise.startswith("gumbel"):
            return None
        noisy_TN = logits_TN - torch.log(-torch.log(self._lots(context, logits_TN.shape[1])))
        if self.config.noise == "gumbel_second":
            noisy_TN = noisy_TN.scatter(1, logits_TN.argmax(dim=1, keepdim=True), torch.inf)
        return noisy_TN

    def _within_capacity(self, routing: Routing, training: TrainingStep, context: Context) -> Routing:
        """Drop the slots that a sequence asks of an expert beyond its capacity."""
        config, capacity = self.config, self.config.capacity
        assert capacity is not None
        slots = config.top_k * training.sequence_length
        counts = config.ffn_experts, config.zero_computation_experts
        capacity_N = capacities(*counts, config.tau, slots, capacity.factor, capacity.minimum)
        device = routing.chosen_TK.device
        lots_T = None
        if capacity.order == "random":
            lots_T = training.lots(context.layer, "capacity", 1, device)[:, 0]
        spread, chosen_TK = context.spread, routing.chosen_TK
        if spread is not None:  # a sequence's capacity is for all its tokens, those on other ranks too
            chosen_TK = spread.whole(chosen_TK, f"layer {context.layer} capacity")
        served_TK = serve_within(chosen_TK, capacity_N.to(device), training.sequence_length, lots_T)
        if spread is not None:
            served_TK = spread.mine(served_TK)
        weights_TK = routing.weights_TK.masked_fill(served_TK == config.num_experts, 0.0)
        if config.gate_mode == "mixtral":  # DeepSpeed's top-2 gate: the weights of those that serve add up to 1
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + TINY)
        return routing._replace(experts_TK=served_TK, weights_TK=weights_TK)

    @torch.no_grad()
    def balance(self, load_N: torch.Tensor) -> None:
        """Move the selection bias one step towards an even load (auxiliary-loss-free, arXiv 2408.15664, algorithm 1).

        load_N: [N] slots on each expert in the update just made, over all ranks.
        """
        if self.e_score_correction_bias is not None:
            load_N = load_N.to(self.e_score_correction_bias.device, torch.float32)
            self.e_score_correction_bias += self.config.bias_update_rate * torch.sign(load_N.mean() - load_N)


def _rank(chosen_TK: torch.Tensor, like_TN: torch.Tensor) -> torch.Tensor:
    """Numbers by which those are chosen, in that order."""
    places_K = torch.arange(chosen_TK.shape[1], 0, -1, dtype=like_TN.dtype, device=like_TN.device)
    return torch.zeros_like(like_TN).scatter(1, chosen_TK, places_K.expand_as(chosen_TK))
