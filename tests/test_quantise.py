"""FP8 rows and blocks against the definition in float64: values, scales, error bounds, and what may not spread."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from expertmesh.kernels import quantise as module
from expertmesh.kernels import quantise_triton
from expertmesh.kernels.quantise import (
    BLOCK,
    FP8,
    FP8_MAX,
    LEAST_SCALE,
    QuantisedRows,
    dequantise_rows,
    quantise_blocks,
    quantise_blocks_ref,
    quantise_hidden_blocks,
    quantise_hidden_rows,
    quantise_rows,
    round_to_fp8_ref,
)


class Case(NamedTuple):
    rows: int
    width: int
    reason: str


CASES = [
    Case(0, 8, "no rows"),
    Case(1, 1, "one number"),
    Case(1, 128, "one row, exactly one block"),
    Case(3, 5, "narrower than a block"),
    Case(5, 300, "the last block is short"),
    Case(17, 256, "whole blocks"),
    Case(2, 129, "a last block of one number"),
]
ONE_NUMBER_OFF = 1 / 16  # of itself, at most


def rows_for(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """Numbers over some twelve orders of magnitude, so that every exponent of FP8 and its underflow are met."""
    generator = torch.Generator().manual_seed(case.rows + case.width)
    x_RD = torch.randn(case.rows, case.width, generator=generator)
    return (x_RD * torch.exp(4 * torch.randn(case.rows, case.width, generator=generator))).to(dtype)


@pytest.fixture(params=[False, True], ids=["cpu", "triton"])
def by_triton(request, monkeypatch):
    """Both ways to compute, by the same public functions."""
    monkeypatch.setattr(module, "by_triton", lambda tensor: request.param)
    return request.param


@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
@pytest.mark.parametrize("quantise", [quantise_rows, quantise_blocks], ids=lambda function: function.__name__)
def test_quantised_as_defined(quantise, case, dtype):
    x_RD = rows_for(case, dtype)
    values_RD, scales = quantise(x_RD)
    block = BLOCK if quantise is quantise_blocks else case.width
    want_values, want_scales = quantise_blocks_ref(x_RD, block)
    scales_RB = scales.view(case.rows, -(-case.width // block))
    assert values_RD.dtype == FP8 and values_RD.shape == x_RD.shape and values_RD.is_contiguous()
    assert scales.dtype == torch.float32 and scales_RB.shape == (case.rows, -(-case.width // block))
    torch.testing.assert_close(scales_RB.double(), want_scales, rtol=2e-7, atol=0)
    # A tie may fall either way by the last bit of a scale: then the neighbour, an eighth away at most.
    error = (values_RD.double() - want_values).abs()
    assert (error <= want_values.abs() / 8 + 2.0**-9).all() and (error > 0).double().sum() <= 0.01 * error.numel()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
@pytest.mark.parametrize("quantise", [quantise_rows, quantise_blocks], ids=lambda function: function.__name__)
def test_back_within_a_sixteenth_or_half_the_least_step(quantise, case):
    x_RD = rows_for(case, torch.float32)
    rows = quantise(x_RD)
    back_RD = dequantise_rows(rows, torch.float64)
    blocks = -(-case.width // BLOCK) if quantise is quantise_blocks else 1
    scales_RB = rows[1].double().view(case.rows, blocks)
    step_RD = scales_RB.repeat_interleave(BLOCK, 1)[:, : case.width] if scales_RB.shape[1] > 1 else scales_RB
    bound_RD = torch.maximum(x_RD.double().abs() * ONE_NUMBER_OFF, step_RD * 2.0**-10)
    assert ((back_RD - x_RD.double()).abs() <= bound_RD * (1 + 1e-6)).all()
    assert dequantise_rows(rows, torch.bfloat16).dtype == torch.bfloat16


def test_by_hand():
    rows = quantise_rows(torch.tensor([[448.0, -1.0, 17.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert rows.scales_R.tolist() == [1.0, pytest.approx(LEAST_SCALE)]
    assert rows.values_RD.float().tolist() == [[448.0, -1.0, 16.0, 0.0], [0.0] * 4]  # 17 lies between 16 and 18: even
    assert isinstance(rows, QuantisedRows)


def test_every_fp8_number_comes_back_as_it_was():
    every = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    every = every[every.isfinite()][None, :]
    assert torch.equal(dequantise_rows(quantise_rows(every), torch.float32), every)
    assert torch.equal(round_to_fp8_ref(every), every.double())


def test_rounding_is_to_the_nearest_and_a_tie_to_the_even():
    grid = torch.arange(127, dtype=torch.uint8).view(FP8).double()
    between = (grid[1:] + grid[:-1]) / 2
    even = torch.where(torch.arange(126) % 2 == 0, grid[:-1], grid[1:])
    assert torch.equal(round_to_fp8_ref(between), even)
    assert torch.equal(round_to_fp8_ref(torch.tensor([500.0, -1e9])), torch.tensor([448.0, -448.0]).double())


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [0, 64, BLOCK])
def test_triton_gives_the_bits_of_the_cpu(block, dtype):
    """Rounding is written out in integers, so this says what every chip gives. 1100: more than one step of a row."""
    x_RD = rows_for(Case(6, 1100, "twins"), dtype)
    x_RD[2] = 0
    x_RD[3, 5], x_RD[4, 7], x_RD[5, 1099] = float("inf"), float("nan"), -0.0
    for got, want in zip(
        quantise_triton.quantise(x_RD, block, False), module._quantise_plainly(x_RD, block, False), strict=True
    ):
        got, want = (t if t.dtype == torch.float32 else torch.where(t.isnan(), 500.0, t.float()) for t in (got, want))
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_triton_rounds_every_fp8_number_and_every_tie():
    grid = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    x = torch.cat([grid, (grid[1:] + grid[:-1]) / 2, torch.tensor([448.0])])
    x_RD = torch.cat([x, -x])[None, :]
    assert torch.equal(quantise_triton.quantise(x_RD, 0, False)[0].double(), round_to_fp8_ref(x_RD))


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_hidden_units_are_quantised_as_they_are_made(case, dtype):
    h_RG = rows_for(Case(case.rows, 2 * case.width, ""), dtype)
    gate_RD, up_RD = h_RG.double().chunk(2, dim=1)
    a_RD = gate_RD * torch.sigmoid(gate_RD) * up_RD
    for quantise, plain in ((quantise_hidden_rows, quantise_rows), (quantise_hidden_blocks, quantise_blocks)):
        got, want = quantise(h_RG), plain(a_RD)
        torch.testing.assert_close(got[1], want[1], rtol=2e-6, atol=0)
        off = got[0].double() != want[0].double()
        assert off.double().sum() <= 0.02 * off.numel()  # ties that a last bit tips


def test_the_largest_number_of_a_row_is_never_lost():
    """Whatever a scale rounds to, x / scale stays where E4M3 rounds it to 448: past 464 there is only NaN."""
    x_R1 = torch.logspace(-30, 30, 5000)[:, None]
    assert (quantise_rows(x_R1).values_RD.float() == FP8_MAX).all()


def test_a_row_gets_the_same_bits_in_any_batch():
    x_RD = rows_for(Case(9, 200, "batch"), torch.bfloat16)
    for quantise in (quantise_rows, quantise_blocks):
        whole, alone = quantise(x_RD), [quantise(x_RD[r : r + 1]) for r in range(9)]
        assert torch.equal(whole[0].view(torch.uint8), torch.cat([one[0] for one in alone]).view(torch.uint8))
        assert torch.equal(whole[1], torch.cat([one[1] for one in alone]))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_is_seen_and_stays_in_its_row(bad):
    x_RD = torch.ones(3, 256)
    x_RD[1, 3] = bad
    by_row = dequantise_rows(quantise_rows(x_RD), torch.float32)
    assert not by_row[1].isfinite().any() and torch.equal(by_row[[0, 2]], torch.ones(2, 256))
    by_block = dequantise_rows(quantise_blocks(x_RD), torch.float32)
    assert not by_block[1, :BLOCK].isfinite().any() and torch.equal(by_block[1, BLOCK:], torch.ones(128))


def test_an_outlier_costs_its_own_block_only():
    x_RD = torch.full((1, 256), 1e-3)
    x_RD[0, 0] = 1e3
    assert dequantise_rows(quantise_rows(x_RD), torch.float32)[0, 255] == 0
    assert dequantise_rows(quantise_blocks(x_RD), torch.float32)[0, 255] == pytest.approx(1e-3)


BAD = {"one dimension": torch.zeros(3), "integers": torch.zeros(2, 2, dtype=torch.long), "no width": torch.zeros(2, 0)}


@pytest.mark.parametrize("x", BAD.values(), ids=BAD)
def test_says_what_is_wrong(x):
    with pytest.raises(ValueError, match="expected"):
        quantise_rows(x)


def test_halves_must_be_equal():
    with pytest.raises(ValueError, match="2D"):
        quantise_hidden_rows(torch.zeros(2, 3))
