"""One matrix product per expert over rows sorted by expert, without padding the groups to one size.

Rows of an expert lie together; `counts_E` says how many each expert has, and an expert may have none:

    rows_RK      e0 e0 e0 | e2 e2 e2 e2 e2       counts_E = [3, 0, 5]
    out_RN[r]  = weights_ENK[expert of row r] @ rows_RK[r]

Two primitives carry forward and backward: `multiply` (the output, and with transposed weights the gradient of the rows)
and `outer` (the gradient of the weights). CUDA tensors run Triton kernels; CPU tensors run one `torch.mm` per expert.
Both accumulate in float32 (float64 for float64 on the CPU) in a fixed order and without atomics, so a repeated call
gives the same bits.

Legend: R rows, E experts, K inner width, N output width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable


class Products(NamedTuple):
    """The two products of a device; neither is differentiable by itself."""

    multiply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """(rows_RK, weights_ENK, counts_E) -> rows_RN: row r of expert e times weights[e] transposed."""
    outer: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """(rows_RN, rows_RK, counts_E) -> [E, N, K]: sum over an expert's rows of their outer products; 0 for no rows."""


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr):
    # Triton's interpreter (3.9) multiplies bfloat16 operands as the integers of their bits, so there they are widened
    # first: the same arithmetic, since a product of two bfloat16 numbers is exact in float32.
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _multiply_kernel(
    rows_ptr,  # [R, K] float32 or bfloat16, contiguous
    weights_ptr,  # [E, N, K] dtype of rows, any strides
    tile_experts_ptr,  # [tiles] int64, E marks an unused tile
    tile_rows_ptr,  # [tiles] int64, first row of the tile
    row_ends_ptr,  # [E] int64, one past the last row of the expert
    out_ptr,  # [R, N] dtype of rows, contiguous, output
    E,
    N,
    K,
    stride_e,
    stride_n,
    stride_k,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    tile = tl.program_id(0)
    expert = tl.load(tile_experts_ptr + tile)
    if expert >= E:
        return
    row_end = tl.load(row_ends_ptr + expert)
    # int64 since the table is: R*K and E*N*K pass 2^31 in real models.
    r = tl.load(tile_rows_ptr + tile) + tl.arange(0, BLOCK_R)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows past the end repeat the last one and are not stored. Columns are masked instead: clamped, n would no longer
    # be known to be consecutive, and transposed weights (the backward) would load one number at a time.
    row_ptrs = rows_ptr + tl.minimum(r, row_end - 1)[:, None] * K + k[None, :]
    weight_ptrs = weights_ptr + expert * stride_e + n[None, :].to(tl.int64) * stride_n
    weight_ptrs += k[:, None].to(tl.int64) * stride_k
    acc = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    for k_start in range(0, K, BLOCK_K):
        inside = k < K - k_start
        a = tl.load(row_ptrs, mask=inside[None, :], other=0.0)
        b = tl.load(weight_ptrs, mask=inside[:, None] & (n < N)[None, :], other=0.0)
        acc = _dot(a, b, acc, WIDEN)
        row_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K * stride_k
    out_ptrs = out_ptr + r[:, None] * N + n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(r < row_end)[:, None] & (n < N)[None, :])


@triton.jit
def _outer_kernel(
    left_ptr,  # [R, N] float32 or bfloat16, contiguous
    right_ptr,  # [R, K] dtype of left, contiguous
    row_starts_ptr,  # [E] int64
    row_ends_ptr,  # [E] int64
    out_ptr,  # [E, N, K] dtype of left, contiguous, output
    N,
    K,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    k_blocks = tl.cdiv(K, BLOCK_K)
    n = (tl.program_id(0) // k_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (tl.program_id(0) % k_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    expert = tl.program_id(1).to(tl.int64)
    row_start = tl.load(row_starts_ptr + expert)
    row_end = tl.load(row_ends_ptr + expert)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for block_start in range(row_start, row_end, BLOCK_R):
        r = block_start + tl.arange(0, BLOCK_R)
        inside = r < row_end
        # Both sides are masked: the rows past the end are another expert's, and 0 times an infinity there is NaN.
        a = tl.load(left_ptr + r[None, :] * N + n[:, None], mask=inside[None, :] & (n < N)[:, None], other=0.0)
        b = tl.load(right_ptr + r[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
        acc = _dot(a, b, acc, WIDEN)
    # No rows, no iterations: the zeros are written like any other result.
    out_ptrs = out_ptr + expert * N * K + n[:, None].to(tl.int64) * K + k[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


def _tile_table(counts_E: torch.Tensor, rows: int, block_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut each expert's rows into tiles, on the device: (expert of a tile, its first row, end row of each expert).

    The number of tiles is known only to the device, so the table has the most there can be and marks the unused with E.
    """
    row_ends_E = counts_E.cumsum(0)
    tile_counts_E = (counts_E + block_rows - 1) // block_rows
    tile_ends_E = tile_counts_E.cumsum(0)
    tiles = torch.arange(triton.cdiv(rows, block_rows) + counts_E.numel(), device=counts_E.device)
    experts = torch.searchsorted(tile_ends_E, tiles, right=True)
    known = experts.clamp(max=counts_E.numel() - 1)
    first_rows = (row_ends_E - counts_E)[known] + (tiles - (tile_ends_E - tile_counts_E)[known]) * block_rows
    return experts, first_rows, row_ends_E


def _multiply_triton(rows_RK: torch.Tensor, weights_ENK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    rows_RK = rows_RK.contiguous()
    (R, K), (E, N, _) = rows_RK.shape, weights_ENK.shape
    out_RN = rows_RK.new_empty(R, N)
    if R == 0:
        return out_RN
    # A tile as tall as an average group: taller ones compute rows that nobody has, lower ones read weights more often.
    block_rows = min(128, max(16, triton.next_power_of_2(triton.cdiv(R, E))))
    experts, first_rows, row_ends_E = _tile_table(counts_E, R, block_rows)
    _multiply_kernel[(experts.numel(), triton.cdiv(N, 128))](
        *(rows_RK, weights_ENK, experts, first_rows, row_ends_E, out_RN),
        *(E, N, K, *weights_ENK.stride()),
        BLOCK_R=block_rows,
        BLOCK_N=128,
        BLOCK_K=128 // rows_RK.element_size(),
        WIDEN=not rows_RK.is_cuda,
        num_warps=8 if block_rows == 128 else 4,
    )
    return out_RN


def _outer_triton(left_RN: torch.Tensor, right_RK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    left_RN, right_RK = left_RN.contiguous(), right_RK.contiguous()
    N, K, E = left_RN.shape[1], right_RK.shape[1], counts_E.numel()
    out_ENK = left_RN.new_empty(E, N, K)
    row_ends_E = counts_E.cumsum(0)
    _outer_kernel[(triton.cdiv(N, 128) * triton.cdiv(K, 128), E)](
        *(left_RN, right_RK, row_ends_E - counts_E, row_ends_E, out_ENK, N, K),
        BLOCK_R=128 // left_RN.element_size(),
        BLOCK_N=128,
        BLOCK_K=128,
        WIDEN=not left_RN.is_cuda,
        num_warps=8,
    )
    return out_ENK


def _segments(counts_E: torch.Tensor, rows: int) -> list[tuple[int, slice]]:
    """(expert, its rows) for the experts that have any; on the CPU reading the counts costs nothing."""
    segments, start = [], 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            segments.append((expert, slice(start, start + count)))
        start += count
    if start != rows:
        raise ValueError(f"counts_E add up to {start}, but there are {rows} rows")
    return segments


def _multiply_segments(rows_RK: torch.Tensor, weights_ENK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    out_RN = rows_RK.new_empty(rows_RK.shape[0], weights_ENK.shape[1])
    weights = weights_ENK.unbind(0)
    for expert, segment in _segments(counts_E, rows_RK.shape[0]):
        torch.mm(rows_RK[segment], weights[expert].t(), out=out_RN[segment])
    return out_RN


def _outer_segments(left_RN: torch.Tensor, right_RK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    out_ENK = left_RN.new_empty(counts_E.numel(), left_RN.shape[1], right_RK.shape[1])
    segments = dict(_segments(counts_E, left_RN.shape[0]))
    for expert, out_NK in enumerate(out_ENK.unbind(0)):
        if expert in segments:
            torch.mm(left_RN[segments[expert]].t(), right_RK[segments[expert]], out=out_NK)
        else:
            out_NK.zero_()
    return out_ENK


TRITON = Products(_multiply_triton, _outer_triton)
SEGMENTS = Products(_multiply_segments, _outer_segments)


def products_for(rows: torch.Tensor) -> Products:
    """The products that run where `rows` lie: Triton on CUDA, one torch.mm per expert elsewhere."""
    return TRITON if rows.is_cuda else SEGMENTS


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RK, weights_ENK, counts_E, products):
        ctx.save_for_backward(rows_RK, weights_ENK, counts_E)
        ctx.products = products
        return products.multiply(rows_RK, weights_ENK, counts_E)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RN):
        rows_RK, weights_ENK, counts_E = ctx.saved_tensors
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_rows = ctx.products.multiply(grad_RN, weights_ENK.transpose(1, 2), counts_E)
        if ctx.needs_input_grad[1]:
            grad_weights = ctx.products.outer(grad_RN, rows_RK, counts_E)
        return grad_rows, grad_weights, None, None


def _apply(
    rows_RK: torch.Tensor, weights_ENK: torch.Tensor, counts_E: torch.Tensor, products: Products
) -> torch.Tensor:
    check_groups(rows_RK, weights_ENK, counts_E)
    return _GroupedGemm.apply(rows_RK, weights_ENK, counts_E, products)


def check_groups(rows_RK: torch.Tensor, weights_ENK: torch.Tensor, counts_E: torch.Tensor) -> None:
    """Raise ValueError where the three disagree; looks at shapes and dtypes only, so it never waits for a device."""
    if rows_RK.shape[1] != weights_ENK.shape[2] or counts_E.shape != weights_ENK.shape[:1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (rows_RK, weights_ENK, counts_E))
        raise ValueError(f"rows [R, K], weights [E, N, K] and counts [E] do not fit: {shapes}")
    if rows_RK.dtype != weights_ENK.dtype:
        raise ValueError(f"rows are {rows_RK.dtype} and weights {weights_ENK.dtype}; cast one of them")


def grouped_gemm(rows_RK: torch.Tensor, weights_ENK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Multiply each row with its expert's weights; differentiable in rows and weights.

    Args:
        rows_RK: [R, K] rows sorted by expert; bfloat16 or float32 (the CPU also takes float64).
        weights_ENK: [E, N, K] in the rows' dtype, any strides.
        counts_E: [E] int64 rows of each expert, on the rows' device, adding up to R.

    Returns:
        [R, N] in the rows' dtype. An expert without rows gets a gradient of exact zeros.

    Raises:
        ValueError: if shapes or dtypes do not fit, or, on the CPU, the counts do not add up to R (on a GPU that would
            cost a wait for the device, and the rows left over stay unwritten).
    """
    return _apply(rows_RK, weights_ENK, counts_E, products_for(rows_RK))


def grouped_gemm_triton(rows_RK: torch.Tensor, weights_ENK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """`grouped_gemm` by the Triton kernels whatever the device: on CPU tensors it needs TRITON_INTERPRET=1."""
    return _apply(rows_RK, weights_ENK, counts_E, TRITON)


def grouped_gemm_ref(rows_RK: torch.Tensor, weights_ENK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """The definition of `grouped_gemm`, by plain autograd."""
    groups = zip(rows_RK.split(counts_E.tolist()), weights_ENK.unbind(0), strict=True)
    return torch.cat([group_RK @ weights_NK.t() for group_RK, weights_NK in groups])
