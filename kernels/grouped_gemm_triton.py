"""The two products of the grouped GEMM as Triton kernels; grouped_gemm.py says what they are and joins them.

From sm_90 on, blocks of aligned operands are fetched by hardware (tensor descriptors), which also gives zeros outside a
tensor; elsewhere by pointers. Two rules keep the inner loops lean (ahead_of_time.py shows what they cost): rows past
the end of a group are clamped, not masked, in `multiply`, where they reach only rows that nobody stores; in `outer`,
where they would be added up, whole blocks of rows go without a mask and the group's last one has a step of its own.

Legend: R rows, E experts, K inner width, N output width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from expertmesh.kernels.tiles import (
    SM_80,
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
from expertmesh.kernels.tuned_tiles import product_of, tile_of

GROUP = tl.constexpr(8)  # tiles of rows that share a block of weights in the cache


@triton.jit
def dot(a, b, acc, WIDEN: tl.constexpr):
    # Triton's interpreter (3.9) multiplies bfloat16 operands as the integers of their bits, so there they are widened
    # first: the same arithmetic, since a product of two bfloat16 numbers is exact in float32.
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def multiply_kernel(
    rows,  # [R, K] float32 or bfloat16: pointer, contiguous; or descriptor of blocks [BLOCK_R, BLOCK_K]
    weights,  # [E, N, K] dtype of rows: pointer, any strides; or descriptor of [1, BLOCK_N, BLOCK_K] or its transpose
    table_ptr,  # [tiles, 3] int32
    out_ptr,  # [R, N] dtype of rows, contiguous, output
    tiles,
    N,
    K,
    stride_e,
    stride_n,
    stride_k,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # weights lie as [E, K, N]
    EVEN: tl.constexpr,  # N and K are multiples of their blocks
    WIDEN: tl.constexpr,
):
    tile, block = swizzle(tl.program_id(0), tiles, tl.cdiv(N, BLOCK_N), GROUP)
    expert = tl.load(table_ptr + tile * 3)
    if expert < 0:
        return
    first_row = tl.load(table_ptr + tile * 3 + 1)
    row_end = tl.load(table_ptr + tile * 3 + 2)
    r = first_row + tl.arange(0, BLOCK_R)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    if DESCRIPTORS:
        for k in range(0, K, BLOCK_K):
            a = rows.load([first_row, k])
            if TRANSPOSED:
                b = weights.load([expert, k, block * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
            else:
                b = weights.load([expert, block * BLOCK_N, k]).reshape(BLOCK_N, BLOCK_K).T
            acc = dot(a, b, acc, WIDEN)
    else:
        # int64: R*K and E*N*K pass 2^31 in real models. Columns are masked and not clamped: n would no longer be known
        # to be consecutive, and transposed weights would load one number at a time.
        k = tl.arange(0, BLOCK_K)
        row_ptrs = rows + tl.minimum(r, row_end - 1).to(tl.int64)[:, None] * K + k[None, :]
        weight_ptrs = weights + expert.to(tl.int64) * stride_e + n[None, :].to(tl.int64) * stride_n
        weight_ptrs += k[:, None].to(tl.int64) * stride_k
        for k_start in range(0, K, BLOCK_K):
            if EVEN:
                a = tl.load(row_ptrs)
                b = tl.load(weight_ptrs)
            else:
                inside = k < K - k_start
                a = tl.load(row_ptrs, mask=inside[None, :], other=0.0)
                b = tl.load(weight_ptrs, mask=inside[:, None] & (n < N)[None, :], other=0.0)
            acc = dot(a, b, acc, WIDEN)
            row_ptrs += BLOCK_K
            weight_ptrs += BLOCK_K * stride_k
    out_ptrs = out_ptr + r[:, None].to(tl.int64) * N + n[None, :]
    stored = (r < row_end)[:, None]
    if not EVEN:
        stored = stored & (n < N)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _gathered(right_ptr, offsets_ptr, r, row_end, k, K_MULTIPLE: tl.constexpr, MASKED: tl.constexpr):
    """Pointers to rows of right that lie anywhere: [BLOCK_R, BLOCK_K]."""
    # Rows times K are multiplied beforehand: four products of 64 bits a step and thread were 16 of its instructions.
    # Without the hint that they are products nothing wider than a number would be loaded.
    offsets = tl.load(offsets_ptr + r, mask=r < row_end, other=0) if MASKED else tl.load(offsets_ptr + r)
    return (right_ptr + k)[None, :] + tl.multiple_of(offsets, K_MULTIPLE)[:, None]


@triton.jit
def _outer_block(
    left_ptr, right_ptr, offsets_ptr, r, n, k, row_end, N, K, GATHERED: tl.constexpr, MASKED: tl.constexpr,
    EVEN: tl.constexpr, K_MULTIPLE: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows of both operands, by pointer: [BLOCK_N, BLOCK_R] and [BLOCK_R, BLOCK_K]."""
    inside_r = (r < row_end) if MASKED else (r >= 0)
    inside_n, inside_k = inside_r[None, :], inside_r[:, None]
    if not EVEN:
        inside_n = inside_n & (n < N)[:, None]
        inside_k = inside_k & (k < K)[None, :]
    left_ptrs = left_ptr + r[None, :].to(tl.int64) * N + n[:, None]
    if GATHERED:
        right_ptrs = _gathered(right_ptr, offsets_ptr, r, row_end, k, K_MULTIPLE, MASKED)
    else:
        right_ptrs = right_ptr + r[:, None].to(tl.int64) * K + k[None, :]
    if MASKED or not EVEN:
        # Both sides: the rows past the end are another expert's, and 0 times an infinity there is NaN.
        return tl.load(left_ptrs, mask=inside_n, other=0.0), tl.load(right_ptrs, mask=inside_k, other=0.0)
    return tl.load(left_ptrs), tl.load(right_ptrs)


@triton.jit
def outer_kernel(
    left,  # descriptor of left_ptr in blocks [BLOCK_R, BLOCK_N]; unused without DESCRIPTORS
    right,  # descriptor of right_ptr in blocks [BLOCK_R, BLOCK_K]; unused without DESCRIPTORS or if GATHERED
    left_ptr,  # [R, N] float32 or bfloat16, contiguous
    right_ptr,  # [R, K], or [X, K] if GATHERED, dtype of left, contiguous
    offsets_ptr,  # [R] int64 where each row begins in right: K times its number there; unused without GATHERED
    starts_ptr,  # [E + 1] int32
    out_ptr,  # [E, N, K] dtype of left, contiguous, output
    N,
    K,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    GATHERED: tl.constexpr,
    EVEN: tl.constexpr,  # N and K are multiples of their blocks
    K_MULTIPLE: tl.constexpr,  # a power of two that K is a multiple of
    WIDEN: tl.constexpr,
):
    # A matrix instruction is 64 rows tall and up to 256 columns wide, so the narrower side is its rows.
    TRANSPOSED: tl.constexpr = BLOCK_N > BLOCK_K
    n_block, k_block = swizzle(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), GROUP)
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    expert = tl.program_id(1)
    row_start = tl.load(starts_ptr + expert)
    row_end = tl.load(starts_ptr + expert + 1)
    whole_end = row_start + (row_end - row_start) // BLOCK_R * BLOCK_R
    if TRANSPOSED:
        acc = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for row in range(row_start, whole_end, BLOCK_R):
        r = row + tl.arange(0, BLOCK_R)
        if DESCRIPTORS:
            a = left.load([row, n_block * BLOCK_N]).T
            if GATHERED:
                right_ptrs = _gathered(right_ptr, offsets_ptr, r, row_end, k, K_MULTIPLE, False)
                b = tl.load(right_ptrs) if EVEN else tl.load(right_ptrs, mask=(k < K)[None, :], other=0.0)
            else:
                b = right.load([row, k_block * BLOCK_K])
        else:
            a, b = _outer_block(
                left_ptr, right_ptr, offsets_ptr, r, n, k, row_end, N, K, GATHERED, False, EVEN, K_MULTIPLE
            )
        acc = dot(b.T, a.T, acc, WIDEN) if TRANSPOSED else dot(a, b, acc, WIDEN)
    if whole_end < row_end:
        r = whole_end + tl.arange(0, BLOCK_R)
        a, b = _outer_block(left_ptr, right_ptr, offsets_ptr, r, n, k, row_end, N, K, GATHERED, True, EVEN, K_MULTIPLE)
        acc = dot(b.T, a.T, acc, WIDEN) if TRANSPOSED else dot(a, b, acc, WIDEN)
    if TRANSPOSED:
        acc = acc.T
    # No rows, no steps: the zeros are written like any other result.
    out_ptrs = out_ptr + expert.to(tl.int64) * N * K + n[:, None].to(tl.int64) * K + k[None, :]
    if EVEN:
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty))
    else:
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


def multiply(
    rows_RK: torch.Tensor, weights_ENK: torch.Tensor, counts_E: torch.Tensor, tile: Tile | None = None
) -> torch.Tensor:
    """[R, N]: row r of expert e times weights[e] transposed. `tile` None: by the table of tuned tiles, or by rule."""
    rows_RK = rows_RK.contiguous()
    (R, K), (E, N, _) = rows_RK.shape, weights_ENK.shape
    out_RN = rows_RK.new_empty(R, N)
    if R == 0:
        return out_RN
    chip = chip_of(rows_RK)
    tile = tile or tile_of(
        product_of("multiply", rows_RK, R, E, N, K), choose_tile(R, E, N, rows_RK.element_size(), chip)
    )
    table_T3 = tile_table(counts_E, R, tile.rows).table_T3
    transposed = weights_ENK.stride(1) == 1 and weights_ENK.stride(2) != 1
    stored = weights_ENK.transpose(1, 2) if transposed else weights_ENK
    descriptors = describable(chip, rows_RK, stored)
    rows, weights = rows_RK, weights_ENK
    if descriptors:
        rows = TensorDescriptor.from_tensor(rows_RK, [tile.rows, tile.depth])
        block = [tile.depth, tile.columns] if transposed else [tile.columns, tile.depth]
        weights = TensorDescriptor.from_tensor(stored, [1, *block])
    multiply_kernel[(len(table_T3) * triton.cdiv(N, tile.columns),)](
        *(rows, weights, table_T3, out_RN, len(table_T3), N, K, *weights_ENK.stride()),
        BLOCK_R=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        DESCRIPTORS=descriptors,
        TRANSPOSED=transposed,
        EVEN=N % tile.columns == 0 and K % tile.depth == 0,
        WIDEN=not rows_RK.is_cuda,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out_RN


def outer(
    left_RN: torch.Tensor,
    right: torch.Tensor,
    counts_E: torch.Tensor,
    index_R: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """[E, N, K]: sum over an expert's rows of their outer products; 0 for no rows.

    right: [R, K]; with `index_R` [X, K], and row r is right[index_R[r]].
    """
    left_RN, right = left_RN.contiguous(), right.contiguous()
    (R, N), K, E = left_RN.shape, right.shape[1], counts_E.numel()
    out_ENK = left_RN.new_empty(E, N, K)
    chip, gathered = chip_of(left_RN), index_R is not None
    kernel = "outer gathered" if gathered else "outer"
    tile = tile or tile_of(product_of(kernel, left_RN, R, E, N, K), outer_tile(left_RN.element_size(), chip, gathered))
    starts_E1 = tile_table(counts_E, R, tile.depth).starts_E1
    descriptors = describable(chip, left_RN, *([] if gathered else [right]))
    offsets_R = index_R * K if index_R is not None else None
    left_blocks = right_blocks = None
    if descriptors:
        left_blocks = TensorDescriptor.from_tensor(left_RN, [tile.depth, tile.rows])
        right_blocks = None if gathered else TensorDescriptor.from_tensor(right, [tile.depth, tile.columns])
    outer_kernel[(triton.cdiv(N, tile.rows) * triton.cdiv(K, tile.columns), E)](
        *(left_blocks, right_blocks, left_RN, right, offsets_R, starts_E1, out_ENK, N, K),
        BLOCK_R=tile.depth,
        BLOCK_N=tile.rows,
        BLOCK_K=tile.columns,
        DESCRIPTORS=descriptors,
        GATHERED=gathered,
        EVEN=N % tile.rows == 0 and K % tile.columns == 0,
        K_MULTIPLE=math.gcd(K, 16),
        WIDEN=not left_RN.is_cuda,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out_ENK


def outer_tile(itemsize: int, chip: Chip, gathered: bool) -> Tile:
    """The tile of `outer`: `rows` and `columns` of the weights' gradient, `depth` rows of the operands a step.

    A gathered operand costs instructions by its width and two stages for its offsets, so it is the narrow one.
    """
    depth = 128 // itemsize
    if chip.shared_bytes < SM_80.shared_bytes:
        return Tile(128, 128, depth // 2, 8, 2)
    if not chip.descriptors or itemsize != 2:
        return Tile(128, 128, depth, 8, 5 if gathered else 3)
    return Tile(256, 128, depth, 8, 5) if gathered else Tile(128, 256, depth, 8, 4)


def shipped(chip: Chip) -> list[Build]:
    """The kernels as bfloat16 models whose sizes are multiples of the tiles run them."""
    builds = []
    for height, columns in ((16, 4096), (64, 4096), (128, 128), (128, 4096)):
        tile = choose_tile(height, 1, columns, 2, chip)
        if columns == 128 and tile == choose_tile(height, 1, 4096, 2, chip):  # as wide as it gets on this chip
            continue
        for transposed in (False, True):
            block = (tile.depth, tile.columns) if transposed else (tile.columns, tile.depth)
            arguments: dict[str, Any] = {
                "rows": descriptor_type("bf16", tile.rows, tile.depth) if chip.descriptors else "*bf16:16",
                "weights": descriptor_type("bf16", 1, *block) if chip.descriptors else "*bf16:16",
                "table_ptr": "*i32:16",
                "out_ptr": "*bf16:16",
                "tiles": "i32",
                **dict.fromkeys(("N", "K", "stride_e"), "i32:16"),
                "stride_n": 1 if transposed else "i32:16",
                "stride_k": "i32:16" if transposed else 1,
                **{"BLOCK_R": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth},
                **{"DESCRIPTORS": chip.descriptors, "TRANSPOSED": transposed, "EVEN": True, "WIDEN": False},
            }
            name = "multiply transposed" if transposed else "multiply"
            builds.append(Build(name, multiply_kernel, arguments, tile))
    for gathered in (False, True):
        tile = outer_tile(2, chip, gathered)
        descriptors = chip.descriptors
        operands: dict[str, Any] = {
            "left": descriptor_type("bf16", tile.depth, tile.rows) if descriptors else None,
            "right": descriptor_type("bf16", tile.depth, tile.columns) if descriptors and not gathered else None,
            **dict.fromkeys(("left_ptr", "right_ptr", "out_ptr"), "*bf16:16"),
            "offsets_ptr": "*i64:16" if gathered else None,
            "starts_ptr": "*i32:16",
            **dict.fromkeys(("N", "K"), "i32:16"),
            **{"BLOCK_R": tile.depth, "BLOCK_N": tile.rows, "BLOCK_K": tile.columns},
            **{"DESCRIPTORS": descriptors, "GATHERED": gathered, "EVEN": True, "K_MULTIPLE": 16, "WIDEN": False},
        }
        builds.append(Build("outer gathered" if gathered else "outer", outer_kernel, operands, tile))
    return builds
