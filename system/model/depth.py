"""Mixture of depths: in some layers a router sends a part of the tokens through and the others past.

    p = softmax(W n(x))[1],  W [2, D]          n: the block's own first norm; W one for all such layers, or one for each
    y = x + p (block(x) - x)                   for the tokens that go through; they see each other and nobody else
    y = x                                      for the others, bit for bit

    8 tokens, kept = 1/2     p  .9 .2 .6 .6 .1 .7 .3 .6    ->  0 2 3 5 go through (7 ties with 2 and 3 and is later)

Training sends the `kept` share of each sequence through, those with the largest p. Serving cannot look ahead, so there
a token goes through where its own p is above `threshold`; a loss teaches the router to be above 1/2 for those chosen.

The block's whole change is weighted, as in the papers: mixture of depths (arXiv 2404.02258, equation 1), gamma-MoD
(arXiv 2410.13859), whose released code weights the MLP's answer alone. Positions stay those in the sequence; that code
counts the chosen tokens anew while training.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from expertmesh.kernels.routing import Routing
from expertmesh.system.model.config import DepthConfig
from expertmesh.system.model.context import Context, Decisions, DepthChoice
from expertmesh.system.model.gate import LinearGate


class DepthRouted(nn.Module):
    """Stands where `block` would. Its parts are the block's, under the names that they have in every block."""

    def __init__(self, config: DepthConfig, block: nn.Module, router: LinearGate) -> None:
        super().__init__()
        self.config = config
        self._through = [block]  # in a list: as a child it would give its parts a second name
        for name, part in block.named_children():
            self.add_module(name, part)
        self.depth_router = router

    def forward(self, x_TD: torch.Tensor, previous: Routing | None, context: Context) -> tuple[torch.Tensor, Decisions]:
        logits_T2 = self.depth_router(self.input_layernorm(x_TD))
        p_T = logits_T2.softmax(dim=-1)[:, 1]
        training = context.training
        if training is None:
            chosen_T = p_T > self.config.threshold
        else:
            kept = self.config.tokens(training.sequence_length)
            chosen_T = largest(logits_T2[:, 1] - logits_T2[:, 0], training.sequence_length, kept)
            training = dataclasses.replace(training, sequence_length=kept)  # what the block is given
        chosen_R = chosen_T.nonzero()[:, 0]  # on a GPU this waits for the device

        x_RD = x_TD[chosen_R]
        inner = context._replace(
            positions_T=context.positions_T[chosen_R], attend=context.attend.among(chosen_T), training=training
        )
        # With no token chosen too: other ranks wait for this one's experts, and the cache notes who went past.
        through_RD, decided = self._through[0](x_RD, None, inner)
        # Unlike x + p (y - x), lerp is exactly y at p = 1.
        y_RD = torch.lerp(x_RD, through_RD, p_T[chosen_R, None].type_as(x_RD))
        return x_TD.index_copy(0, chosen_R, y_RD), decided._replace(depth=DepthChoice(logits_T2, chosen_T))


def largest(scores_T: torch.Tensor, sequence_length: int, count: int) -> torch.Tensor:
    """bool [T]: the `count` largest of each sequence; of equal ones the earlier. No host synchronisation.

    Scores are the distances between two logits rather than probabilities, which round different logits to one.
    """
    scores_BS = scores_T.detach().unflatten(0, (-1, sequence_length))
    first_BK = scores_BS.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(scores_BS, dtype=torch.bool).scatter(1, first_BK, True).flatten()


def largest_ref(scores_T: torch.Tensor, sequence_length: int, count: int) -> torch.Tensor:
    """The definition of `largest`: a token goes through if fewer than `count` of its sequence are before it."""
    chosen: list[bool] = []
    for scores in scores_T.view(-1, sequence_length).tolist():
        for i, score in enumerate(scores):
            before = sum(other > score for other in scores) + scores[:i].count(score)
            chosen.append(before < count)
    return torch.tensor(chosen, dtype=torch.bool)
