"""What a query may look at: the one thing in attention that differs between training and serving.

A layer makes queries, keys and values (attention.py, latent_attention.py, mixture_attention.py) and hands them to an
`Attend`: `CausalAttend` for whole training sequences, `ContextAttend` for those that are split over ranks, the serving
engine's cache for requests of any length. So all run the same layers.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from expertmesh.kernels.stick_breaking import stick_breaking
from expertmesh.parallel.sequence_split import SequenceSplit
from expertmesh.system.model.attention_config import Weighting


class Look(NamedTuple):
    """How a layer looks at what is visible: how many tokens back, itself included (None: all), and how it weights."""

    window: int | None = None
    weighting: Weighting = "softmax"


class Attend(Protocol):
    """Answers each query from the keys and values it may see."""

    cached: bool
    """Whether keys and values are kept for later tokens, so that narrow ones are worth some arithmetic."""

    def __call__(
        self, layer: int, q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGe: torch.Tensor, look: Look
    ) -> torch.Tensor:
        """Return o_THe. T tokens, H query heads, G key-value heads, d and e widths of keys and of values."""
        ...

    def among(self, chosen_T: torch.Tensor) -> Attend:
        """The same for the tokens of a bool mask: they alone are asked about, and they alone are seen."""
        ...


def attend_to(
    q_BHSd: torch.Tensor,
    k_BGCd: torch.Tensor,
    v_BGCe: torch.Tensor,
    look: Look,
    seen_BC: torch.Tensor | None = None,
) -> torch.Tensor:
    """o_BHSe: S queries that stand at the last S of C positions; each sees its own position and those before.

    `seen_BC`: bool, which positions hold a key at all; None: all of them.
    """
    queries, keys = q_BHSd.shape[2], k_BGCd.shape[2]
    nothing_hidden = seen_BC is None and (look.window is None or keys <= look.window)
    if nothing_hidden and look.weighting == "softmax" and queries in (1, keys):  # the fused kernels, without a mask
        return F.scaled_dot_product_attention(q_BHSd, k_BGCd, v_BGCe, is_causal=queries == keys, enable_gqa=True)
    visible = causal_mask(queries, keys, look.window, q_BHSd.device)
    if seen_BC is not None:
        visible = visible & seen_BC[:, None, None, :]
    return attend_where(q_BHSd, k_BGCd, v_BGCe, look.weighting, visible)


def attend_where(
    q_BHSd: torch.Tensor, k_BGCd: torch.Tensor, v_BGCe: torch.Tensor, weighting: Weighting, visible: torch.Tensor
) -> torch.Tensor:
    """o_BHSe where a query sees the keys of `visible`, bool that fits [B, H, S, C]; keys lie in order of positions."""
    if weighting == "stick_breaking":
        return stick_breaking(q_BHSd, k_BGCd, v_BGCe, visible)
    return F.scaled_dot_product_attention(q_BHSd, k_BGCd, v_BGCe, attn_mask=visible, enable_gqa=True)


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [queries, keys]: the last query stands at the last key; each sees keys up to its own, `window` at most."""
    last = keys - queries
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(last)
    return visible if window is None else visible.triu(last - window + 1)


class CausalAttend:
    """T tokens are sequences of one length, one after the other; a token sees itself and what came before."""

    cached = False

    def __init__(self, sequence_length: int, chosen_T: torch.Tensor | None = None) -> None:
        self.sequence_length, self.chosen_T = sequence_length, chosen_T

    def among(self, chosen_T: torch.Tensor) -> CausalAttend:
        assert self.chosen_T is None, "tokens are chosen once a layer"
        return CausalAttend(self.sequence_length, chosen_T)

    def __call__(
        self, layer: int, q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGe: torch.Tensor, look: Look
    ) -> torch.Tensor:
        q_BHSd, k_BGSd, v_BGSe = (self._by_sequence(t) for t in (q_THd, k_TGd, v_TGe))
        seen_BS = None if self.chosen_T is None else self.chosen_T.view(-1, self.sequence_length)
        o_THe = attend_to(q_BHSd, k_BGSd, v_BGSe, look, seen_BS).transpose(1, 2).flatten(0, 1)
        return o_THe if self.chosen_T is None else o_THe[self.chosen_T]

    def _by_sequence(self, x_THd: torch.Tensor) -> torch.Tensor:
        if self.chosen_T is not None:  # to its place among all tokens; nobody looks at the gaps
            x_THd = x_THd.new_zeros(len(self.chosen_T), *x_THd.shape[1:]).index_put((self.chosen_T,), x_THd)
        return x_THd.unflatten(0, (-1, self.sequence_length)).transpose(1, 2)


class ContextAttend:
    """Of every sequence some positions are here, the others on the other ranks of a context-parallel group."""

    cached = False

    def __init__(self, split: SequenceSplit) -> None:
        self.split = split

    def among(self, chosen_T: torch.Tensor) -> Attend:
        raise AssertionError("tokens are chosen among those of a whole sequence")

    def __call__(
        self, layer: int, q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGe: torch.Tensor, look: Look
    ) -> torch.Tensor:
        length, positions_C = self.split.length, self.split.positions_C(q_THd.device)
        q_BHCd = q_THd.unflatten(0, (-1, len(positions_C))).transpose(1, 2)
        gathered = (self.split.gather(t_TGx, f"layer {layer}") for t_TGx in (k_TGd, v_TGe))
        k_BGSd, v_BGSe = (t_TGx.unflatten(0, (-1, length)).transpose(1, 2) for t_TGx in gathered)
        visible_CS = causal_mask(length, length, look.window, q_THd.device)[positions_C]
        return attend_where(q_BHCd, k_BGSd, v_BGSe, look.weighting, visible_CS).transpose(1, 2).flatten(0, 1)
