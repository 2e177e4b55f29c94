"""The experts' SwiGLU against the definition in float64; with torch.mm per expert and with Triton, interpreted."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from numerics import assert_close

from expertmesh.kernels import grouped_swiglu as module
from expertmesh.kernels.grouped_gemm import SEGMENTS, TRITON
from expertmesh.kernels.grouped_swiglu import grouped_swiglu, grouped_swiglu_ref


class Case(NamedTuple):
    counts: list[int]
    d: int
    f: int
    reason: str


CASES = [
    Case([0, 0], 8, 4, "no rows at all"),
    Case([0, 1, 0], 6, 5, "one row, its neighbours have none"),
    Case([3, 0, 9, 1], 7, 11, "odd sizes and an expert with none"),
    Case([0, 21], 16, 8, "all rows on one expert"),
    Case([5], 12, 1, "one expert, hidden width 1"),
]
NAMES = ["output", "gradient of rows", "gradient of gate_up", "gradient of down"]


def inputs_for(case: Case, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """[rows, gate_up, down], counts, and the gradient of the output."""
    generator = torch.Generator().manual_seed(case.d)
    experts, rows = len(case.counts), sum(case.counts)
    shapes = [(rows, case.d), (experts, 2 * case.f, case.d), (experts, case.d, case.f), (rows, case.d)]
    *inputs, grad_RD = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [t.requires_grad_() for t in inputs], torch.tensor(case.counts), grad_RD


def output_and_gradients(function, inputs, counts_E, grad_RD):
    rows_RD, gate_up_EGD, down_EDF = inputs
    out_RD = function(rows_RD, counts_E, gate_up_EGD, down_EDF)
    return out_RD, *torch.autograd.grad(out_RD, inputs, grad_RD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("products", [SEGMENTS, TRITON], ids=["segments", "triton"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_output_and_gradients(case, products, dtype, monkeypatch):
    monkeypatch.setattr(module, "products_for", lambda rows: products)
    inputs, counts_E, grad_RD = inputs_for(case, dtype)
    results = output_and_gradients(grouped_swiglu, inputs, counts_E, grad_RD)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = output_and_gradients(grouped_swiglu_ref, wide, counts_E, grad_RD.double())
    # Three roundings to bfloat16 lie between input and output, and the interpreter truncates where hardware rounds.
    bounds = {"max_error": 4e-2, "rms_error": 1e-2} if dtype == torch.bfloat16 else {}
    for what, got, want in zip(NAMES, results, expected, strict=True):
        assert got.dtype == dtype
        assert_close(got, want, what=what, **bounds)
    for grad, weights in zip(results[2:], inputs[1:], strict=True):
        assert torch.equal(grad[counts_E == 0], torch.zeros_like(weights[counts_E == 0]))


def test_the_gate_comes_first():
    """Hugging Face's layout, by hand: gate 2, up 3, down 5 on an input of 1."""
    out = grouped_swiglu(torch.ones(1, 1), torch.tensor([1]), torch.tensor([[[2.0], [3.0]]]), torch.tensor([[[5.0]]]))
    assert_close(out, 5 * 3 * 2 * torch.sigmoid(torch.tensor([[2.0]])))


def test_gradcheck():
    inputs, counts_E, _ = inputs_for(Case([2, 0, 3], 3, 2, "gradcheck"), torch.float64)
    assert torch.autograd.gradcheck(lambda r, g, d: grouped_swiglu(r, counts_E, g, d), inputs)


def test_a_repeated_call_gives_the_same_bits():
    inputs, counts_E, grad_RD = inputs_for(Case([19, 0, 30], 33, 37, "repeat"), torch.float32)
    first, second = (output_and_gradients(grouped_swiglu, inputs, counts_E, grad_RD) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_keeps_rows_and_h_only():
    inputs, counts_E, _ = inputs_for(Case([4, 8], 10, 6, "memory"), torch.float32)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grouped_swiglu(inputs[0], counts_E, *inputs[1:])
    kept_rows = sorted(tuple(t.shape) for t in kept if t.dim() == 2)
    assert kept_rows == [(12, 10), (12, 12)]


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_only_what_is_trained_gets_a_gradient(trained):
    inputs, counts_E, grad_RD = inputs_for(Case([4, 0, 3], 5, 6, "frozen"), torch.float32)
    expected = output_and_gradients(grouped_swiglu, inputs, counts_E, grad_RD)[1 + trained]
    inputs = [t.detach().requires_grad_(i == trained) for i, t in enumerate(inputs)]
    grouped_swiglu(inputs[0], counts_E, *inputs[1:]).backward(grad_RD)
    assert [t.grad is not None for t in inputs] == [i == trained for i in range(3)]
    assert torch.equal(inputs[trained].grad, expected)


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="do not fit"):
        grouped_swiglu(torch.zeros(3, 4), torch.tensor([1, 2]), torch.zeros(2, 10, 4), torch.zeros(2, 4, 6))
