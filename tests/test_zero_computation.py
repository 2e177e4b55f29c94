"""Zero, copy and constant experts against a loop over slots in float64, and the identities they must satisfy."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from numerics import assert_close

from expertmesh.kernels.zero_computation import zero_computation, zero_computation_ref


class Case(NamedTuple):
    tokens: int
    top_k: int
    ffn: int
    constant: int
    copy: int
    zero: int
    reason: str


CASES = [
    Case(0, 2, 4, 2, 1, 1, "no tokens"),
    Case(1, 2, 4, 2, 1, 1, "one token"),
    Case(12, 1, 2, 2, 1, 1, "k is 1"),
    Case(9, 2, 0, 2, 1, 1, "every slot zero-computation"),
    Case(9, 2, 3, 0, 1, 1, "no constant experts"),
    Case(9, 2, 3, 2, 0, 1, "no copy experts"),
    Case(9, 2, 3, 1, 1, 0, "no zero experts"),
    Case(9, 2, 4, 0, 0, 0, "FFN experts only: nothing to add"),
    Case(23, 5, 3, 3, 2, 2, "several of each kind in one token"),
]
D = 7


def inputs_for(case: Case, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(case.tokens + case.top_k)
    total = case.ffn + case.constant + case.copy + case.zero
    experts_TK = torch.rand(case.tokens, total, generator=generator).argsort(dim=1)[:, : case.top_k]
    shapes = [(case.tokens, D), (case.constant, 2, D), (case.constant, D)]
    x_TD, mix_C2D, constant_CD = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes)
    weights_TK = torch.rand(case.tokens, case.top_k, generator=generator).requires_grad_()
    return experts_TK, (x_TD, weights_TK, mix_C2D, constant_CD)


def output_and_gradients(function, case, experts_TK, tensors, grad_TD):
    x_TD, weights_TK, mix_C2D, constant_CD = tensors
    y_TD = function(x_TD, experts_TK, weights_TK, case.ffn, mix_C2D, constant_CD, case.copy)
    if not y_TD.requires_grad:
        return y_TD, *(torch.zeros_like(t) for t in tensors)
    return y_TD, *torch.autograd.grad(y_TD, tensors, grad_TD, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_output_and_gradients(case, dtype):
    experts_TK, tensors = inputs_for(case, dtype)
    grad_TD = torch.randn(case.tokens, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = output_and_gradients(zero_computation, case, experts_TK, tensors, grad_TD)
    wide = tuple(t.detach().double().requires_grad_() for t in tensors)
    expected = output_and_gradients(zero_computation_ref, case, experts_TK, wide, grad_TD.double())
    assert results[0].dtype == dtype
    names = ["output", "gradient of x", "gradient of weights", "gradient of mix", "gradient of constant"]
    for what, got, want in zip(names, results, expected, strict=True):
        assert_close(got, want, what=what)


def run_one(expert: int, x_TD: torch.Tensor, mix_C2D: torch.Tensor, constant_CD: torch.Tensor) -> torch.Tensor:
    """Every token on one expert with weight 1, of 2 FFN, 2 constant, 1 copy and 1 zero experts."""
    experts_TK = torch.full((x_TD.shape[0], 1), expert)
    weights_TK = torch.ones(x_TD.shape[0], 1)
    return zero_computation(x_TD, experts_TK, weights_TK, 2, mix_C2D, constant_CD, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copy_is_the_identity(dtype):
    x_TD = torch.randn(6, D).to(dtype)
    assert torch.equal(run_one(4, x_TD, torch.randn(2, 2, D).to(dtype), torch.randn(2, D).to(dtype)), x_TD)


def test_constant_without_mixing_weights_is_the_mean():
    x_TD, constant_CD = torch.randn(6, D), torch.randn(2, D)
    for i in range(2):
        assert torch.equal(run_one(2 + i, x_TD, torch.zeros(2, 2, D), constant_CD), x_TD / 2 + constant_CD[i] / 2)


@pytest.mark.parametrize(("keep", "expected"), [(1e4, "x"), (-1e4, "v")])
def test_constant_mixes_between_x_and_v(keep, expected):
    """A mixing weight far to one side leaves only x, or only v: the first row of W is the one that belongs to x."""
    x_TD, constant_CD, mix_C2D = torch.ones(3, D), torch.randn(2, D), torch.zeros(2, 2, D)
    mix_C2D[:, 0] = keep
    want = x_TD if expected == "x" else constant_CD[1].expand(3, D)
    assert torch.equal(run_one(3, x_TD, mix_C2D, constant_CD), want)


@pytest.mark.parametrize("expert", [0, 1, 5], ids=["FFN", "FFN", "zero"])
def test_zero_and_ffn_experts_add_nothing_and_pass_no_gradient(expert):
    tensors = [torch.randn(s, requires_grad=True) for s in [(6, D), (2, 2, D), (2, D)]]
    y_TD = run_one(expert, *tensors)
    assert torch.equal(y_TD, torch.zeros(6, D))
    for grad in torch.autograd.grad(y_TD.sum(), tensors):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_a_repeated_call_gives_the_same_bits():
    experts_TK, tensors = inputs_for(CASES[-1])
    grad_TD = torch.ones(CASES[-1].tokens, D)
    first, second = (output_and_gradients(zero_computation, CASES[-1], experts_TK, tensors, grad_TD) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradcheck():
    case = Case(4, 3, 1, 2, 1, 1, "gradcheck")
    experts_TK, tensors = inputs_for(case)
    wide = tuple(t.detach().double().requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(
        lambda x, w, mix, v: zero_computation(x, experts_TK, w, case.ffn, mix, v, case.copy), wide
    )
