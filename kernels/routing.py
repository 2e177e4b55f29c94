"""From router logits to a decision: which experts a token uses, and how much of each.

Everything after the router (load statistics, dispatch, combine, losses, traces) is a pure function of the `Routing`
that `route` returns. `sort_slots` turns that decision into the row order of the grouped GEMM:

    experts_TK   [[2, 0], [0, 5], [1, 0]]        3 tokens, K = 2; FFN experts 0..2, id 5 costs nothing
    slot t*K+k     0  1    2  3    4  5
    slots_R      [1, 2, 5, 4, 0]                 expert 0: slots 1 2 5; expert 1: slot 4; expert 2: slot 0; 3 has no row
    counts_E     [3, 1, 1]

Legend: T tokens, N experts of every kind, K experts per token, E FFN experts, R rows. Expert ids run FFN, constant,
copy, zero (the order of MoE++'s released code), so ids below E are the ones that need a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch

from expertmesh.kernels.device import by_triton
from expertmesh.kernels.routing_triton import CHOSEN, PAPER, SIGMOID, Residual, Rule, route_triton
from expertmesh.kernels.slot_order_triton import sort_slots_triton

GateMode = Literal["paper", "released", "mixtral"]
TINY = 1e-20  # keeps a sum of sigmoid scores that all rounded to 0 from dividing


class Routing(NamedTuple):
    """What the router decided for T tokens."""

    experts_TK: torch.Tensor
    """int64 ids of the experts that serve the token, the first choice first; N where a full one dropped it."""
    weights_TK: torch.Tensor
    """float32 factor of each chosen expert's output; carries the gradient to the logits."""
    logits_TN: torch.Tensor
    """float32 complete logits, gating residual included: what the next layer's residual and the z-loss read."""
    scores_TN: torch.Tensor
    """float32 logits that decided, normed or noisy where the router says so: what balance losses read."""
    chosen_TK: torch.Tensor
    """int64 ids of the chosen experts, whether they serve the token or not."""

    @property
    def dropped_slots(self) -> int:
        """How many choices no expert serves. Waits for the device where there may be some."""
        if self.chosen_TK is self.experts_TK:
            return 0
        return int((self.chosen_TK != self.experts_TK).sum())


class SlotOrder(NamedTuple):
    """The rows that FFN experts compute, sorted by expert."""

    slots_R: torch.Tensor
    """int64 flat slot t*K+k that each row serves; expert-major, and by slot within one expert."""
    counts_E: torch.Tensor
    """int64 number of rows of each FFN expert."""


def add_residual(logits_TN: torch.Tensor, residual: Residual | None) -> torch.Tensor:
    """Complete logits, by torch's operations: the definition of what the Triton kernel adds on its way."""
    return logits_TN if residual is None else logits_TN + residual.previous_TN @ residual.map_NN.T


def route(
    logits_TN: torch.Tensor,
    top_k: int,
    gate_mode: GateMode,
    zero_experts: int = 0,
    ranking_TN: torch.Tensor | None = None,
    residual: Residual | None = None,
) -> Routing:
    """Choose `top_k` of N experts per token and weight them.

    Args:
        logits_TN: [T, N] router logits; any float dtype, computed in float32.
        top_k: K, from 1 to N.
        gate_mode: how the chosen experts are weighted.
            "paper": their softmax probabilities over all N, not renormalised (MoE++, arXiv 2410.07348, equation 1);
            "released": zero experts get 0 and the others' probabilities are divided by their sum (MoE++'s released
            code); a token whose choices are all zero experts gets weights 0;
            "mixtral": softmax over the K chosen logits.
        zero_experts: how many of the last ids are zero experts; only "released" treats them apart.
        ranking_TN: [T, N] who is chosen goes by these numbers in place of the logits, such as noisy ones.
        residual: what is added to the logits before anything else.

    Equal logits are taken in order of expert id, lowest first, on every device. Ranking is by logit rather than by
    probability, since the softmax rounds different logits to one probability.

    Raises:
        ValueError: for a `top_k` or `zero_experts` that N experts cannot give, or an unknown `gate_mode`.
    """
    num_experts = logits_TN.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}; it must be from 1 to the number of experts, {num_experts}")
    if not 0 <= zero_experts <= num_experts:
        raise ValueError(f"zero_experts is {zero_experts}; it must be from 0 to the number of experts, {num_experts}")
    if gate_mode not in get_args(GateMode):
        raise ValueError(f"gate_mode is {gate_mode!r}; it must be one of {', '.join(get_args(GateMode))}")

    logits_TN = logits_TN.float()
    if by_triton(logits_TN):
        rule = Rule(top_k, PAPER.value if gate_mode == "paper" else CHOSEN.value)
        if gate_mode == "released":
            rule = rule._replace(zero_experts=zero_experts)
        experts_TK, weights_TK, logits_TN = route_triton(logits_TN, rule, residual, ranking_TN)
        return Routing(experts_TK, weights_TK, logits_TN, logits_TN, experts_TK)
    logits_TN = add_residual(logits_TN, residual)
    # torch.topk promises no order among equals, and CPU and GPU differ; a stable sort has only one answer.
    ranking_TN = logits_TN if ranking_TN is None else ranking_TN
    experts_TK = ranking_TN.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()

    if gate_mode == "paper":
        weights_TK = logits_TN.softmax(dim=-1).gather(1, experts_TK)
    else:
        chosen_TK = logits_TN.gather(1, experts_TK)
        if gate_mode == "released" and zero_experts:
            weights_TK = _softmax_without(chosen_TK, experts_TK >= num_experts - zero_experts)
        else:
            weights_TK = chosen_TK.softmax(dim=-1)
    return Routing(experts_TK, weights_TK, logits_TN, logits_TN, experts_TK)


@dataclass(frozen=True)
class ExpertGroups:
    """Group-limited choice: N experts fall into `count` equal groups, in order; a token uses experts of `chosen`."""

    count: int
    chosen: int


def route_sigmoid(
    logits_TN: torch.Tensor,
    top_k: int,
    selection_bias_N: torch.Tensor | None = None,
    groups: ExpertGroups | None = None,
    residual: Residual | None = None,
) -> Routing:
    """Choose by sigmoid scores and weight by them, divided by their sum (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    Args:
        logits_TN: [T, N] router logits; computed in float32.
        top_k: K, from 1 to N.
        selection_bias_N: added to the scores for the choice alone; weights and gradients do not know of it.
        groups: the groups with the largest sums of their two best biased scores are chosen first.
        residual: what is added to the logits before anything else.

    Equal scores are taken in order of expert id, lowest first.
    """
    logits_TN = logits_TN.float()
    if by_triton(logits_TN):
        rule = Rule(top_k, SIGMOID.value)
        if groups is not None:
            rule = rule._replace(groups=groups.count, open_groups=groups.chosen)
        experts_TK, weights_TK, logits_TN = route_triton(logits_TN, rule, residual, bias_N=selection_bias_N)
        return Routing(experts_TK, weights_TK, logits_TN, logits_TN, experts_TK)
    logits_TN = add_residual(logits_TN, residual)
    scores_TN = logits_TN.sigmoid()
    ranking_TN = scores_TN.detach()
    if selection_bias_N is not None:
        ranking_TN = ranking_TN + selection_bias_N
    if groups is not None:
        ranking_TGn = ranking_TN.unflatten(1, (groups.count, -1))
        group_score_TG = ranking_TGn.topk(2, dim=-1).values.sum(-1)
        best_TG = group_score_TG.sort(dim=-1, descending=True, stable=True).indices[:, : groups.chosen]
        open_TG = torch.zeros_like(group_score_TG, dtype=torch.bool).scatter(1, best_TG, True)
        ranking_TN = ranking_TGn.masked_fill(~open_TG[..., None], -torch.inf).flatten(1)
    experts_TK = ranking_TN.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    return Routing(experts_TK, sigmoid_weights(logits_TN, experts_TK), logits_TN, logits_TN, experts_TK)


def sigmoid_weights(logits_TN: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
    """[T, K] float32 the sigmoid scores of these experts, divided by their sum; differentiable, whoever chose them."""
    scores_TK = logits_TN.gather(1, experts_TK).sigmoid()
    return scores_TK / (scores_TK.sum(-1, keepdim=True) + TINY)


def _softmax_without(chosen_TK: torch.Tensor, is_zero_TK: torch.Tensor) -> torch.Tensor:
    """Softmax over the chosen logits that are not a zero expert's; weights 0 where all of them are.

    Dividing probabilities by their sum is the same function, but yields 0/0 once a zero expert far ahead has rounded
    the other probabilities to 0.
    """
    # A row that hides every logit would be softmax(-inf, ...) = NaN, which later masks would cover up but anomaly
    # detection reports; so such a row hides none until after the softmax.
    all_zero_T1 = is_zero_TK.all(dim=-1, keepdim=True)
    hidden_TK = chosen_TK.masked_fill(is_zero_TK & ~all_zero_T1, float("-inf"))
    return hidden_TK.softmax(dim=-1).masked_fill(is_zero_TK, 0.0)


def expert_counts(experts_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many slots chose each expert: int64 [N], from int64 ids [T, K] in [0, N). No host synchronisation."""
    flat = experts_TK.flatten()
    return flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))


def sort_slots(experts_TK: torch.Tensor, ffn_experts: int) -> SlotOrder:
    """Order the slots of FFN experts by expert; slots of zero-computation experts (id >= `ffn_experts`) get no row.

    Args:
        experts_TK: [T, K] int64 expert ids, not negative.
        ffn_experts: E, the number of FFN experts.

    On a GPU this waits for the device once: R is the shape of the result.
    """
    if by_triton(experts_TK):
        slots, counts_E = sort_slots_triton(experts_TK, ffn_experts)
        return SlotOrder(slots[: int(counts_E.sum())], counts_E)
    flat = experts_TK.flatten().clamp(max=ffn_experts)
    counts_E = expert_counts(flat, ffn_experts + 1)[:ffn_experts]
    order = flat.argsort(stable=True)
    return SlotOrder(order[: int(counts_E.sum())], counts_E)
