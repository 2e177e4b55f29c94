"""Quantised weights: what each scheme keeps, against its formulas written out weight by weight, and its bounds."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

from expertmesh.kernels.quantise import FP8, round_to_fp8_ref
from expertmesh.kernels.quantised_weights import dequantise_expert, layout, lifting_factor, quantise_weights
from expertmesh.kernels.scheme import Scheme


class Case(NamedTuple):
    experts: int
    n: int
    k: int
    parts: int
    reason: str


CASES = [
    Case(1, 1, 1, 1, "one weight"),
    Case(2, 6, 10, 2, "two parts that are narrower than a block"),
    Case(2, 128, 128, 1, "exactly one block"),
    Case(1, 260, 130, 2, "blocks that end short in both directions, a part of an odd width"),
    Case(3, 5, 300, 1, "the last group is short"),
]


def weights_for(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(case.n + case.k)
    w_ENK = torch.randn(case.experts, case.n, case.k, generator=generator) * 0.03
    return w_ENK * torch.exp(torch.randn(w_ENK.shape, generator=generator))


def written_out(w_NK: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """What one matrix stands for after quantising, and the step of each weight, one block after the other."""
    n, k = w_NK.shape
    rows, columns = {"fp8-block": (128, 128), "fp8-channel": (1, k), "int4-fp8": (1, 128)}[scheme]
    blocks = [(slice(a, a + rows), slice(b, b + columns)) for a in range(0, n, rows) for b in range(0, k, columns)]
    out, steps = torch.empty_like(w_NK), torch.empty_like(w_NK)
    c = written_out_factor([float(w_NK[block].abs().max()) for block in blocks]) if scheme == "int4-fp8" else 1.0
    for block in blocks:
        w, largest = w_NK[block], w_NK[block].abs().max()
        if scheme == "int4-fp8":
            s = round_to_fp8_ref(c * largest / 7).clamp(2.0**-9, 448)
            out[block], steps[block] = (c * w / s).round().clamp(-7, 7) * s / c, s / c
        else:
            s = largest / 448
            out[block], steps[block] = (round_to_fp8_ref(w / s) * s if s > 0 else 0.0), s
    return out, steps


def written_out_factor(largest: list[float]) -> float:
    """FireQ's rule, but of equals the largest."""
    least, found = 7 * 2.0**-9, []
    for c in (2.0**i for i in range(33)):
        if max(largest) * c > 448 and c > 1:
            break
        found.append((sum(max(least - c * g, 0) / least for g in largest), -c))
    return -min(found)[1] if max(largest) else 1.0


@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_quantised_as_written_out(case, scheme):
    w_ENK = weights_for(case)
    quantised = quantise_weights(w_ENK, scheme, case.parts)
    for expert, w_NK in enumerate(w_ENK.double().unbind()):
        want, steps = zip(*(written_out(part, scheme) for part in w_NK.chunk(case.parts)), strict=True)
        got = dequantise_expert(quantised, expert)
        assert got.dtype == torch.float32 and got.shape == w_NK.shape and got.is_contiguous()
        # The last bit of a float32 scale may tip a tie; then the neighbour, which is a step of the format away.
        off = (got - torch.cat(want)).abs() > 1e-6 * w_NK.abs().max()
        assert off.double().mean() <= 0.01
        bound = torch.cat(steps) / 2 if scheme == Scheme.INT4_FP8 else w_NK.abs() / 16 + torch.cat(steps) * 2.0**-10
        clipped = 7.0 * torch.cat(steps) < w_NK.abs() if scheme == Scheme.INT4_FP8 else torch.zeros_like(off)
        error = (got - w_NK).abs()
        assert (error[~clipped] <= bound[~clipped] * (1 + 1e-5)).all()
        assert (error[clipped] <= w_NK.abs()[clipped] / 15).all()  # of what the scale's own rounding clips


@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_shapes_are_as_the_layout_says(case, scheme):
    quantised = quantise_weights(weights_for(case), scheme, case.parts)
    of_part = layout(scheme, case.n // case.parts, case.k)
    held = (quantised.values, quantised.scales, quantised.factors_EP)
    for tensor, told in zip(held, of_part, strict=True):
        if told is None:
            assert tensor is None
            continue
        (rows, *rest), dtype = told
        assert tensor.shape == (case.experts, case.parts * rows, *rest) and tensor.dtype == dtype


@pytest.mark.parametrize("scheme", Scheme)
def test_zeros_stay_zeros(scheme):
    assert torch.equal(dequantise_expert(quantise_weights(torch.zeros(1, 3, 200), scheme), 0), torch.zeros(3, 200))


@pytest.mark.parametrize("scheme", Scheme)
def test_what_was_quantised_comes_back_the_same(scheme):
    """Quantising again what a scheme can say changes nothing."""
    once = dequantise_expert(quantise_weights(weights_for(CASES[3]), scheme), 0)
    again = dequantise_expert(quantise_weights(once[None], scheme), 0)
    assert (once - again).abs().max() <= 2e-7 * once.abs().max()


def test_int4_by_hand():
    w = torch.zeros(1, 1, 128)
    w[0, 0, :4] = torch.tensor([7.0, -7.0, 3.4, -0.6])
    w[0, 0, 64] = -2.0
    quantised = quantise_weights(w, Scheme.INT4_FP8)
    assert quantised.factors_EP.tolist() == [[64.0]] and quantised.scales.float().item() == 64.0
    assert quantised.values[0, 0, :4].tolist() == [7 | 10 << 4, 15, 3, 9]  # low half; -2 is the 64th: a high half
    assert dequantise_expert(quantised, 0)[0, [0, 1, 2, 3, 64]].tolist() == [7, -7, 3, -1, -2]


def test_a_group_below_the_least_scale_keeps_what_that_can_say():
    w = torch.zeros(1, 2, 128)
    w[0, 0, 0] = 448.0  # so that c is 1
    w[0, 1, :3] = torch.tensor([2.0, -0.6, 0.4]) * 2.0**-9
    back = dequantise_expert(quantise_weights(w, Scheme.INT4_FP8), 0)
    assert (back[1, :3] * 2.0**9).tolist() == [2.0, -1.0, 0.0]


@pytest.mark.parametrize(
    ("largest", "factor", "reason"),
    [
        ([1.0, 2.0], 128.0, "nothing underflows: up to 256"),
        ([448.0, 1.0], 1.0, "exactly at the top"),
        ([7 * 2.0**-30, 100.0], 4.0, "8 would push the largest past 448, so it stays below"),
        ([1e-30, 1e-31], 2.0**32, "as far as it goes"),
        ([1000.0, 1e-9], 1.0, "past 448 from the start"),
        ([0.0, 0.0], 1.0, "zeros, which nothing lifts"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_factor(largest, factor, reason):
    chosen = lifting_factor(max(largest))
    assert chosen == factor == written_out_factor(largest) and math.log2(chosen).is_integer()


def test_small_weights_keep_their_bits_through_the_factor():
    w = torch.randn(1, 4, 128) * 1e-4
    error = dequantise_expert(quantise_weights(w, Scheme.INT4_FP8), 0) - w[0]
    assert error.abs().max() <= w.abs().max() / 12


def test_no_part_shares_a_block_with_the_next():
    w = torch.cat([torch.full((1, 6, 8), 1e-6), torch.full((1, 6, 8), 1e3)], 1)
    back = dequantise_expert(quantise_weights(w, Scheme.FP8_BLOCK, parts=2), 0)
    torch.testing.assert_close(back, w[0])


@pytest.mark.parametrize("scheme", Scheme)
def test_bfloat16_weights_are_read_as_they_are(scheme):
    w = weights_for(CASES[4]).bfloat16()
    a, b = (quantise_weights(each, scheme) for each in (w, w.float()))
    assert torch.equal(a.values.view(torch.uint8), b.values.view(torch.uint8)) and a.values.dtype in (FP8, torch.uint8)


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="infinity"):
        quantise_weights(torch.full((1, 2, 2), float("inf")), Scheme.FP8_BLOCK)
