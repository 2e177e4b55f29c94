"""Rows of numbers as FP8 with a scale of their own: half the bytes of bfloat16, for products and for the wire.

FP8 here is E4M3 (OCP 8-bit floating point, arXiv 2209.05433): 4 bits of exponent, 3 of mantissa, from 2^-9 to 448, and
no infinity. A scale moves the largest magnitude of what shares it to 448:

    scale = max |x| / 448        value = fp8(x / scale)        x ~ value * scale

so a number is off by at most 1/16 of itself, or where it is small, by 2^-10 scales (the largest number / 458752).
What shares a scale is a whole row (a token; FireQ, arXiv 2505.20839), or 128 numbers of it, so that one outlier costs
its own block and no more (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). Scales are found from the numbers themselves,
and are float32: a scale that was rounded could push the largest number past 448.

A row depends on no other row: a token gets the same bits alone, in any batch, and on either end of a link. A row that
holds an infinity or a NaN becomes NaN as far as the scale reaches, and nothing else does.

Legend: R rows, D width, B blocks of 128 along the width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
BLOCK = 128  # numbers that share a scale where rows are cut into blocks; the last block may be shorter
LEAST_SCALE = torch.finfo(torch.float32).tiny  # of zeros too: a scale of 0 could not be divided by


class QuantisedRows(NamedTuple):
    """Rows with a scale each; 1 byte a number and 4 a row."""

    values_RD: torch.Tensor
    """float8_e4m3fn."""
    scales_R: torch.Tensor
    """float32, positive."""


class QuantisedBlocks(NamedTuple):
    """Rows with a scale for each block of 128 numbers."""

    values_RD: torch.Tensor
    """float8_e4m3fn."""
    scales_RB: torch.Tensor
    """float32, positive; B = ceil(D / 128)."""


def quantise_rows(x_RD: torch.Tensor) -> QuantisedRows:
    """Quantise each row by its own largest magnitude; not differentiable.

    Args:
        x_RD: [R, D] float32, bfloat16 or float64 (which is read as float32).

    Raises:
        ValueError: if `x_RD` has not two dimensions, or is not of floating point.
    """
    values_RD, scales_RB = _quantise(x_RD, max(x_RD.shape[-1], 1))
    return QuantisedRows(values_RD, scales_RB[:, 0])


def quantise_blocks(x_RD: torch.Tensor) -> QuantisedBlocks:
    """Quantise each block of 128 numbers of a row by its own largest magnitude; otherwise as `quantise_rows`."""
    return QuantisedBlocks(*_quantise(x_RD, BLOCK))


def dequantise_rows(rows: QuantisedRows | QuantisedBlocks, dtype: torch.dtype) -> torch.Tensor:
    """[R, D] in `dtype`: each value times its scale, computed in float32 (float64 for float64) and rounded once."""
    values_RD, scales = rows
    wide = torch.promote_types(dtype, torch.float32)
    scales_RB = scales.to(wide) if scales.dim() == 2 else scales.to(wide)[:, None]
    if scales_RB.shape[1] > 1:
        scales_RB = scales_RB.repeat_interleave(BLOCK, 1)[:, : values_RD.shape[1]]
    return values_RD.to(wide).mul_(scales_RB).to(dtype)


def _quantise(x_RD: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    if x_RD.dim() != 2 or not x_RD.is_floating_point():
        raise ValueError(f"rows to quantise are {tuple(x_RD.shape)} {x_RD.dtype}, expected [R, D] of floating point")
    return _quantise_rows(x_RD, block)


def _quantise_rows(x_RD: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    R, D = x_RD.shape
    blocks = -(-D // block)
    wide = functional.pad(x_RD.float(), (0, blocks * block - D)).view(R, blocks, block)
    scales_RB = wide.abs().amax(2).div_(FP8_MAX).clamp_min_(LEAST_SCALE)
    values_RD = (wide / scales_RB[:, :, None]).to(FP8).view(R, blocks * block)[:, :D].contiguous()
    return values_RD, scales_RB


def quantise_blocks_ref(x_RD: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in float64: values [R, D] as the numbers they stand for, and scales [R, ceil(D / block)]."""
    values_RD, scales = torch.empty_like(x_RD, dtype=torch.float64), []
    for start in range(0, x_RD.shape[1], block):
        part = x_RD[:, start : start + block].double()
        scale_R1 = (part.abs().amax(1, keepdim=True) / FP8_MAX).clamp_min(LEAST_SCALE)
        values_RD[:, start : start + block] = round_to_fp8_ref(part / scale_R1)
        scales.append(scale_R1)
    return values_RD, torch.cat(scales, 1)


def round_to_fp8_ref(x: torch.Tensor) -> torch.Tensor:
    """The nearest number of E4M3, ties to the even one, past the largest the largest; float64 in and out.

    Between 2^e and 2^(e+1) there are 8 of them, 2^(e-3) apart; below 2^-6 they stay 2^-9 apart, down to zero.
    """
    exponent = torch.frexp(x.double()).exponent.sub(1).clamp_min(-6)
    step = torch.ldexp(torch.ones_like(x, dtype=torch.float64), exponent - 3)
    return torch.round(x.double() / step).mul(step).clamp(-FP8_MAX, FP8_MAX)
