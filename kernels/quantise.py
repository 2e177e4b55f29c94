"""Rows of numbers as FP8 with a scale of their own: half the bytes of bfloat16, for products and for the wire.

FP8 here is E4M3 (OCP 8-bit floating point, arXiv 2209.05433): 4 bits of exponent, 3 of mantissa, from 2^-9 to 448, and
no infinity. A scale moves the largest magnitude of what shares it to 448:

    scale = max |x| / 448        value = fp8(x / scale)        x ~ value * scale

so a number is off by at most 1/16 of itself, or where it is small, by 2^-10 scales (the largest number / 458752).
What shares a scale is a whole row (a token; FireQ, arXiv 2505.20839), or 128 numbers of it, so that one outlier costs
its own block and no more (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). Scales are found from the numbers themselves,
and are float32: a scale that was rounded could push the largest number past 448.

A row depends on no other row: a token gets the same bits alone, in any batch, and on either end of a link. A row that
holds an infinity or a NaN is not finite any more as far as its scale reaches, and no other row is touched.

Legend: R rows, D width, B blocks of 128 along the width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from expertmesh.kernels import quantise_triton
from expertmesh.kernels.device import by_triton
from expertmesh.kernels.ops import operation

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
    values_RD, scales_RB = _checked(x_RD, 0, False)
    return QuantisedRows(values_RD, scales_RB[:, 0])


def quantise_blocks(x_RD: torch.Tensor) -> QuantisedBlocks:
    """Quantise each block of 128 numbers of a row by its own largest magnitude; otherwise as `quantise_rows`."""
    return QuantisedBlocks(*_checked(x_RD, BLOCK, False))


def dequantise_rows(rows: QuantisedRows | QuantisedBlocks, dtype: torch.dtype) -> torch.Tensor:
    """[R, D] in `dtype`: each value times its scale, computed in float32 (float64 for float64) and rounded once."""
    values_RD, scales = rows
    wide = torch.promote_types(dtype, torch.float32)
    scales_RB = scales.to(wide) if scales.dim() == 2 else scales.to(wide)[:, None]
    if scales_RB.shape[1] > 1:
        scales_RB = scales_RB.repeat_interleave(BLOCK, 1)[:, : values_RD.shape[1]]
    return widened(values_RD).to(wide).mul_(scales_RB).to(dtype)


def widened(values: torch.Tensor) -> torch.Tensor:
    """FP8 as float32, exactly. On the CPU a NaN reads as 480: what is no number is so by its scale.

    There torch's own cast takes 3.4 ns a number and core, this 0.7: moved by one shift into a float16, sign to sign,
    the bits of E4M3 are 2^-8 of their value.
    """
    if values.is_cuda:
        return values.float()
    bits = values.view(torch.int8).to(torch.int16)
    return ((bits << 7) & ~(1 << 14)).view(torch.float16).float().mul_(256.0)


def quantise_hidden_rows(h_RG: torch.Tensor) -> QuantisedRows:
    """Quantise silu(gate) up of rows [gate | up]: [R, 2D] -> rows of width D; otherwise as `quantise_rows`."""
    values_RD, scales_RB = _checked(h_RG, 0, True)
    return QuantisedRows(values_RD, scales_RB[:, 0])


def quantise_hidden_blocks(h_RG: torch.Tensor) -> QuantisedBlocks:
    """As `quantise_hidden_rows`, a scale for each block of 128 hidden units."""
    return QuantisedBlocks(*_checked(h_RG, BLOCK, True))


def _checked(x: torch.Tensor, block: int, swiglu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if x.dim() != 2 or not x.is_floating_point() or not x.shape[1] or (swiglu and x.shape[1] % 2):
        width = "2D" if swiglu else "D"
        raise ValueError(f"rows to quantise are {tuple(x.shape)} {x.dtype}, expected [R, {width}] of floating point")
    return _quantise(x, block, swiglu)


def _fake(x: torch.Tensor, block: int, swiglu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    R, D = x.shape[0], x.shape[1] // 2 if swiglu else x.shape[1]
    blocks = -(-D // block) if block else 1
    return x.new_empty(R, D, dtype=FP8), x.new_empty(R, blocks, dtype=torch.float32)


@operation("quantise(Tensor x, int block, bool swiglu) -> (Tensor, Tensor)", _fake)
def _quantise(x: torch.Tensor, block: int, swiglu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return (quantise_triton.quantise if by_triton(x) else _quantise_plainly)(x, block, swiglu)


def _quantise_plainly(x: torch.Tensor, block: int, swiglu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    wide_RD = x.float()
    if swiglu:
        gate_RD, up_RD = wide_RD.chunk(2, dim=1)
        wide_RD = functional.silu(gate_RD).mul_(up_RD)
    R, D = wide_RD.shape
    block = block or D
    blocks = -(-D // block)
    wide_RBK = functional.pad(wide_RD, (0, blocks * block - D)).view(R, blocks, block)
    scales_RB = wide_RBK.abs().amax(2).div_(FP8_MAX).clamp_min_(LEAST_SCALE)
    values_RD = (wide_RBK / scales_RB[:, :, None]).to(FP8).view(R, blocks * block)[:, :D].contiguous()
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
