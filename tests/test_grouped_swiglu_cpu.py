"""What only the CPU's way has: buffers used again by the next expert, and a gate weight that is divided by."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close

from expertmesh.kernels.grouped_swiglu import grouped_swiglu, grouped_swiglu_ref

SPECIAL = [
    (0.0, "its gradient does not pass through the answer, which is 0"),
    (-0.0, "negative zero"),
    (1e-35, "too small to divide by, and not 0"),
    (1e-25, "small, and divided by"),
    (-2.0, "a weight may be negative"),
]
NAMES = ["source", "gate_up", "down", "weights"]


def output_and_gradients(function, inputs, index_R, counts_E, grad_RD):
    source, gate_up, down, weights = inputs = [t.clone().requires_grad_() for t in inputs]
    out = function(source, index_R, counts_E, gate_up, down, weights)
    return out, *torch.autograd.grad(out, inputs, grad_RD)


def problem(counts: list[int], d: int = 6, f: int = 5, sources: int = 4):
    generator = torch.Generator().manual_seed(1)
    rows, experts = sum(counts), len(counts)
    shapes = (sources, d), (experts, 2 * f, d), (experts, d, f), (rows,), (rows, d)
    *inputs, grad_RD = (torch.randn(shape, generator=generator) for shape in shapes)
    return inputs, torch.randint(0, sources, (rows,), generator=generator), torch.tensor(counts), grad_RD


@pytest.mark.parametrize(("weight", "why"), SPECIAL, ids=[str(weight) for weight, _ in SPECIAL])
def test_weights_that_are_hard_to_divide_by(weight, why):
    inputs, index_R, counts_E, grad_RD = problem([3, 0, 4])
    inputs[3][1] = inputs[3][6] = weight
    got = output_and_gradients(grouped_swiglu, inputs, index_R, counts_E, grad_RD)
    wide = [t.double() for t in inputs]
    want = output_and_gradients(grouped_swiglu_ref, wide, index_R, counts_E, grad_RD.double())
    for what, ours, theirs in zip(["output", *NAMES], got, want, strict=True):
        assert_close(ours, theirs, what=what)


def test_all_weights_zero():
    inputs, index_R, counts_E, grad_RD = problem([3, 4])
    inputs[3].zero_()
    out, *gradients, of_weights = output_and_gradients(grouped_swiglu, inputs, index_R, counts_E, grad_RD)
    assert all(torch.equal(t, torch.zeros_like(t)) for t in (out, *gradients))
    assert of_weights.abs().min() > 0


@pytest.mark.parametrize("counts", [[9, 1, 5], [1, 9, 5], [0, 5, 0, 9, 1]], ids=str)
def test_an_expert_sees_nothing_of_the_one_before(counts):
    """The last expert's gradients are those that it gets alone, to the bit: no row of a longer one is left."""
    inputs, index_R, counts_E, grad_RD = problem(counts)
    source, gate_up, down, weights = inputs
    rows = slice(sum(counts[:-1]), None)
    together = output_and_gradients(grouped_swiglu, inputs, index_R, counts_E, grad_RD)
    alone = output_and_gradients(
        grouped_swiglu, [source, gate_up[-1:], down[-1:], weights[rows]], index_R[rows], counts_E[-1:], grad_RD[rows]
    )
    assert torch.equal(together[0][rows], alone[0])
    assert torch.equal(together[2][-1], alone[2][0]) and torch.equal(together[3][-1], alone[3][0])
    assert torch.equal(together[4][rows], alone[4])


def test_without_gradients_h_is_one_experts_share():
    inputs, index_R, counts_E, _ = problem([3, 4])
    source, gate_up, down, weights = (t.requires_grad_() for t in inputs)
    with torch.no_grad():
        quiet = grouped_swiglu(source, index_R, counts_E, gate_up, down, weights)
    assert torch.equal(quiet, grouped_swiglu(source, index_R, counts_E, gate_up, down, weights).detach())
    assert not quiet.requires_grad
