"""Quantising rows as one Triton kernel, with or without the SwiGLU whose hidden units it quantises.

    a = x                              or, where a row is [gate | up],      a = silu(gate) up
    scale = max |a| / 448              value = fp8(a / scale)               over a whole row, or 128 numbers of it

With the SwiGLU the hidden units never lie in memory as anything but FP8: 4F bytes read and F written a row, where two
kernels in turn would move 4F + 2F + 2F + F. A whole row is read twice, the second time out of the cache.

Rounding is written out in integers (`round_to_fp8`): sm_80 has no instruction for it, and so every chip, and Triton's
interpreter, gives the same bits.

Legend: R rows, D width, B blocks along the width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from expertmesh.kernels.tiles import Build, Chip, Tile

STEP = 1024  # numbers that a program works on at a time, where a scale is a whole row's


@triton.jit
def round_to_fp8(x):
    """The bits of the nearest E4M3 number, ties to even; |x| below 464, where 448 ends. NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    # 20 bits of mantissa go; what is added carries into the rest where it must. The exponent's bias was 127 and is 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6: 2^14 is so large that the last bit of a sum with it is worth 2^-9, and the sum is rounded to that.
    small = (bits.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    magnitude = tl.where(bits < 0x3C800000, small, normal)
    return (tl.where(bits > 0x7F800000, 0x7F, magnitude) | sign).to(tl.uint8)


@triton.jit
def _load(x_ptr, d, D, SWIGLU: tl.constexpr):
    inside = d < D
    x = tl.load(x_ptr + d, mask=inside, other=0.0).to(tl.float32)
    if SWIGLU:
        x = x * tl.sigmoid(x) * tl.load(x_ptr + D + d, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _largest(x):
    """The largest magnitude; NaN if one is among them, which a plain maximum may drop."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)


@triton.jit
def _quantise_kernel(
    x_ptr,  # [R, D], with SWIGLU [R, 2D], float32 or bfloat16, contiguous
    values_ptr,  # [R, D] uint8: bits of E4M3, output
    scales_ptr,  # [R, B] float32, output
    D,
    BLOCK: tl.constexpr,  # numbers that share a scale; 0: the whole row
    STEP: tl.constexpr,
    SWIGLU: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * (2 * D if SWIGLU else D)
    values_ptr += row * D
    if BLOCK:
        block = tl.program_id(1)
        d = block * BLOCK + tl.arange(0, BLOCK)
        x = _load(x_ptr, d, D, SWIGLU)
        # div_rn: a plain division of a GPU is off by two last bits, and rounding would then differ from the CPU's.
        scale = tl.maximum(tl.div_rn(_largest(x), 448.0), LEAST_SCALE, propagate_nan=tl.PropagateNan.ALL)
        tl.store(scales_ptr + row * tl.num_programs(1) + block, scale)
        tl.store(values_ptr + d, round_to_fp8(tl.div_rn(x, tl.zeros_like(x) + scale)), mask=d < D)
    else:
        d = tl.arange(0, STEP)
        largest = tl.zeros((STEP,), dtype=tl.int32)  # non-negative numbers are in the order of their bits, NaN last
        for start in range(0, D, STEP):
            x = _load(x_ptr, start + d, D, SWIGLU)
            largest = tl.maximum(largest, tl.abs(x).to(tl.int32, bitcast=True))
        top = tl.max(largest, 0).to(tl.float32, bitcast=True)
        scale = tl.maximum(tl.div_rn(top, 448.0), LEAST_SCALE, propagate_nan=tl.PropagateNan.ALL)
        tl.store(scales_ptr + row, scale)
        for start in range(0, D, STEP):
            x = _load(x_ptr, start + d, D, SWIGLU)
            values = round_to_fp8(tl.div_rn(x, tl.zeros_like(x) + scale))
            tl.store(values_ptr + start + d, values, mask=start + d < D)


def quantise(x: torch.Tensor, block: int, swiglu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 values [R, D] and scales [R, B] of rows x, or where `swiglu` of silu(gate) up of rows [gate | up].

    `block`: numbers that share a scale, a power of two; 0: the whole row (B = 1).
    """
    x = x.contiguous()
    R, D = len(x), x.shape[1] // 2 if swiglu else x.shape[1]
    blocks = triton.cdiv(D, block) if block else 1
    values_RD = x.new_empty(R, D, dtype=torch.float8_e4m3fn)
    scales_RB = x.new_empty(R, blocks, dtype=torch.float32)
    if R > 0:
        step = min(STEP, triton.next_power_of_2(D))
        _quantise_kernel[(R, blocks)](
            *(x, values_RD.view(torch.uint8), scales_RB, D),
            BLOCK=block,
            STEP=step,
            SWIGLU=swiglu,
            LEAST_SCALE=torch.finfo(torch.float32).tiny,
            num_warps=1 if block else 4,
        )
    return values_RD, scales_RB


def shipped(chip: Chip) -> list[Build]:
    """Both kinds of scales, as bfloat16 models run them."""
    builds = []
    for block in (0, 128):
        for swiglu in (False, True):
            tile = Tile(1, block or STEP, 1, 1 if block else 4, 3)
            arguments = {"x_ptr": "*bf16:16", "values_ptr": "*u8:16", "scales_ptr": "*fp32:16", "D": "i32:16"}
            constants = {"BLOCK": block, "STEP": STEP, "SWIGLU": swiglu, "LEAST_SCALE": torch.finfo(torch.float32).tiny}
            name = ("quantise swiglu" if swiglu else "quantise") + (" blocks" if block else " rows")
            builds.append(Build(name, _quantise_kernel, arguments | constants, tile))
    return builds
