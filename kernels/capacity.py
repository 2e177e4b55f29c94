"""Experts that serve no more than so many slots of a sequence: who is served, and who is dropped.

A dropped slot is routed to id N, one past the last expert: it gets no row, adds nothing, and the residual connection
carries the token on.

    chosen_TK  [[0, 1], [0, 2], [0, 0]]    one sequence, every expert serves 2    N = 3
    in order   token 0, 1, 2 by first choice, then 0, 1, 2 by second choice
    expert 0   is asked by slots 0 2 4 5, serves 0 2                              -> [[0, 1], [0, 2], [3, 3]]

Legend: T tokens in sequences of S, N experts, K choices per token.
"""

from __future__ import annotations

import torch


def serve_within(
    chosen_TK: torch.Tensor,
    capacity_N: torch.Tensor,
    sequence_length: int,
    lots_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Drop what is over the experts' capacity; no host synchronisation.

    Args:
        chosen_TK: [T, K] int64 ids in [0, N).
        capacity_N: [N] int64 slots of one sequence that each expert serves.
        sequence_length: S; T is a multiple of it. Sequences do not compete.
        lots_T: [T] float; the higher ones go first (DeepSpeed's random token selection). None: by position.

    Returns:
        [T, K] int64: the id where the slot is served, N where it is dropped. First choices go before second ones.
    """
    (T, K), N = chosen_TK.shape, len(capacity_N)
    device = chosen_TK.device
    queue_T = torch.arange(T, device=device) if lots_T is None else lots_T.argsort(descending=True, stable=True)
    slots = (queue_T[None, :] * K + torch.arange(K, device=device)[:, None]).flatten()  # choice by choice
    asked = (slots // K // sequence_length) * N + chosen_TK.flatten()[slots]  # an expert of one sequence
    by_asked = asked.argsort(stable=True)
    ordered = asked[by_asked]
    place = torch.arange(T * K, device=device) - torch.searchsorted(ordered, ordered)
    served = torch.where(place < capacity_N[ordered % N], ordered % N, N)
    return torch.empty_like(served).index_copy_(0, slots[by_asked], served).view(T, K)


def serve_within_ref(
    chosen_TK: torch.Tensor,
    capacity_N: torch.Tensor,
    sequence_length: int,
    lots_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition of `serve_within`: one slot after the other, counting."""
    served_TK = torch.full_like(chosen_TK, len(capacity_N))
    left: dict[tuple[int, int], int] = {}
    tokens = list(range(len(chosen_TK)))
    if lots_T is not None:
        tokens.sort(key=lambda token: -float(lots_T[token]))
    for choice in range(chosen_TK.shape[1]):
        for token in tokens:
            expert = int(chosen_TK[token, choice])
            key = token // sequence_length, expert
            left[key] = left.get(key, int(capacity_N[expert])) - 1
            if left[key] >= 0:
                served_TK[token, choice] = expert
    return served_TK


def capacities(
    ffn_experts: int, zero_computation_experts: int, tau: float, slots: int, factor: float, minimum: int
) -> torch.Tensor:
    """[N] int64 slots that each expert serves of `slots` = K * S (MoE++, arXiv 2410.07348, equation 8).

    Before rounding up they add up to factor * slots. tau = 1, or no zero-computation expert, makes them equal:
    DeepSpeed's and Switch's capacity.
    """
    shares = torch.ones(ffn_experts + zero_computation_experts, dtype=torch.float64)
    shares[:ffn_experts] = tau
    # A hair less than the product, which floats may put above a whole number that it equals.
    exact = factor * slots * shares / shares.sum() - 1e-9
    return exact.ceil().long().clamp(min=max(minimum, 0))
