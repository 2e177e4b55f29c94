"""What is timed: sizes, and for each of them the weights and tokens that all contenders share.

Tokens are drawn so that rounding cannot send one elsewhere: of the candidates only those stay whose last chosen and
first refused logit are `MARGIN` apart. So a layer that routes in bfloat16 computes the same rows as one that routes in
float64, all answers can be compared, and nobody is timed on an easier split.

Legend: S sets of tokens, T tokens, D model width, F hidden width, G = 2F, N experts of every kind, E FFN experts,
C constant experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# bfloat16 rounds a logit of 4 by up to 0.008; float32 adds up 512 products to about 1e-6.
MARGIN = {torch.float32: 1e-4, torch.bfloat16: 0.04}
TAUS = (0.10, 0.25, 0.50, 0.75, 1.00)
PLUS_PLUS_EXPERTS = (8, 16)
ZERO, COPY, CONSTANT = 1, 1, 2  # the zero-computation experts of MoE++ 8+4 and 16+4 (arXiv 2410.07348, table 3)
DECODE_TOKENS = 768  # few tokens come in many sets, that no cache holds the weights of the last call's experts


@dataclass(frozen=True)
class Case:
    """One size of a layer and its batch."""

    dtype: str
    tokens: int
    experts: int
    top_k: int
    hidden_size: int = 512
    ffn_size: int = 1024

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    @property
    def sets(self) -> int:
        """Different sets of tokens that one sample goes through: 24 for up to 32 tokens, 1 from 512 on."""
        return max(1, min(24, DECODE_TOKENS // self.tokens))

    def __str__(self) -> str:
        return f"{self.dtype}, {self.tokens} tokens, {self.experts} experts, top-{self.top_k}"


@dataclass(frozen=True)
class Grid:
    """Every combination of these, but for more choices than experts."""

    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 128, 512, 2048, 8192)
    experts: tuple[int, ...] = (8, 16, 64)
    top_k: tuple[int, ...] = (1, 2, 8)
    dtypes: tuple[str, ...] = tuple(DTYPES)
    hidden_size: int = 512
    ffn_size: int = 1024

    def __post_init__(self) -> None:
        for name in ("tokens", "experts", "top_k"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name}={list(getattr(self, name))}: all must be 1 or more")
        unknown = [dtype for dtype in self.dtypes if dtype not in DTYPES]
        if unknown:
            raise ValueError(f"dtype={unknown[0]}: it must be one of {', '.join(DTYPES)}")
        if (
            min(self.hidden_size, self.ffn_size) < 1 or self.hidden_size % 16 or self.ffn_size % 16
        ):  # torch's grouped GEMM wants rows of whole 16 bytes
            raise ValueError(f"hidden_size={self.hidden_size}, ffn_size={self.ffn_size}: both must be multiples of 16")
        if not list(self.cases()):
            raise ValueError(f"top_k={list(self.top_k)} are all more than experts={list(self.experts)}")

    def cases(self) -> Iterator[Case]:
        for dtype in self.dtypes:
            for experts in self.experts:
                for top_k in self.top_k:
                    for tokens in self.tokens:
                        if top_k <= experts:
                            yield Case(dtype, tokens, experts, top_k, self.hidden_size, self.ffn_size)

    def plus_plus_cases(self) -> Iterator[Case]:
        """Those among them that MoE++ has."""
        return (case for case in self.cases() if case.experts in PLUS_PLUS_EXPERTS and case.top_k == 2)


QUICK = Grid(tokens=(8, 2048), experts=(16,), top_k=(2,))


def change_grid(
    quick: bool,
    tokens: str | None = None,
    experts: str | None = None,
    top_k: str | None = None,
    dtype: str | None = None,
    hidden_size: int | None = None,
    ffn_size: int | None = None,
) -> Grid:
    """The whole grid or the quick one, with the lists that a command line gave ("1,32,2048") in place of its own.

    Raises:
        ValueError: for something that is no list of numbers, or that `Grid` refuses.
    """
    changes: dict[str, Any] = {"hidden_size": hidden_size, "ffn_size": ffn_size}
    for name, text in (("tokens", tokens), ("experts", experts), ("top_k", top_k)):
        changes[name] = whole_numbers(name, text) if text else None
    changes["dtypes"] = tuple(dtype.split(",")) if dtype else None
    return replace(QUICK if quick else Grid(), **{name: value for name, value in changes.items() if value is not None})


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """The list that a command line gave. ValueError for something else."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"{name}={text}: give numbers with commas between them, such as 1,2,8") from None


class Weights(NamedTuple):
    """Of one layer, in Hugging Face's layout. Ids run FFN, constant, copy, zero."""

    router_ND: torch.Tensor
    gate_up_EGD: torch.Tensor  # of the G rows the first F are the gate's
    down_EDF: torch.Tensor
    mix_C2D: torch.Tensor
    constant_CD: torch.Tensor
    copy_experts: int = 0

    @property
    def zero_experts(self) -> int:
        return len(self.router_ND) - len(self.gate_up_EGD) - len(self.constant_CD) - self.copy_experts


class Problem(NamedTuple):
    """What every contender is given."""

    case: Case
    weights: Weights
    inputs_STD: torch.Tensor
    gradients_STD: torch.Tensor  # of the answers


def draw(case: Case) -> Problem:
    """A layer without zero-computation experts, and its tokens; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    weights, x_TD = _weights(case, generator), _candidates(case, generator)
    return _problems(case, [weights], x_TD, MARGIN[DTYPES[case.dtype]], generator)[0]


def draw_plus_plus(case: Case, taus: tuple[float, ...] = TAUS) -> list[Problem]:
    """The same tokens for a vanilla layer and for a MoE++ layer at each tau, all with the same FFN experts.

    The balance loss of MoE++ is least where an FFN expert is chosen tau times as often as a zero-computation one, so
    that tau E / (tau E + Z) of the slots go to E FFN experts beside Z others (arXiv 2410.07348, equations 7 to 9). An
    untrained router is brought there by one number: every token carries a 1, whose weight lowers or raises the logits
    of the zero-computation experts.
    """
    generator = torch.Generator().manual_seed(0)
    vanilla, x_TD = _weights(case, generator), _candidates(case, generator)
    x_TD[:, 0] = 1.0
    width, others, dtype = case.hidden_size, CONSTANT + COPY + ZERO, DTYPES[case.dtype]
    mix_C2D = (torch.randn(CONSTANT, 2, width, generator=generator) / width**0.5).to(dtype)
    constant_CD = torch.randn(CONSTANT, width, generator=generator).to(dtype)
    of_others_ZD = (torch.randn(others, width, generator=generator) / width**0.5).to(dtype)
    of_others_ZD[:, 0] = 0.0
    router_ND = torch.cat([vanilla.router_ND, of_others_ZD])

    def plus_plus(tau: float) -> Weights:
        share = tau * case.experts / (tau * case.experts + others)
        balanced_ND = router_ND.clone()
        balanced_ND[case.experts :, 0] = _bias_for(share, x_TD[: case.sets * case.tokens], router_ND, case)
        return Weights(balanced_ND, vanilla.gate_up_EGD, vanilla.down_EDF, mix_C2D, constant_CD, COPY)

    layers = [vanilla, *(plus_plus(tau) for tau in taus)]
    # Only our layers run these, which route in float32; a wider margin would favour some kinds of experts.
    return _problems(case, layers, x_TD, MARGIN[torch.float32], generator)


def choose(x_TD: torch.Tensor, router_ND: torch.Tensor, top_k: int) -> torch.Tensor:
    """[T, K] ids of the experts with the largest logits, in float64."""
    return (x_TD.double() @ router_ND.double().T).topk(top_k, dim=-1).indices


def _weights(case: Case, generator: torch.Generator) -> Weights:
    """Scaled so that logits and hidden units have a variance of 1."""
    E, D, F = case.experts, case.hidden_size, case.ffn_size

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(DTYPES[case.dtype])

    router_ND = normal(E, D)
    router_ND[:, 0] = 0.0  # the feature that may carry a bias; 0 here for every layer alike
    return Weights(router_ND, normal(E, 2 * F, D), normal(E, D, F), normal(0, 2, D), normal(0, D))


def _candidates(case: Case, generator: torch.Generator) -> torch.Tensor:
    """More tokens than are wanted: of 64 experts and top-8, a margin of 0.04 leaves two in three."""
    x_TD = torch.randn(3 * case.sets * case.tokens + 64, case.hidden_size, generator=generator)
    return x_TD.to(DTYPES[case.dtype])


def _problems(
    case: Case, layers: list[Weights], x_TD: torch.Tensor, margin: float, generator: torch.Generator
) -> list[Problem]:
    """`layers` with the same tokens: the first of `x_TD` that all of them route clearly."""
    for weights in layers:
        x_TD = x_TD[_gap(x_TD, weights.router_ND, case.top_k) > margin]
    wanted = case.sets * case.tokens
    assert len(x_TD) >= wanted, f"{len(x_TD)} of {wanted} tokens are routed clearly"
    inputs_STD = x_TD[:wanted].view(case.sets, case.tokens, case.hidden_size)
    gradients_STD = torch.randn(inputs_STD.shape, generator=generator).to(inputs_STD.dtype)
    return [Problem(case, weights, inputs_STD, gradients_STD) for weights in layers]


def _gap(x_TD: torch.Tensor, router_ND: torch.Tensor, top_k: int) -> torch.Tensor:
    """[T] how far the last chosen logit lies above the first refused one."""
    logits_TN = x_TD.double() @ router_ND.double().T
    if top_k == logits_TN.shape[1]:
        return torch.full((len(x_TD),), torch.inf)
    ranked_TN = logits_TN.sort(dim=-1, descending=True).values
    return ranked_TN[:, top_k - 1] - ranked_TN[:, top_k]


def _bias_for(share: float, x_TD: torch.Tensor, router_ND: torch.Tensor, case: Case) -> float:
    """The logit to add to zero-computation experts so that `share` of the slots go to FFN experts, by bisection."""
    logits_TN = x_TD.float() @ router_ND.float().T
    low, high = -10.0, 10.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        shifted_TN = logits_TN.clone()
        shifted_TN[:, case.experts :] += middle
        of_ffn = (shifted_TN.topk(case.top_k, dim=-1).indices < case.experts).double().mean()
        low, high = (middle, high) if of_ffn > share else (low, middle)
    return (low + high) / 2
