"""FFN skipping while decoding (FFN-SkipLLM, arXiv 2404.03865): a token that FFNs change little any more goes past some.

    c = cos(h, h')       h of a token before the FFN half of a layer, h' after it, residual included
    c >= above           the FFN halves of the next `layers` layers are left out for this token: h' = h there
                         then c is measured again

    6 layers, warm 1..4, layers = 2, always similar enough      layer   0     1         2       3       4         5
                                                                FFN     yes   measured  -       -       measured  yes

Attention is never left out, so the cache has keys and values of each layer and token. Nor is an FFN half of the cold
layers (the first and the last), or of a token that may not: one of a prompt, or of the first of an answer. Each token
is decided by itself.

Legend: T tokens, R those that go through a layer's FFN half, N experts, K of them a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import cosine_similarity

from expertmesh.kernels.routing import Routing

if TYPE_CHECKING:  # which has a part of this file in it
    from expertmesh.system.model.context import Context

FFNHalf = Callable[[torch.Tensor, Routing | None, "Context"], tuple[torch.Tensor, Routing | None]]


class SkipRule(NamedTuple):
    """When a token goes past FFN halves, and past how many."""

    above: float  # the least cosine; beyond 1 nothing is left out
    layers: int
    warm: range  # the layers in which it is measured and left out


class FFNSkip:
    """Of one pass over T tokens; layers come in their order. `may_T`: bool, the tokens that may go past FFN halves."""

    def __init__(self, rule: SkipRule, may_T: torch.Tensor) -> None:
        self._rule, self._may_T = rule, may_T
        self._left_T = torch.zeros_like(may_T, dtype=torch.int64)  # how many FFN halves are still to be left out

    def __call__(
        self, half: FFNHalf, x_TD: torch.Tensor, previous: Routing | None, context: Context
    ) -> tuple[torch.Tensor, Routing | None]:
        """What `half` makes of the tokens that go through it; the others stay as they are."""
        rule = self._rule
        if context.layer not in rule.warm:
            return half(x_TD, previous, context)
        past_T = self._left_T > 0
        self._left_T -= past_T.long()
        through_R = (~past_T).nonzero()[:, 0]  # on a GPU this waits for the device
        inner = context._replace(positions_T=context.positions_T[through_R])
        before = None if previous is None else Routing(*(part[through_R] for part in previous))
        x_RD = x_TD[through_R]
        y_RD, experts = half(x_RD, before, inner)
        similar_R = cosine_similarity(x_RD.float(), y_RD.float(), dim=-1) >= rule.above
        self._left_T[through_R] = rule.layers * (similar_R & self._may_T[through_R]).long()
        y_TD = x_TD.index_copy(0, through_R, y_RD)
        return y_TD, None if experts is None else _of_all(experts, through_R, previous, len(x_TD))


def _of_all(experts: Routing, through_R: torch.Tensor, previous: Routing | None, tokens: int) -> Routing:
    """The decision for all tokens: those that went past have no expert, and hand on the logits of the layer before."""
    num_experts, logits_RN = experts.logits_TN.shape[1], experts.logits_TN
    nobody_TK = experts.experts_TK.new_full((tokens, experts.experts_TK.shape[1]), num_experts)
    logits_TN = logits_RN.new_zeros(tokens, num_experts)
    if previous is not None and previous.logits_TN.shape == logits_TN.shape:  # else no residual reads them
        logits_TN = previous.logits_TN
    weights_TK = experts.weights_TK.new_zeros(nobody_TK.shape)
    experts_TK = nobody_TK.index_copy(0, through_R, experts.experts_TK)
    logits_TN = logits_TN.index_copy(0, through_R, logits_RN)
    return Routing(
        experts_TK, weights_TK.index_copy(0, through_R, experts.weights_TK), logits_TN, logits_TN, experts_TK
    )
