"""Experts' weights in fewer bits, after training: what is kept of them, by three schemes, and what that stands for.

    scheme        a weight            shares its scale with                       bits a weight    rows (quantise.py)
    fp8-block     E4M3                a block of 128 x 128                                8.002    blocks of 128
    fp8-channel   E4M3                its row, an output                                8 + 32/K    whole rows
    int4-fp8      sign, 3 bits        128 of its row; the scale is E4M3 too               4.0625    whole rows

fp8-block is DeepSeek-V3's (arXiv 2412.19437, section 3.3.2). int4-fp8 is FireQ's (arXiv 2505.20839):

    weight ~ q s / c        s = max(fp8(max |c w| / 7), 2^-9)        q = round(c w / s), from -7 to 7

c is a power of two, of a whole matrix, that lifts small weights above the least scale: the largest with |c w| <= 448.
Three things differ from FireQ. Of the c that let the least underflow it takes the smallest; the largest leaves no more,
and scales where E4M3 has all its bits (weights of N(0, 0.02^2): an error of 0.1174 of their deviation and not 0.1190;
with float32 scales 0.1174). Its kernel multiplies with fp8(q s); here q meets the row and s the sum of 128, so nothing
is rounded twice. And q = -8, which only a scale that was rounded down by far would ask for, is -7: a sign and 3 bits
unpack without a table (quantised_gemm_triton.py).

Legend: E experts, N output width, K inner width, P parts: matrices that lie one after the other in N (gate, up).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn import functional

from expertmesh.kernels.quantise import BLOCK, FP8, FP8_MAX, LEAST_SCALE, quantise_rows, widened
from expertmesh.kernels.scheme import Scheme

LEAST_INT4_SCALE = 2.0**-9  # the least positive number of E4M3
LARGEST_INT4 = 7


class QuantisedWeights(NamedTuple):
    """The matrices [N, K] of some experts. No block reaches from one part into the next."""

    scheme: Scheme
    values: torch.Tensor
    """fp8: [E, N, K] float8_e4m3fn. int4: [E, N, 64 ceil(K / 128)] uint8; of each 128 numbers the first 64 lie in the
    low halves of bytes. A half byte is magnitude + 8 if negative."""
    scales: torch.Tensor
    """fp8-block: [E, P ceil(N / P / 128), ceil(K / 128)] float32. fp8-channel: [E, N, 1] float32.
    int4: [E, N, ceil(K / 128)] float8_e4m3fn."""
    factors_EP: torch.Tensor | None
    """int4: float32, the c of each part. None otherwise."""
    parts: int
    width: int
    """K, which int4 rounds up."""


class Layout(NamedTuple):
    """Shape and dtype of what a scheme keeps of one matrix."""

    values: tuple[tuple[int, ...], torch.dtype]
    scales: tuple[tuple[int, ...], torch.dtype]
    factors: tuple[tuple[int, ...], torch.dtype] | None


def layout(scheme: Scheme, n: int, k: int) -> Layout:
    """Of a matrix [n, k]; parts and experts are stacked along the first dimension, and along one before it."""
    blocks = math.ceil(k / BLOCK)
    if scheme == Scheme.INT4_FP8:
        return Layout(((n, blocks * BLOCK // 2), torch.uint8), ((n, blocks), FP8), ((1,), torch.float32))
    grid = (math.ceil(n / BLOCK), blocks) if scheme == Scheme.FP8_BLOCK else (n, 1)
    return Layout(((n, k), FP8), (grid, torch.float32), None)


def quantise_weights(weights_ENK: torch.Tensor, scheme: Scheme, parts: int = 1) -> QuantisedWeights:
    """Quantise the matrices of some experts, each of `parts` matrices along N.

    Args:
        weights_ENK: [E, N, K] of floating point, finite; N a multiple of `parts`.

    Raises:
        ValueError: if a weight is not finite, which no scale could be found for.
    """
    E, N, K = weights_ENK.shape
    if not weights_ENK.isfinite().all():
        raise ValueError("weights to quantise hold an infinity or a NaN")
    matrices = weights_ENK.float().reshape(E * parts, N // parts, K)
    values, scales, factors = _QUANTISE[scheme](matrices)
    rows = scales.shape[1] * parts
    return QuantisedWeights(
        scheme=scheme,
        values=values.view(E, N, values.shape[2]),
        scales=scales.view(E, rows, scales.shape[2]),
        factors_EP=None if factors is None else factors.view(E, parts),
        parts=parts,
        width=K,
    )


def _quantise_block(w_MNK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    M, N, K = w_MNK.shape
    rows, columns = math.ceil(N / BLOCK), math.ceil(K / BLOCK)
    padded = functional.pad(w_MNK, (0, columns * BLOCK - K, 0, rows * BLOCK - N))
    blocks = padded.view(M, rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax((2, 4)).div_(FP8_MAX).clamp_min_(LEAST_SCALE)
    values = (blocks / scales[:, :, None, :, None]).view_as(padded)[:, :N, :K].to(FP8)
    return values.contiguous(), scales, None


def _quantise_channel(w_MNK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    M, N, K = w_MNK.shape
    values, scales = quantise_rows(w_MNK.view(M * N, K))
    return values.view(M, N, K), scales.view(M, N, 1), None


def _quantise_int4(w_MNK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    M, N, K = w_MNK.shape
    groups = functional.pad(w_MNK, (0, -K % BLOCK)).view(M, N, -1, BLOCK)
    largest = groups.abs().amax(3)
    factors_M = torch.tensor([lifting_factor(float(matrix.max())) for matrix in largest.unbind()])
    scales = (largest * factors_M[:, None, None] / LARGEST_INT4).clamp(LEAST_INT4_SCALE, FP8_MAX).to(FP8)
    q = (groups * factors_M[:, None, None, None] / scales.float()[..., None]).round_()
    q = q.clamp_(-LARGEST_INT4, LARGEST_INT4).to(torch.int8)
    low, high = (q.abs() + 8 * (q < 0)).to(torch.uint8).chunk(2, dim=3)
    return (low | (high << 4)).view(M, N, -1), scales, factors_M


def lifting_factor(largest: float) -> float:
    """The c of a matrix whose largest magnitude this is; 1 where that is 0 or too large already."""
    if not 0 < largest <= FP8_MAX:
        return 1.0
    return 2.0 ** min(math.floor(math.log2(FP8_MAX / largest)), 32)


_QUANTISE = {
    Scheme.FP8_BLOCK: _quantise_block,
    Scheme.FP8_CHANNEL: _quantise_channel,
    Scheme.INT4_FP8: _quantise_int4,
}


def dequantise_expert(weights: QuantisedWeights, expert: int) -> torch.Tensor:
    """[N, K] float32: what is kept of one expert stands for. Exact but for one rounding of value times scale."""
    values, scales = weights.values[expert], weights.scales[expert].float()
    N, K, parts = len(values), weights.width, weights.parts
    if weights.scheme == Scheme.INT4_FP8:
        assert weights.factors_EP is not None
        packed = values.view(N, -1, 1, BLOCK // 2)
        low, high = (packed & 7) | ((packed & 8) << 4), ((packed >> 4) & 7) | (packed & 128)
        q = widened(torch.cat([low, high], 2).view(FP8))  # as bytes of E4M3 they are 2^-9 of themselves
        scales = scales * (512 / weights.factors_EP[expert].repeat_interleave(N // parts)[:, None])
        return q.view(N, -1, BLOCK).mul_(scales[:, :, None]).view(N, -1)[:, :K].contiguous()
    wide = widened(values)
    if weights.scheme == Scheme.FP8_CHANNEL:
        return wide.mul_(scales)
    part_rows = N // parts
    per_part = scales.view(parts, -1, scales.shape[1]).repeat_interleave(BLOCK, 1)[:, :part_rows]
    return wide.mul_(per_part.reshape(N, -1).repeat_interleave(BLOCK, 1)[:, :K])
