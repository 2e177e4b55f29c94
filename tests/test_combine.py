"""Rows to tokens, both ways (embedding_bag, Triton in its interpreter), against the definition in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from numerics import assert_close

from expertmesh.kernels.combine import combine_rows, combine_rows_ref
from expertmesh.kernels.combine_triton import combine_triton
from expertmesh.kernels.routing import sort_slots
from expertmesh.kernels.zero_computation import ZeroComputation

WAYS = pytest.mark.parametrize("combine", [combine_rows, combine_triton], ids=["bags", "triton"])
CONSTANTS, COPIES = 2, 1


class Case(NamedTuple):
    tokens: int
    top_k: int
    d: int
    experts: int  # FFN, then 2 constant and 1 copy expert, the rest are zero experts
    ffn_experts: int
    reason: str


CASES = [
    Case(0, 2, 5, 4, 4, "no tokens"),
    Case(1, 2, 5, 4, 4, "one token"),
    Case(9, 1, 4, 8, 3, "k is 1"),
    Case(6, 3, 8, 4, 0, "all slots zero-computation: no rows"),
    Case(8, 2, 16, 2, 2, "every token on every expert"),
    Case(17, 4, 13, 12, 8, "odd sizes, some tokens short of rows"),
    Case(9, 2, 600, 16, 2, "most tokens without a row; several warps wide"),
    Case(11, 5, 7, 6, 1, "several of each kind in one token"),
]
INPUTS = ["rows", "weights", "x", "mix", "constant"]


def inputs_for(case: Case, dtype: torch.dtype):
    """[rows, weights, x, mix, constant], slots, and each token's experts, which are distinct."""
    generator = torch.Generator().manual_seed(case.tokens + case.d)
    experts_TK = torch.rand(case.tokens, case.experts, generator=generator).argsort(dim=1)[:, : case.top_k]
    slots_R = sort_slots(experts_TK, case.ffn_experts).slots_R
    rows_RD = torch.randn(len(slots_R), case.d, generator=generator).to(dtype)
    weights_TK = torch.rand(case.tokens, case.top_k, generator=generator)
    shapes = [(case.tokens, case.d), (CONSTANTS, 2, case.d), (CONSTANTS, case.d)]
    x_TD, mix_C2D, constant_CD = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    mix_C2D /= case.d**0.5
    return [t.requires_grad_() for t in (rows_RD, weights_TK, x_TD, mix_C2D, constant_CD)], slots_R, experts_TK


def apply(function, case, inputs, slots_R, experts_TK, weigh, with_zero):
    rows_RD, weights_TK, x_TD, mix_C2D, constant_CD = inputs
    zero = ZeroComputation(x_TD, experts_TK, case.ffn_experts, mix_C2D, constant_CD, COPIES) if with_zero else None
    return function(rows_RD, slots_R, weights_TK, weigh, zero)


def output_and_gradients(function, case, inputs, *rest):
    y_TD = apply(function, case, inputs, *rest)
    # Of bfloat16 numbers, so that all dtypes get the same.
    grad_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(3)).bfloat16().to(y_TD.dtype)
    if not y_TD.requires_grad:
        return y_TD, *(torch.zeros_like(t) for t in inputs)
    return y_TD, *torch.autograd.grad(y_TD, inputs, grad_TD, allow_unused=True, materialize_grads=True)


@pytest.fixture
def poisoned():
    """Fresh memory is NaN instead of what happened to be there, so that a number nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("dtype", "weigh", "with_zero"),
    [
        (torch.float32, True, False),
        (torch.float32, False, False),
        (torch.float32, True, True),
        (torch.float32, False, True),
        (torch.bfloat16, True, True),
    ],
    ids=["rows", "rows weighted before", "and zero-computation", "both", "in bfloat16"],
)
@WAYS
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_output_and_gradients(case, combine, dtype, weigh, with_zero, poisoned):
    inputs, slots_R, experts_TK = inputs_for(case, dtype)
    rest = (slots_R, experts_TK, weigh, with_zero)
    results = output_and_gradients(combine, case, inputs, *rest)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = output_and_gradients(combine_rows_ref, case, wide, *rest)
    for what, got, want, like in zip(["output", *INPUTS], results, expected, [inputs[0], *inputs], strict=True):
        assert got.dtype == like.dtype
        assert_close(got, want, what=what)
    if not with_zero:
        without_row = torch.ones(inputs[1].numel(), dtype=torch.bool).index_fill_(0, slots_R, False)
        assert (results[2].flatten()[without_row] == 0).all()
    again = output_and_gradients(combine, case, inputs, *rest)
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


@WAYS
def test_the_order_of_rows_does_not_matter(combine):
    """A dispatcher may return rows in another order than it was given; the slots say whose they are, to the bit."""
    (rows_RD, weights_TK, *_), slots_R, _ = inputs_for(CASES[5], torch.float32)
    shuffled = torch.randperm(len(slots_R), generator=torch.Generator().manual_seed(0))
    same = combine(rows_RD[shuffled], slots_R[shuffled], weights_TK)
    assert torch.equal(same, combine(rows_RD, slots_R, weights_TK))


@WAYS
def test_bfloat16_rows_are_summed_in_float32(combine):
    """1 + 1/256 + 1/256 is a bfloat16 number, but adding one 1/256 at a time rounds back to 1 each time."""
    rows_RD = torch.tensor([[1.0], [1 / 256], [1 / 256]], dtype=torch.bfloat16)
    assert combine(rows_RD, torch.arange(3), torch.ones(1, 3)).item() == 1 + 1 / 128


@WAYS
def test_gate_weights_are_not_rounded_to_the_rows_dtype(combine):
    weights_TK = torch.tensor([[1.001953125, -1.0]])
    rows_RD = torch.ones(2, 4, dtype=torch.bfloat16)
    assert torch.equal(combine(rows_RD, torch.arange(2), weights_TK), torch.full((1, 4), 2.0**-9).bfloat16())


@WAYS
def test_a_dropped_slot_adds_nothing(combine):
    """The id one past the last expert: no row, no answer, no gradient."""
    case = Case(1, 2, 4, 6, 2, "dropped")
    inputs, _, _ = inputs_for(case, torch.float32)
    inputs[0] = inputs[0][:0].detach().requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    results = output_and_gradients(combine, case, inputs, none, torch.tensor([[6, 6]]), True, True)
    assert all(torch.equal(t, torch.zeros_like(t)) for t in results)


@pytest.mark.parametrize(("constants", "copies"), [(2, 0), (0, 1), (0, 0)], ids=str)
def test_a_layer_may_lack_some_kinds_of_zero_computation_experts(constants, copies):
    (rows_RD, weights_TK, x_TD, mix_C2D, constant_CD), slots_R, experts_TK = inputs_for(CASES[5], torch.float32)
    zero = ZeroComputation(x_TD, experts_TK, 8, mix_C2D[:constants], constant_CD[:constants], copies)
    got = combine_rows(rows_RD, slots_R, weights_TK, True, zero)
    assert_close(got, combine_rows_ref(rows_RD, slots_R, weights_TK, True, zero))


def test_gradcheck():
    slots_R = torch.tensor([3, 0, 5])
    rows_RD = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weights_TK = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, w: combine_rows(r, slots_R, w), (rows_RD, weights_TK))
