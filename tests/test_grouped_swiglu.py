"""The experts' SwiGLU against the definition in float64; with torch.mm per expert and with Triton, interpreted."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from numerics import assert_close

from expertmesh.kernels import (
    grouped_gemm,
    grouped_gemm_triton,
    grouped_gemv_triton,
    grouped_swiglu_triton,
    rows,
    tiles,
)
from expertmesh.kernels import grouped_swiglu as module
from expertmesh.kernels.grouped_swiglu import grouped_swiglu, grouped_swiglu_ref


class Case(NamedTuple):
    counts: list[int]
    d: int
    f: int
    sources: int  # rows read them at random; 0: the source is sorted itself
    reason: str


CASES = [
    Case([0, 0], 8, 4, 5, "no rows at all: the sources are read by nobody"),
    Case([0, 0], 8, 4, 0, "no sources either"),
    Case([0, 1, 0], 6, 5, 1, "one row of one token, its neighbours have none"),
    Case([3, 0, 9, 1], 7, 11, 6, "odd sizes and an expert with none"),
    Case([3, 0, 9, 1], 7, 11, 0, "odd sizes, sorted source"),
    Case([0, 21], 16, 8, 40, "all rows on one expert; some sources are read by nobody"),
    Case([5], 12, 1, 2, "one expert, hidden width 1; sources are read more than once"),
    Case([40, 0, 3], 136, 136, 30, "two blocks of everything"),
]
F32, BF16 = torch.float32, torch.bfloat16
INPUTS = ["source", "gate_up", "down", "weights"]


def inputs_for(case: Case, dtype: torch.dtype, weighted: bool = True):
    """[source, gate_up, down, weights], index, counts, and the gradient of the output."""
    generator = torch.Generator().manual_seed(case.d)
    experts, rows = len(case.counts), sum(case.counts)
    sources = case.sources or rows
    shapes = [(sources, case.d), (experts, 2 * case.f, case.d), (experts, case.d, case.f), (rows, case.d)]
    *inputs, grad_RD = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    if weighted:
        weights = torch.rand(rows, generator=generator) + 0.5
        inputs.append(weights.double() if dtype == torch.float64 else weights)
    index_R = torch.randint(0, sources, (rows,), generator=generator) if case.sources else None
    return [t.requires_grad_() for t in inputs], index_R, torch.tensor(case.counts), grad_RD


def apply(function, inputs, index_R, counts_E):
    source_XD, gate_up_EGD, down_EDF, *weights = inputs
    return function(source_XD, index_R, counts_E, gate_up_EGD, down_EDF, *weights)


def output_and_gradients(function, inputs, index_R, counts_E, grad_RD):
    out_RD = apply(function, inputs, index_R, counts_E)
    return out_RD, *torch.autograd.grad(out_RD, inputs, grad_RD)


def compute(monkeypatch, triton: bool) -> None:
    for used in (module, grouped_gemm, rows):
        monkeypatch.setattr(used, "by_triton", lambda tensor: triton)
    # By the kernels for many rows, though there are few: those for few have a test of their own.
    monkeypatch.setattr(grouped_gemv_triton, "few_rows_cut", lambda *_, **__: None)


@pytest.fixture(params=[False, True], ids=["segments", "triton"])
def steps(request, monkeypatch):
    """The way it is computed; fresh memory is NaN, so that a number nobody wrote shows."""
    compute(monkeypatch, request.param)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(case: Case, dtype: torch.dtype, weighted: bool) -> None:
    inputs, index_R, counts_E, grad_RD = inputs_for(case, dtype, weighted)
    results = output_and_gradients(grouped_swiglu, inputs, index_R, counts_E, grad_RD)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = output_and_gradients(grouped_swiglu_ref, wide, index_R, counts_E, grad_RD.double())
    # Roundings to bfloat16 lie between input and output, and the interpreter truncates where hardware rounds.
    bounds = {"max_error": 4e-2, "rms_error": 2e-2} if dtype == BF16 else {}
    for what, got, want, like in zip(["output", *INPUTS], results, expected, [inputs[0], *inputs], strict=False):
        assert got.dtype == like.dtype
        assert_close(got, want, what=what, **bounds)
    for grad, weights in zip(results[2:4], inputs[1:3], strict=True):
        assert torch.equal(grad[counts_E == 0], torch.zeros_like(weights[counts_E == 0]))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_output_and_gradients(case, dtype, steps):
    if case.d < 100 or dtype == F32:  # a large case in bfloat16 takes the interpreter seconds and shows nothing new
        check(case, dtype, weighted=True)


@pytest.mark.parametrize("case", CASES[3:5], ids=lambda case: case.reason)
def test_without_weights(case, steps):
    check(case, F32, weighted=False)


TILED = [
    ("sm_80", Case([21, 0, 3], 160, 40, 12, "by pointer: two blocks of the model width"), F32),
    ("sm_80", Case([9, 3], 64, 128, 8, "by pointer: whole blocks in sizes, a rest in rows"), F32),
    ("sm_90", Case([40, 0, 3], 64, 136, 0, "by descriptor: sorted source, two blocks of the hidden width"), F32),
    ("sm_90", Case([70, 130], 64, 128, 150, "by descriptor: whole blocks in sizes, two tiles of rows"), BF16),
]


@pytest.mark.parametrize(("chip", "case", "dtype"), TILED, ids=[f"{case.reason}" for _, case, _ in TILED])
def test_tiles(chip, case, dtype, monkeypatch):
    compute(monkeypatch, triton=True)
    for user in (grouped_swiglu_triton, grouped_gemm_triton):
        monkeypatch.setattr(user, "chip_of", lambda tensor: tiles.CHIPS[chip])
    check(case, dtype, weighted=True)


def test_the_gate_comes_first(steps):
    """Hugging Face's layout, by hand: gate 2, up 3, down 5 on an input of 1."""
    one, gate_up, down = torch.ones(1, 1), torch.tensor([[[2.0], [3.0]]]), torch.tensor([[[5.0]]])
    out = grouped_swiglu(one, None, torch.tensor([1]), gate_up, down)
    assert_close(out, 5 * 3 * 2 * torch.sigmoid(torch.tensor([[2.0]])))


def test_a_repeated_call_gives_the_same_bits(steps):
    inputs, *rest = inputs_for(Case([19, 0, 30], 33, 37, 20, "repeat"), torch.float32)
    first, second = (output_and_gradients(grouped_swiglu, inputs, *rest) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_an_infinity_stays_in_its_group(steps):
    inputs, index_R, counts_E, grad_RD = inputs_for(Case([5, 6], 8, 8, 0, "infinity"), torch.float32)
    inputs[0].data[5:] = float("inf")
    out, grad_source, grad_gate_up, grad_down, grad_weights = output_and_gradients(
        grouped_swiglu, inputs, index_R, counts_E, grad_RD
    )
    for finite in (out[:5], grad_source[:5], grad_gate_up[0], grad_down[0], grad_weights[:5]):
        assert torch.isfinite(finite).all()


@pytest.mark.parametrize("trained", range(4), ids=INPUTS)
def test_only_what_is_trained_gets_a_gradient(trained, steps):
    inputs, index_R, counts_E, grad_RD = inputs_for(Case([4, 0, 3], 5, 6, 4, "frozen"), torch.float32)
    expected = output_and_gradients(grouped_swiglu, inputs, index_R, counts_E, grad_RD)[1 + trained]
    inputs = [t.detach().requires_grad_(i == trained) for i, t in enumerate(inputs)]
    apply(grouped_swiglu, inputs, index_R, counts_E).backward(grad_RD)
    assert [t.grad is not None for t in inputs] == [i == trained for i in range(4)]
    assert torch.equal(inputs[trained].grad, expected)


def test_gradcheck():
    inputs, index_R, counts_E, _ = inputs_for(Case([2, 0, 3], 3, 2, 4, "gradcheck"), torch.float64)
    assert torch.autograd.gradcheck(lambda *inputs: apply(grouped_swiglu, inputs, index_R, counts_E), inputs)


def kept_by(call) -> list[tuple[int, ...]]:
    """Shapes of the two-dimensional tensors that autograd keeps."""
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    return sorted(tuple(t.shape) for t in kept if t.dim() == 2)


def test_keeps_source_and_h_only(steps):
    inputs, index_R, counts_E, _ = inputs_for(Case([4, 8], 10, 6, 7, "memory"), torch.float32)
    assert kept_by(lambda: apply(grouped_swiglu, inputs, index_R, counts_E)) == [(7, 10), (12, 12)]
    with torch.no_grad():
        assert kept_by(lambda: apply(grouped_swiglu, inputs, index_R, counts_E)) == []


def test_says_what_is_wrong():
    counts_E = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="do not fit"):
        grouped_swiglu(torch.zeros(3, 4), None, counts_E, torch.zeros(2, 10, 4), torch.zeros(2, 4, 6))
