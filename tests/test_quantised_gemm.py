"""The product of quantised rows and weights, on the CPU and by the Triton kernel, against the definition in float64.

Quantising is judged elsewhere: here rows and weights are what their bytes and scales say, so results agree closely.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from numerics import assert_close

from expertmesh.kernels import quantised_gemm_triton as kernels
from expertmesh.kernels.quantise import FP8, QuantisedBlocks, QuantisedRows, quantise_blocks, quantise_rows
from expertmesh.kernels.quantised_gemm import quantised_gemm, quantised_gemm_ref, rows_for
from expertmesh.kernels.quantised_weights import quantise_weights
from expertmesh.kernels.scheme import Scheme
from expertmesh.kernels.tiles import GFX942, SM_80, SM_90


class Case(NamedTuple):
    counts: list[int]
    n: int
    k: int
    parts: int
    gathered: bool
    reason: str


CASES = [
    Case([0, 0, 0], 8, 8, 1, False, "no rows at all"),
    Case([1], 1, 1, 1, False, "one row, one expert, one number"),
    Case([0, 1, 0], 5, 3, 1, True, "one row, its neighbours have none"),
    Case([3, 0, 17, 1], 14, 7, 2, True, "odd sizes, an expert with none, two narrow parts"),
    Case([0, 40, 0, 0], 16, 24, 1, False, "all rows on one expert: several tiles of one group"),
    Case([16, 32, 16], 32, 32, 1, True, "groups that end exactly at a tile"),
    Case([5, 6], 131, 9, 1, True, "wider than one tile"),
    Case([2, 3], 270, 133, 2, False, "two parts, each wider than a tile; longer than one step"),
    Case([5, 6], 16, 200, 1, True, "a last step that ends in its second half"),
    Case([20, 0, 3], 160, 176, 2, True, "aligned, but no multiple of a tile: the edges are hardware's"),
    Case([130, 2], 256, 128, 2, True, "multiples of the tiles in sizes, two tiles of rows in a group"),
]
IMPLEMENTATIONS = [quantised_gemm, kernels.multiply]
NAMES = {quantised_gemm: "cpu", kernels.multiply: "triton"}


def inputs_for(case: Case, scheme: Scheme):
    generator = torch.Generator().manual_seed(sum(case.counts) + case.n)
    R = sum(case.counts)
    x_XK = torch.randn(R // 2 + 3 if case.gathered else R, case.k, generator=generator)
    index_R = torch.randint(len(x_XK), (R,), generator=generator) if case.gathered else None
    w_ENK = torch.randn(len(case.counts), case.n, case.k, generator=generator) * 0.05
    w_ENK[:, case.n // 2 :] *= 30  # so that a scale of the wrong row shows
    return rows_for(scheme)(x_XK), index_R, torch.tensor(case.counts), quantise_weights(w_ENK, scheme, case.parts)


@pytest.fixture
def poisoned():
    """Fresh memory is NaN instead of what happened to be there, so that a number nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4).isnan().all() and torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("multiply", IMPLEMENTATIONS, ids=NAMES.get)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_output(case, multiply, scheme, poisoned):
    rows, index_R, counts_E, weights = inputs_for(case, scheme)
    got = multiply(rows, index_R, counts_E, weights, torch.float32)
    want = quantised_gemm_ref(rows, index_R, counts_E, weights)
    assert got.dtype == torch.float32
    assert_close(got, want)


@pytest.mark.parametrize("chip", [SM_80, SM_90, GFX942], ids=lambda chip: chip.name)
@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("case", [CASES[3], CASES[8], CASES[9]], ids=lambda case: case.reason)
def test_every_way_to_read_the_bytes_is_one_function(case, scheme, chip, monkeypatch):
    monkeypatch.setattr(kernels, "chip_of", lambda tensor: chip)
    rows, index_R, counts_E, weights = inputs_for(case, scheme)
    got = kernels.multiply(rows, index_R, counts_E, weights, torch.float32)
    assert_close(got, quantised_gemm_ref(rows, index_R, counts_E, weights))


@pytest.mark.parametrize("chip", [SM_80, SM_90, GFX942], ids=lambda chip: chip.name)
@pytest.mark.parametrize("kernel", [False, True], ids=["cpu", "triton"])
def test_every_fp8_number_is_read_right(kernel, chip, monkeypatch):
    """Each of the 254 numbers meets a 1 in a product of its own, minus zero and those below 2^-6 among them."""
    monkeypatch.setattr(kernels, "chip_of", lambda tensor: chip)
    every = torch.arange(256, dtype=torch.uint8)
    every = every[(every & 0x7F) != 0x7F]
    rows = QuantisedRows(every.view(FP8)[:, None].contiguous(), torch.ones(len(every)))
    weights = quantise_weights(torch.ones(1, 1, 1), Scheme.FP8_CHANNEL)
    multiply = kernels.multiply if kernel else quantised_gemm
    got = multiply(rows, None, torch.tensor([len(every)]), weights, torch.float32)
    torch.testing.assert_close(got[:, 0], every.view(FP8).float(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("chip", [SM_80, SM_90, GFX942], ids=lambda chip: chip.name)
def test_every_int4_number_is_read_right(chip, monkeypatch):
    monkeypatch.setattr(kernels, "chip_of", lambda tensor: chip)
    w_ENK = torch.zeros(1, 15, 128)
    for row in range(15):
        w_ENK[0, row, [3, 70]] = torch.tensor([row - 7.0, 7.0])
    weights = quantise_weights(w_ENK, Scheme.INT4_FP8)
    rows = quantise_rows(torch.eye(128)[[3, 70]])
    got = kernels.multiply(rows, None, torch.tensor([2]), weights, torch.float32)
    want = torch.stack([torch.arange(-7.0, 8.0), torch.full((15,), 7.0)])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [70, 130, 200])
@pytest.mark.parametrize("multiply", IMPLEMENTATIONS, ids=NAMES.get)
def test_what_pads_int4_weights_meets_zeros(multiply, k):
    """Past its end a row reads as zeros, and not as the row after it."""
    weights = quantise_weights(torch.randn(2, 3, k, generator=torch.Generator().manual_seed(k)), Scheme.INT4_FP8)
    rows = quantise_rows(torch.ones(5, k))
    arguments = (rows, None, torch.tensor([2, 3]))
    want = multiply(*arguments, weights, torch.float32)
    filled = weights.values.clone()
    for j in range(k % 128, 128):
        filled[:, :, -64 + j % 64] |= 7 << 4 * (j // 64)
    assert torch.equal(multiply(*arguments, weights._replace(values=filled), torch.float32), want)


@pytest.mark.parametrize("multiply", IMPLEMENTATIONS, ids=NAMES.get)
def test_a_repeated_call_gives_the_same_bits(multiply):
    rows, index_R, counts_E, weights = inputs_for(CASES[3], Scheme.FP8_BLOCK)
    first, second = (multiply(rows, index_R, counts_E, weights, torch.float32) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("multiply", IMPLEMENTATIONS, ids=NAMES.get)
def test_bfloat16_is_rounded_once_at_the_end(multiply, scheme):
    rows, index_R, counts_E, weights = inputs_for(CASES[6], scheme)
    got = multiply(rows, index_R, counts_E, weights, torch.bfloat16)
    want = quantised_gemm_ref(rows, index_R, counts_E, weights)
    # Triton's interpreter truncates to bfloat16 where hardware rounds: an error of up to 2^-7.
    assert got.dtype == torch.bfloat16
    assert_close(got, want, rms_error=1e-2 if multiply is kernels.multiply else None)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("multiply", IMPLEMENTATIONS, ids=NAMES.get)
def test_a_nan_stays_in_its_row(multiply, scheme):
    x_XK = torch.ones(5, 130)
    x_XK[3, 129] = float("nan")
    weights = quantise_weights(torch.ones(2, 8, 130), scheme)
    out = multiply(rows_for(scheme)(x_XK), None, torch.tensor([3, 2]), weights, torch.float32)
    assert out[3].isnan().all() and out[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize(
    ("scheme", "rows", "counts", "says"),
    [
        (Scheme.FP8_BLOCK, quantise_rows(torch.ones(4, 6)), [2, 2], "fp8-block"),
        (Scheme.INT4_FP8, quantise_blocks(torch.ones(4, 6)), [2, 2], "int4-fp8"),
        (Scheme.FP8_BLOCK, quantise_blocks(torch.ones(4, 7)), [2, 2], "do not fit"),
        (Scheme.FP8_BLOCK, quantise_blocks(torch.ones(4, 6)), [4], "do not fit"),
        (Scheme.FP8_BLOCK, quantise_blocks(torch.ones(4, 6)), [2, 1], "add up to 3"),
    ],
    ids=["rows for blocks", "blocks for rows", "width", "experts", "counts"],
)
def test_says_what_is_wrong(scheme, rows, counts, says):
    assert isinstance(rows, QuantisedRows | QuantisedBlocks)
    with pytest.raises(ValueError, match=says):
        quantised_gemm(rows, None, torch.tensor(counts), quantise_weights(torch.ones(2, 3, 6), scheme), torch.float32)
