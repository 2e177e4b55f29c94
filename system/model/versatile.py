"""One SwiGLU used wide and deep, as each token needs it (VersatileFFN, arXiv 2512.14531; its released code).

It stands in the second half of a block and adds its own residuals. With x the token after attention, n a norm, and
slice_i the i-th of equal parts of the hidden units:

    width    z = W_w x;  w = softmax of the top_k largest z        x_width = sum over those of w_i (x + slice_i(n(x)))
    depth    x_0 = x,  x_i = x_(i-1) + FFN(n(x_(i-1)))             x_depth = x_l,  l in 1 .. loops chosen by W_d x
    y        (1 - a) x_depth + a x_width                           a = (loops - l) / loops

So a token that loops often leaves the width alone. Both maps read x as it is, without the norm, as the released code
has it. l is the largest of W_d x; while training, of W_d x + Gumbel noise, and the gradient goes through the softmax of
that over a temperature, which falls from step to step (straight-through). l in a is that same choice, in training too:
so has it the code, where the paper (equation 12) takes the mean of the softmax.

The slices cost little: the first loop has made every hidden unit of n(x), and the weights w are a factor on them before
one more product with down. The paper's loss that balances slices (5e-5 in its runs) is not here.

Legend: T tokens, D model width, F hidden width, W slices, L loops.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from expertmesh.kernels.routing import route
from expertmesh.system.model.context import Context
from expertmesh.system.model.dense import SwiGLU
from expertmesh.system.model.experts_config import VersatileConfig


class VersatileFFN(SwiGLU):
    """A SwiGLU with two small maps that say which slices of it a token uses, and how many times all of it."""

    def __init__(self, config: VersatileConfig, hidden_size: int) -> None:
        super().__init__(hidden_size, config.hidden_size)
        self.config = config
        self.slice_gate = nn.Linear(hidden_size, config.slices, bias=False)
        self.loop_gate = nn.Linear(hidden_size, config.loops, bias=False)

    def forward(self, x_TD: torch.Tensor, norm: nn.Module, context: Context) -> torch.Tensor:  # type: ignore[override]
        choice_TL = self._choose_loops(x_TD, context)
        first_TF = self.hidden(norm(x_TD))
        width_TD = x_TD + self.down_proj(first_TF * self._unit_weights(x_TD))
        loops = self.config.loops
        loop_TD = x_TD + self.down_proj(first_TF)
        depth_TD = choice_TL[:, :1] * loop_TD
        for loop in range(1, loops):
            if context.training is None and not choice_TL[:, loop:].any():
                break  # nobody goes on
            loop_TD = loop_TD + self.down_proj(self.hidden(norm(loop_TD)))
            depth_TD = depth_TD + choice_TL[:, loop : loop + 1] * loop_TD
        share_T1 = 1 - choice_TL @ torch.arange(1, loops + 1).to(choice_TL)[:, None] / loops
        return (1 - share_T1) * depth_TD + share_T1 * width_TD

    def _choose_loops(self, x_TD: torch.Tensor, context: Context) -> torch.Tensor:
        """[T, L] in x's dtype: 1 at the number of loops of each token, 0 elsewhere."""
        logits_TL = functional.linear(x_TD.float(), self.loop_gate.weight.float())
        if context.training is None:
            return functional.one_hot(logits_TL.argmax(dim=1), self.config.loops).type_as(x_TD)
        lots_TL = context.training.lots(context.layer, "loops", self.config.loops, x_TD.device)
        temperature = self.config.temperature(context.training.step)
        soft_TL = ((logits_TL - torch.log(-torch.log(lots_TL))) / temperature).softmax(dim=1)
        hard_TL = functional.one_hot(soft_TL.argmax(dim=1), self.config.loops)
        return (hard_TL + soft_TL - soft_TL.detach()).type_as(x_TD)

    def _unit_weights(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, F] in x's dtype: for each hidden unit the weight of its slice, 0 where that is not chosen."""
        logits_TW = functional.linear(x_TD.float(), self.slice_gate.weight.float())
        chosen = route(logits_TW, self.config.top_k, "mixtral")
        weights_TW = torch.zeros_like(logits_TW).scatter(1, chosen.experts_TK, chosen.weights_TK)
        return weights_TW.type_as(x_TD).repeat_interleave(self.config.hidden_size // self.config.slices, dim=1)
