"""One matrix product per expert with quantised rows and weights, as a Triton kernel; quantised_gemm.py says which.

Bytes go to the tensor cores as they lie, and scales meet the sums, not the operands. Every 128 numbers of the inner
width the product is added to float32 sums of the program's own: that is where a block's scales belong, and the tensor
cores of sm_90 keep 14 bits of a sum of FP8 products and no more (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).

Weights are the left operand, out^T = weights @ rows^T. So few rows are no waste (a matrix instruction of sm_90 is 64
high and from 8 on wide, and weights always fill its height), and INT4 is unpacked into registers, where the left
operand may lie. A nibble is a sign and 3 bits of magnitude m: as a byte of E4M3 these are m 2^-9, below the smallest
exponent. Two bit operations a number, and no table.

How a chip reads the bytes of E4M3 (READ):
    NATIVE  sm_90 and later multiply them.
    FNUZ    gfx942 multiplies an E4M3 of half that value, and with NaN in place of -0: two operands, 4 times the sum.
    HALF    sm_80 has no FP8: shifted into a float16 they are 2^-8 of their value, exactly; 2^16 times the sum.

Legend: X source rows, R rows sorted by expert, E experts, K inner width, N output width, P parts that N is cut into.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from expertmesh.kernels.grouped_gemm_triton import GROUP
from expertmesh.kernels.quantise import BLOCK, QuantisedBlocks, QuantisedRows
from expertmesh.kernels.quantised_weights import QuantisedWeights
from expertmesh.kernels.scheme import Scheme
from expertmesh.kernels.tiles import (
    Build,
    Chip,
    Tile,
    chip_of,
    choose_tile,
    describable,
    descriptor_type,
    swizzle,
    tile_table,
)

NATIVE, FNUZ, HALF = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def operand(bits, READ: tl.constexpr):
    """Bytes of E4M3 as what the tensor cores multiply."""
    if READ == NATIVE:
        return bits.to(tl.float8e4nv, bitcast=True)
    elif READ == FNUZ:
        return tl.where(bits == 0x80, 0, bits).to(tl.uint8).to(tl.float8e4b8, bitcast=True)
    else:
        return as_half(bits)


@triton.jit
def as_half(bits):
    """2^-8 of what bytes of E4M3 stand for, exactly."""
    wide = bits.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def multiply_kernel(
    rows_ptr,  # [X, K] bytes of E4M3 (as float8e4nv where READ is NATIVE, else as uint8), contiguous
    row_scales_ptr,  # [X, ceil(K / 128)] float32 for fp8-block, else [X]
    index_ptr,  # [R] int64 row of rows for each row; unused without GATHERED
    weights,  # [E, N, K] bytes of E4M3 or [E, N, K' / 2] nibbles, contiguous: pointer, or descriptor of [1, BLOCK_N, _]
    weight_scales_ptr,  # see QuantisedWeights; contiguous; of INT4 as uint8
    factors_ptr,  # [E, P] float32; unused but for INT4
    table_ptr,  # [tiles, 3] int32
    out_ptr,  # [R, N] float32 or bfloat16, contiguous, output
    tiles,
    N,
    K,
    parts,  # P
    stride_n,  # bytes from a row of the weights to the next
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BY_BLOCK: tl.constexpr,  # fp8-block
    INT4: tl.constexpr,  # int4-fp8; neither: fp8-channel
    READ: tl.constexpr,
    GATHERED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,  # K is a multiple of 128, N / P of BLOCK_N
):
    width = N // parts
    blocks = tl.cdiv(width, BLOCK_N)
    tile, block = swizzle(tl.program_id(0), tiles, parts * blocks, GROUP)
    expert = tl.load(table_ptr + tile * 3)
    if expert < 0:
        return
    first_row = tl.load(table_ptr + tile * 3 + 1)
    row_end = tl.load(table_ptr + tile * 3 + 2)
    part = block // blocks
    inner = block % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    first_n = part * width + block % blocks * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    r = first_row + tl.arange(0, BLOCK_R)
    known = tl.minimum(r, row_end - 1)  # rows past the end repeat the last one and are not stored
    source = tl.load(index_ptr + known) if GATHERED else known.to(tl.int64)
    steps = tl.cdiv(K, 128)
    DEPTH: tl.constexpr = 64 if INT4 else 128  # bytes of weights a step
    k = tl.arange(0, DEPTH)
    row_ptrs = rows_ptr + source[:, None] * K + k[None, :]
    if not DESCRIPTORS:
        weight_ptrs = weights + (expert.to(tl.int64) * N + n[:, None]) * stride_n + k[None, :]
    if BY_BLOCK:
        row_scale_ptrs = row_scales_ptr + source * steps
        scale_ptrs = weight_scales_ptr + (expert.to(tl.int64) * parts * blocks + block) * steps
    if INT4:
        scale_ptrs = weight_scales_ptr + (expert.to(tl.int64) * N + n) * steps
    acc = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for step in range(0, steps):
        if DESCRIPTORS:
            w = weights.load([expert, first_n, step * DEPTH]).reshape(BLOCK_N, DEPTH)
        else:
            if EVEN:
                w = tl.load(weight_ptrs)
            else:
                inside = (inner < width)[:, None] & (step * DEPTH + k < stride_n)[None, :]
                w = tl.load(weight_ptrs, mask=inside, other=0.0)
            weight_ptrs += DEPTH
        left = K - step * 128
        if EVEN:
            x = tl.load(row_ptrs)
        else:
            x = tl.load(row_ptrs, mask=(k < left)[None, :], other=0.0)
        if INT4:
            low = operand((w & 7) | ((w & 8) << 4), READ)
            high = operand(((w >> 4) & 7) | (w & 128), READ)
            if EVEN:
                further = tl.load(row_ptrs + 64)
            else:
                further = tl.load(row_ptrs + 64, mask=(k < left - 64)[None, :], other=0.0)
            part_sum = tl.dot(low, operand(x, READ).T)
            part_sum = tl.dot(high, operand(further, READ).T, part_sum)
            scale = as_half(tl.load(scale_ptrs + step, mask=inner < width, other=0)).to(tl.float32)
            acc += part_sum * scale[:, None]
        else:
            part_sum = tl.dot(operand(w, READ), operand(x, READ).T)
            if BY_BLOCK:
                acc += part_sum * (tl.load(row_scale_ptrs + step) * tl.load(scale_ptrs + step))[None, :]
            else:
                acc += part_sum
        row_ptrs += 128
    factor = 1.0 if READ == NATIVE else 4.0 if READ == FNUZ else 65536.0
    if INT4:
        factor = factor * 131072.0 / tl.load(factors_ptr + expert * parts + part)  # 2^9 of a nibble, 2^8 of a scale
    if not BY_BLOCK and not INT4:
        acc *= tl.load(weight_scales_ptr + expert.to(tl.int64) * N + n, mask=inner < width, other=0.0)[:, None]
    row_factors = tl.zeros((BLOCK_R,), dtype=tl.float32) + factor
    if not BY_BLOCK:
        row_factors *= tl.load(row_scales_ptr + source)
    out = (acc * row_factors[None, :]).T
    out_ptrs = out_ptr + r[:, None].to(tl.int64) * N + n[None, :]
    stored = (r < row_end)[:, None]
    if not EVEN:
        stored = stored & (inner < width)[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=stored)


def read_of(chip: Chip) -> tl.constexpr:
    """How a chip reads E4M3."""
    return FNUZ if chip.name == "gfx942" else NATIVE if chip.descriptors else HALF


def quantised_tile(rows: int, experts: int, chip: Chip) -> Tile:
    """`rows` of the output's rows, `columns` of the weights'; as tall as an average group, as `choose_tile` says.

    A program holds two accumulators, a step's sums and those of all steps, and INT4 or HALF operands beside them: on
    sm_90, where the second operand stays in shared memory, they fit at 128 rows, elsewhere at 64 (at 128 between 40
    and 390 bytes a thread go to memory).
    """
    full = 128 if chip.name == "sm_90" else 64
    height = min(full, choose_tile(rows, experts, BLOCK, 1, chip, wide=False).rows)
    wide_from = full if chip.name == "sm_90" else 32
    return Tile(height, BLOCK, BLOCK, 8 if height >= wide_from else 4, 2 if chip.name == "gfx942" else 3)


def multiply(
    rows: QuantisedRows | QuantisedBlocks,
    index_R: torch.Tensor | None,
    counts_E: torch.Tensor,
    weights: QuantisedWeights,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`quantised_gemm` by the Triton kernel whatever the device: on CPU tensors it needs TRITON_INTERPRET=1."""
    values_XK, row_scales = (tensor.contiguous() for tensor in rows)
    R, K = len(values_XK if index_R is None else index_R), values_XK.shape[1]
    E, N, stride_n = weights.values.shape
    out_RN = values_XK.new_empty(R, N, dtype=dtype)
    if R == 0:
        return out_RN
    chip = chip_of(values_XK)
    tile, read = quantised_tile(R, E, chip), read_of(chip)
    table_T3 = tile_table(counts_E, R, tile.rows).table_T3
    parts, int4 = weights.parts, weights.scheme == Scheme.INT4_FP8
    stored, scales = weights.values.contiguous(), weights.scales.contiguous()
    if read != NATIVE:
        values_XK, stored = values_XK.view(torch.uint8), stored.view(torch.uint8)
    descriptors = describable(chip, stored)
    given = stored
    if descriptors:
        given = TensorDescriptor.from_tensor(stored, [1, tile.columns, BLOCK // 2 if int4 else BLOCK])
    multiply_kernel[(len(table_T3) * parts * triton.cdiv(N // parts, tile.columns),)](
        *(values_XK, row_scales, index_R, given),
        *(scales.view(torch.uint8) if int4 else scales, weights.factors_EP, table_T3, out_RN),
        *(len(table_T3), N, K, parts, stride_n),
        BLOCK_R=tile.rows,
        BLOCK_N=tile.columns,
        BY_BLOCK=weights.scheme == Scheme.FP8_BLOCK,
        INT4=int4,
        READ=read.value,
        GATHERED=index_R is not None,
        DESCRIPTORS=descriptors,
        EVEN=K % BLOCK == 0 and N // parts % tile.columns == 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out_RN


def shipped(chip: Chip) -> list[Build]:
    """The kernel as bfloat16 models whose sizes are multiples of 128 run it, rows gathered."""
    builds = []
    read = read_of(chip)
    fp8 = "fp8e4nv" if read == NATIVE else "u8"
    for scheme in Scheme:
        int4 = scheme == Scheme.INT4_FP8
        stored = "u8" if int4 else fp8
        for tile in dict.fromkeys(quantised_tile(height, 1, chip) for height in (16, 64, 128)):
            block = (1, tile.columns, BLOCK // 2 if int4 else BLOCK)
            arguments: dict[str, Any] = {
                **{"rows_ptr": f"*{fp8}:16", "row_scales_ptr": "*fp32:16", "index_ptr": "*i64:16"},
                "weights": descriptor_type(stored, *block) if chip.descriptors else f"*{stored}:16",
                "weight_scales_ptr": "*u8:16" if int4 else "*fp32:16",
                "factors_ptr": "*fp32:16" if int4 else None,
                **{"table_ptr": "*i32:16", "out_ptr": "*bf16:16", "tiles": "i32"},
                **dict.fromkeys(("N", "K", "stride_n"), "i32:16"),
                **{"parts": 1, "BLOCK_R": tile.rows, "BLOCK_N": tile.columns, "READ": read.value},
                **{"GATHERED": True, "DESCRIPTORS": chip.descriptors, "EVEN": True},
                **{"BY_BLOCK": scheme == Scheme.FP8_BLOCK, "INT4": int4},
            }
            itemsize = 2 if read == HALF else 1
            builds.append(Build(f"quantised {scheme}", multiply_kernel, arguments, tile, operand_bytes=itemsize))
    return builds
