"""The experts' products of few rows, interpreted, against the definition in float64; and how they are cut."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from numerics import assert_close
from torch.nn import functional

from expertmesh.kernels import grouped_gemm, grouped_swiglu, rows
from expertmesh.kernels import grouped_gemv_triton as kernels
from expertmesh.kernels.grouped_gemm import grouped_gemm_ref
from expertmesh.kernels.tiles import CHIPS, FEW_ROWS, GFX942, SM_90, Cut, Tile, few_rows_cut

F32, BF16 = torch.float32, torch.bfloat16


class Case(NamedTuple):
    counts: list[int]
    n: int
    k: int
    parts: int
    reason: str


CASES = [
    Case([1], 1, 1, 1, "one row, one expert, one number"),
    Case([0, 0, 1, 0], 5, 3, 1, "one row, its neighbours have none"),
    Case([0, 3, 0, 1], 13, 33, 1, "odd sizes; fewer active experts than rows"),
    Case([1] * 9, 40, 32, 1, "a row each; a last block of columns"),
    Case([0, 32, 0], 32, 64, 1, "as many rows as there may be, all on one expert"),
    Case([5, 0, 12], 64, 96, 3, "each part is one step"),
    Case([5, 0, 12], 33, 70, 2, "the last part is shorter, and ends inside a step"),
    Case([2, 1], 16, 40, 4, "more parts than steps: two hold nothing"),
]


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory is NaN, so that a number nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def cut_small(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """Tiles that small inputs have several of."""
    tile = Tile(16 if sum(case.counts) <= 16 else 32, 32, 32, 4, 3)
    monkeypatch.setattr(kernels, "few_rows_cut", lambda *_, **__: Cut(tile, case.parts))


def drawn(case: Case, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + case.n)).to(dtype)


def bounds(dtype: torch.dtype) -> dict[str, float]:
    """Triton's interpreter truncates to bfloat16 where hardware rounds: an error of up to 2^-7."""
    return {"rms_error": 1e-2} if dtype == BF16 else {}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_multiply(case, dtype, monkeypatch):
    cut_small(monkeypatch, case)
    rows_RK, weights_ENK = (
        drawn(case, dtype, sum(case.counts), case.k),
        drawn(case, dtype, len(case.counts), case.n, case.k),
    )
    counts_E = torch.tensor(case.counts)
    got = kernels.multiply(rows_RK, weights_ENK, counts_E)
    assert got.dtype == dtype
    assert_close(got, grouped_gemm_ref(rows_RK.double(), weights_ENK.double(), counts_E), **bounds(dtype))
    assert torch.equal(got, kernels.multiply(rows_RK, weights_ENK, counts_E))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("saved", [False, True], ids=["", "h saved"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_up(case, weighted, saved, dtype, monkeypatch):
    if dtype == BF16 and not (weighted and saved):
        return  # other operands show nothing new about what is left out
    cut_small(monkeypatch, case)
    counts_E, R = torch.tensor(case.counts), sum(case.counts)
    source_XD, gate_up_EGD = drawn(case, dtype, 5, case.k), drawn(case, dtype, len(counts_E), 2 * case.n, case.k)
    index_R = torch.arange(R) * 3 % 5  # read by several rows, and not in order
    weights_R = drawn(case, F32, R) if weighted else None
    h_RG, a_RF = kernels.up(source_XD, index_R, counts_E, gate_up_EGD, weights_R, saved)
    want_RG = grouped_gemm_ref(source_XD.double()[index_R], gate_up_EGD.double(), counts_E)
    gate_RF, up_RF = want_RG.chunk(2, -1)
    want_RF = functional.silu(gate_RF) * up_RF * (weights_R.double()[:, None] if weighted else 1)
    assert a_RF.dtype == dtype and (h_RG is not None) == saved
    assert_close(a_RF, want_RF, **bounds(dtype))
    if saved:
        assert_close(h_RG, want_RG, **bounds(dtype))


def test_up_of_a_sorted_source(monkeypatch):
    case = CASES[2]
    cut_small(monkeypatch, case)
    source_RD, gate_up_EGD = drawn(case, F32, 4, case.k), drawn(case, F32, 4, 2 * case.n, case.k)
    arguments = torch.tensor(case.counts), gate_up_EGD, None, True
    got, want = (kernels.up(source_RD, index, *arguments) for index in (None, torch.arange(4)))
    assert torch.equal(got.a_RF, want.a_RF) and torch.equal(got.h_RG, want.h_RG)


def test_weights_of_any_strides():
    """A gap between experts and between rows; and transposed, as training asks for, by the grouped GEMM's kernel."""
    rows_RK, counts_E = torch.randn(5, 8), torch.tensor([2, 0, 3])
    wide = torch.randn(4, 9, 24)
    for weights_ENK in (wide[:3, 1:7, 8:16], wide[:3, :8, 2:9].transpose(1, 2)):
        assert_close(kernels.multiply(rows_RK, weights_ENK, counts_E), grouped_gemm_ref(rows_RK, weights_ENK, counts_E))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_an_infinity_stays_in_its_group():
    rows_RK, weights_ENK = torch.randn(11, 8), torch.randn(2, 8, 8)
    rows_RK[5:] = float("inf")
    assert torch.isfinite(kernels.multiply(rows_RK, weights_ENK, torch.tensor([5, 6]))[:5]).all()


def test_the_whole_swiglu_of_few_rows_and_its_gradients(monkeypatch):
    """Saved for the backward by these kernels, read by the grouped GEMM's."""
    for used in (grouped_gemm, grouped_swiglu, rows):
        monkeypatch.setattr(used, "by_triton", lambda tensor: True)
    shapes = (5, 8), (3, 12, 8), (3, 8, 6), (7,)
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) for shape in shapes]
    index_R, counts_E, results = torch.tensor([4, 2, 0, 0, 1, 3, 4]), torch.tensor([4, 0, 3]), []
    for function, dtype in ((grouped_swiglu.grouped_swiglu, F32), (grouped_swiglu.grouped_swiglu_ref, torch.float64)):
        source, gate_up, down, weights = made = [t.to(dtype).requires_grad_() for t in inputs]
        out_RD = function(source, index_R, counts_E, gate_up, down, weights)
        results.append((out_RD, *torch.autograd.grad(out_RD.square().sum(), made)))
    for got, want in zip(*results, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("R", [0, FEW_ROWS + 1], ids=["no rows", "a row too many"])
def test_other_numbers_of_rows_are_the_grouped_gemms(R, monkeypatch):
    called = []
    monkeypatch.setattr(kernels.grouped_gemm_triton, "multiply", lambda *_: called.append("multiply"))
    monkeypatch.setattr(kernels.grouped_swiglu_triton, "up", lambda *_: called.append("up"))
    kernels.multiply(torch.zeros(R, 4), torch.zeros(1, 3, 4), torch.tensor([R]))
    kernels.up(torch.zeros(R, 4), None, torch.tensor([R]), torch.zeros(1, 6, 4), None, False)
    assert called == ["multiply", "up"]


class Decoded(NamedTuple):
    R: int
    experts: int
    columns: int
    inner: int
    accumulators: int
    width: int
    parts: int
    reason: str


# On an H100, where 264 programs are wanted.
DECODED = [
    Decoded(8, 256, 7168, 2048, 1, 128, 1, "DeepSeek-V3, one token, down: 448 programs of full width"),
    Decoded(8, 256, 2048, 7168, 2, 32, 1, "its up projection: narrower, 512"),
    Decoded(8, 128, 768, 2048, 2, 32, 2, "Qwen3-30B up: 192 are not enough at 32 columns either: two parts"),
    Decoded(1, 8, 2048, 8192, 1, 32, 5, "one expert alone: 64 programs, by five"),
    Decoded(1, 8, 64, 256, 1, 32, 1, "too little to divide"),
    Decoded(32, 8, 14336, 4096, 2, 64, 1, "Mixtral, 16 tokens"),
]


@pytest.mark.parametrize("decoded", DECODED, ids=lambda decoded: decoded.reason)
def test_there_are_programs_enough(decoded):
    R, experts, columns, inner, accumulators, width, parts, _ = decoded
    cut = few_rows_cut(R, experts, columns, inner, 2, SM_90, accumulators)
    assert (cut.tile.columns, cut.parts) == (width, parts)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("R", [1, 16, 17, FEW_ROWS])
def test_a_tile_holds_all_rows_and_two_programs_share_a_multiprocessor(R, itemsize, chip):
    for accumulators in (1, 2):
        for columns in (32, 4096, 1 << 16):
            tile = few_rows_cut(R, 8, columns, 4096, itemsize, chip, accumulators).tile
            assert tile.rows >= R
            step = (tile.rows + accumulators * tile.columns) * tile.depth * itemsize
            buffers = tile.stages - 1 if chip == GFX942 else tile.stages
            assert 2 * buffers * step <= chip.shared_bytes
