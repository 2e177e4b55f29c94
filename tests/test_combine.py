"""Tokens to rows and back, against the definition in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from numerics import assert_close

from expertmesh.kernels.combine import combine_rows, combine_rows_ref, gather_rows, gather_rows_ref
from expertmesh.kernels.routing import sort_slots


class Case(NamedTuple):
    tokens: int
    top_k: int
    d: int
    experts: int
    ffn_experts: int
    reason: str


CASES = [
    Case(0, 2, 5, 4, 4, "no tokens"),
    Case(1, 2, 5, 4, 4, "one token"),
    Case(9, 1, 4, 4, 3, "k is 1"),
    Case(6, 3, 8, 4, 0, "all slots zero-computation: no rows"),
    Case(8, 2, 16, 2, 2, "every token on every expert"),
    Case(37, 4, 13, 12, 8, "odd sizes, some tokens short of rows"),
    Case(64, 2, 64, 16, 2, "most tokens without a row"),
]


def inputs_for(case: Case, dtype: torch.dtype):
    """Tokens, rows, slots, gate weights; each token's experts are distinct."""
    generator = torch.Generator().manual_seed(case.tokens + case.d)
    experts_TK = torch.rand(case.tokens, case.experts, generator=generator).argsort(dim=1)[:, : case.top_k]
    slots_R = sort_slots(experts_TK, case.ffn_experts).slots_R
    x_TD = torch.randn(case.tokens, case.d, generator=generator).to(dtype).requires_grad_()
    rows_RD = torch.randn(len(slots_R), case.d, generator=generator).to(dtype).requires_grad_()
    weights_TK = torch.rand(case.tokens, case.top_k, generator=generator).requires_grad_()
    return x_TD, rows_RD, slots_R, weights_TK


def gradient_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)).to(tensor.dtype)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double().requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_gather(case, dtype):
    x_TD, _, slots_R, _ = inputs_for(case, dtype)
    rows_RD, reference_TD = gather_rows(x_TD, slots_R, case.top_k), wide(x_TD)
    expected_RD = gather_rows_ref(reference_TD, slots_R, case.top_k)
    assert rows_RD.dtype == dtype and torch.equal(rows_RD.double(), expected_RD)
    grad_RD = gradient_like(rows_RD)
    (got,) = torch.autograd.grad(rows_RD, x_TD, grad_RD)
    (want,) = torch.autograd.grad(expected_RD, reference_TD, grad_RD.double())
    assert_close(got, want, what="gradient of x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_combine(case, dtype):
    _, rows_RD, slots_R, weights_TK = inputs_for(case, dtype)
    y_TD = combine_rows(rows_RD, slots_R, weights_TK)
    reference = wide(rows_RD), wide(weights_TK)
    # The 0 ties the result to both tensors where there are no rows to do so.
    expected_TD = combine_rows_ref(reference[0], slots_R, reference[1]) + 0 * (reference[0].sum() + reference[1].sum())
    assert y_TD.dtype == dtype
    assert_close(y_TD, expected_TD, what="output")
    grad_TD = gradient_like(y_TD)
    got = torch.autograd.grad(y_TD, (rows_RD, weights_TK), grad_TD)
    want = torch.autograd.grad(expected_TD, reference, grad_TD.double())
    assert_close(got[0], want[0], what="gradient of rows")
    assert got[1].dtype == torch.float32
    assert_close(got[1], want[1], what="gradient of weights")
    without_row = torch.ones(weights_TK.numel(), dtype=torch.bool).index_fill_(0, slots_R, False)
    assert (got[1].flatten()[without_row] == 0).all()


def test_the_order_of_rows_does_not_matter():
    """A dispatcher may return rows in another order than it was given; the slots say whose they are, to the bit."""
    _, rows_RD, slots_R, weights_TK = inputs_for(CASES[5], torch.float32)
    shuffled = torch.randperm(len(slots_R), generator=torch.Generator().manual_seed(0))
    same = combine_rows(rows_RD[shuffled], slots_R[shuffled], weights_TK)
    assert torch.equal(same, combine_rows(rows_RD, slots_R, weights_TK))


def test_bfloat16_rows_are_summed_in_float32():
    """1 + 1/256 + 1/256 is a bfloat16 number, but adding one 1/256 at a time rounds back to 1 each time."""
    rows_RD = torch.tensor([[1.0], [1 / 256], [1 / 256]], dtype=torch.bfloat16)
    slots_R, weights_TK = torch.arange(3), torch.ones(1, 3)
    assert combine_rows(rows_RD, slots_R, weights_TK).item() == 1 + 1 / 128
    x_TD = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    gather_rows(x_TD, slots_R, 3).backward(rows_RD)
    assert x_TD.grad.item() == 1 + 1 / 128


def test_gate_weights_are_not_rounded_to_the_rows_dtype():
    weights_TK = torch.tensor([[1.001953125, -1.0]])
    rows_RD = torch.ones(2, 4, dtype=torch.bfloat16)
    assert torch.equal(combine_rows(rows_RD, torch.arange(2), weights_TK), torch.full((1, 4), 2.0**-9).bfloat16())


def test_gather_then_combine_with_weights_one_counts_rows():
    x_TD, _, slots_R, weights_TK = inputs_for(CASES[6], torch.float32)
    rows_of_token_T = torch.bincount(slots_R // CASES[6].top_k, minlength=CASES[6].tokens)
    y_TD = combine_rows(gather_rows(x_TD, slots_R, CASES[6].top_k), slots_R, torch.ones_like(weights_TK))
    assert torch.equal(y_TD, x_TD * rows_of_token_T[:, None])


def test_gradcheck():
    slots_R = torch.tensor([3, 0, 5])
    x_TD = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    rows_RD = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weights_TK = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, slots_R, 2), (x_TD,))
    assert torch.autograd.gradcheck(lambda r, w: combine_rows(r, slots_R, w), (rows_RD, weights_TK))


def test_a_repeated_call_gives_the_same_bits():
    def everything():
        x_TD, rows_RD, slots_R, weights_TK = inputs_for(Case(301, 6, 40, 12, 9, "repeat"), torch.float32)
        gathered, y_TD = gather_rows(x_TD, slots_R, 6), combine_rows(rows_RD, slots_R, weights_TK)
        grads = torch.autograd.grad((gathered, y_TD), (x_TD, rows_RD, weights_TK), (rows_RD, x_TD))
        return gathered, y_TD, *grads

    assert all(torch.equal(a, b) for a, b in zip(everything(), everything(), strict=True))
