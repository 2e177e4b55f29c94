"""The grouped GEMM, both ways (torch.mm per expert, Triton in its interpreter), against the definition in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from numerics import assert_close

from expertmesh.kernels import grouped_gemm as module
from expertmesh.kernels import grouped_gemm_triton as kernels
from expertmesh.kernels.grouped_gemm import SEGMENTS, Products, grouped_gemm, grouped_gemm_ref, grouped_gemm_triton
from expertmesh.kernels.tiles import SM_80, SM_90


class Case(NamedTuple):
    counts: list[int]
    n: int
    k: int
    reason: str


CASES = [
    Case([0, 0, 0], 8, 8, "no rows at all"),
    Case([1], 1, 1, "one row, one expert, one number"),
    Case([0, 1, 0], 5, 3, "one row, its neighbours have none"),
    Case([3, 0, 17, 1], 13, 7, "odd sizes and an expert with none"),
    Case([0, 40, 0, 0], 16, 24, "all rows on one expert: several tiles of one group"),
    Case([16, 32, 16], 32, 32, "groups that end exactly at a tile"),
    Case([5, 6], 131, 9, "wider than one tile"),
    Case([5, 6], 9, 133, "longer than one step of the inner loop"),
    Case([70, 3], 130, 66, "more than one of everything"),
    Case([40, 0, 3], 136, 40, "aligned, but no multiple of a tile: the edges are hardware's"),
    Case([200, 9], 256, 64, "multiples of the tiles in sizes, two tiles of rows in a group"),
]
IMPLEMENTATIONS = [grouped_gemm, grouped_gemm_triton]


def grouped_gemm_by_tiles(rows_RK: torch.Tensor, weights_ENK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """By the kernels for many rows, though there are few: `grouped_gemm_triton` would take grouped_gemv_triton's."""
    return module._apply(rows_RK, weights_ENK, counts_E, Products(kernels.multiply, kernels.outer))


DTYPES = [torch.float32, torch.bfloat16]


def inputs_for(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, weights, counts and the gradient of the output."""
    generator = torch.Generator().manual_seed(sum(case.counts) + case.n)
    experts, rows = len(case.counts), sum(case.counts)
    shapes = [(rows, case.k), (experts, case.n, case.k), (rows, case.n)]
    rows_RK, weights_ENK, grad_RN = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return rows_RK.requires_grad_(), weights_ENK.requires_grad_(), torch.tensor(case.counts), grad_RN


def output_and_gradients(function, rows_RK, weights_ENK, counts_E, grad_RN):
    out_RN = function(rows_RK, weights_ENK, counts_E)
    return out_RN, *torch.autograd.grad(out_RN, (rows_RK, weights_ENK), grad_RN)


@pytest.fixture
def poisoned():
    """Fresh memory is NaN instead of what happened to be there, so that a number nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4).isnan().all() and torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [grouped_gemm, grouped_gemm_by_tiles], ids=lambda function: function.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_output_and_gradients(case, function, dtype, poisoned):
    rows_RK, weights_ENK, counts_E, grad_RN = inputs_for(case, dtype)
    results = output_and_gradients(function, rows_RK, weights_ENK, counts_E, grad_RN)
    wide = (rows_RK.detach().double().requires_grad_(), weights_ENK.detach().double().requires_grad_())
    expected = output_and_gradients(grouped_gemm_ref, *wide, counts_E, grad_RN.double())
    # Triton's interpreter truncates to bfloat16 where hardware rounds: an error of up to 2^-7.
    truncated = {"rms_error": 1e-2} if dtype == torch.bfloat16 and function is grouped_gemm_by_tiles else {}
    for what, got, want in zip(["output", "gradient of rows", "gradient of weights"], results, expected, strict=True):
        assert got.dtype == dtype
        assert_close(got, want, what=what, **truncated)
    assert torch.equal(results[2][counts_E == 0], torch.zeros_like(weights_ENK[counts_E == 0]))


@pytest.mark.parametrize("chip", [SM_80, SM_90], ids=lambda chip: chip.name)
@pytest.mark.parametrize("case", CASES[-2:], ids=lambda case: case.reason)
def test_by_pointer_and_by_descriptor_are_one_function(case, chip, monkeypatch):
    """Tiles differ, and with them the order of sums; each chip's is near the definition, output and gradients."""
    monkeypatch.setattr(kernels, "chip_of", lambda tensor: chip)
    inputs = inputs_for(case, torch.float32)
    rows_RK, weights_ENK, counts_E, grad_RN = (t.detach() for t in inputs)
    expected = output_and_gradients(
        grouped_gemm_ref,
        *(rows_RK.double().requires_grad_(), weights_ENK.double().requires_grad_()),
        *(counts_E, grad_RN.double()),
    )
    for got, want in zip(output_and_gradients(grouped_gemm_triton, *inputs), expected, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("function", IMPLEMENTATIONS, ids=lambda function: function.__name__)
def test_a_repeated_call_gives_the_same_bits(function):
    inputs = inputs_for(Case([19, 0, 30], 33, 37, "repeat"), torch.float32)
    first, second = (output_and_gradients(function, *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("function", IMPLEMENTATIONS, ids=lambda function: function.__name__)
def test_an_infinity_stays_in_its_group(function):
    rows_RK, weights_ENK, counts_E, grad_RN = inputs_for(Case([5, 6], 8, 8, "infinity"), torch.float32)
    rows_RK.data[5:] = float("inf")
    out, grad_rows, grad_weights = output_and_gradients(function, rows_RK, weights_ENK, counts_E, grad_RN)
    assert torch.isfinite(out[:5]).all() and torch.isfinite(grad_rows).all() and torch.isfinite(grad_weights[0]).all()


@pytest.mark.parametrize("function", IMPLEMENTATIONS, ids=lambda function: function.__name__)
def test_any_strides(function):
    """Transposed weights, rows out of a wider tensor, and the expanded gradient that `sum` sends back."""
    rows_RK = torch.randn(9, 20)[:, ::2].requires_grad_()
    weights_ENK = torch.randn(2, 10, 6).transpose(1, 2).requires_grad_()
    counts_E = torch.tensor([4, 5])
    got = torch.autograd.grad(function(rows_RK, weights_ENK, counts_E).sum(), (rows_RK, weights_ENK))
    want = torch.autograd.grad(grouped_gemm_ref(rows_RK, weights_ENK, counts_E).sum(), (rows_RK, weights_ENK))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


def test_bfloat16_accumulates_in_float32():
    """4096 ones: a bfloat16 sum would stop growing at 256."""
    rows_RK, weights_ENK = torch.ones(1, 4096, dtype=torch.bfloat16), torch.ones(1, 1, 4096, dtype=torch.bfloat16)
    for function in IMPLEMENTATIONS:
        assert function(rows_RK, weights_ENK, torch.tensor([1])).item() == 4096


@pytest.mark.parametrize(("trained", "calls"), [(0, ["multiply", "multiply"]), (1, ["multiply", "outer"])])
def test_only_what_is_trained_is_computed(trained, calls, monkeypatch):
    """Autograd drops a gradient that nobody asked for, but the product it cost is the price of a forward."""
    made: list[str] = []

    def recorded(name):
        product = getattr(SEGMENTS, name)
        return lambda *arguments: made.append(name) or product(*arguments)

    monkeypatch.setattr(module, "SEGMENTS", Products(recorded("multiply"), recorded("outer")))
    inputs = [torch.randn(5, 4), torch.randn(2, 3, 4)]
    inputs[trained].requires_grad_()
    grouped_gemm(*inputs, torch.tensor([2, 3])).sum().backward()
    assert made == calls and inputs[trained].grad is not None


def test_gradcheck():
    rows_RK = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weights_ENK = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, w: grouped_gemm(r, w, torch.tensor([3, 0, 4])), (rows_RK, weights_ENK))


@pytest.mark.parametrize(
    ("rows", "weights", "counts", "says"),
    [
        (torch.zeros(5, 4), torch.zeros(2, 3, 4), [2, 2], "add up to 4"),
        (torch.zeros(5, 4), torch.zeros(2, 3, 5), [2, 3], "do not fit"),
        (torch.zeros(5, 4), torch.zeros(2, 3, 4), [2, 2, 1], "do not fit"),
        (torch.zeros(5, 4), torch.zeros(2, 3, 4).bfloat16(), [2, 3], "cast"),
    ],
)
def test_says_what_is_wrong(rows, weights, counts, says):
    with pytest.raises(ValueError, match=says):
        grouped_gemm(rows, weights, torch.tensor(counts))
