"""One matrix product per expert over rows sorted by expert, without padding the groups to one size.

Rows of an expert lie together; `counts_E` says how many each expert has, and an expert may have none:

    rows_RK      e0 e0 e0 | e2 e2 e2 e2 e2       counts_E = [3, 0, 5]
    out_RN[r]  = weights_ENK[expert of row r] @ rows_RK[r]

Two primitives carry forward and backward: `multiply` (the output, and with transposed weights the gradient of the rows)
and `outer` (the gradient of the weights). CUDA tensors run Triton kernels (grouped_gemm_triton.py); CPU tensors one
`torch.mm` per expert. Both accumulate in float32 (float64 for float64 on the CPU) in a fixed order and without atomics,
so a repeated call gives the same bits.

Legend: R rows, E experts, K inner width, N output width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from expertmesh.kernels import grouped_gemm_triton as kernels
from expertmesh.kernels import grouped_gemv_triton
from expertmesh.kernels.device import by_triton
from expertmesh.kernels.float32_products import products_of
from expertmesh.kernels.ops import operation


class Products(NamedTuple):
    """The two products of a device; neither is differentiable by itself."""

    multiply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """(rows_RK, weights_ENK, counts_E) -> rows_RN: row r of expert e times weights[e] transposed."""
    outer: Callable[..., torch.Tensor]
    """(rows_RN, rows_RK, counts_E) -> [E, N, K]: sum over an expert's rows of their outer products; 0 for no rows.
    With a fourth argument, index_R, the rows on the right are rows_RK[index_R]."""


def segments(counts_E: torch.Tensor, rows: int) -> tuple[list[int], list[int]]:
    """The experts that have rows, and how many; on the CPU reading the counts costs nothing."""
    counts = counts_E.tolist()
    if sum(counts) != rows:
        raise ValueError(f"counts_E add up to {sum(counts)}, but there are {rows} rows")
    return [expert for expert, count in enumerate(counts) if count], [count for count in counts if count]


def _multiply_segments(rows_RK: torch.Tensor, weights_ENK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    experts, sizes = segments(counts_E, rows_RK.shape[0])
    out_RN = rows_RK.new_empty(rows_RK.shape[0], weights_ENK.shape[1])
    with products_of(rows_RK.dtype):
        for expert, rows_nK, out_nN in zip(experts, rows_RK.split(sizes), out_RN.split(sizes), strict=True):
            torch.mm(rows_nK, weights_ENK.select(0, expert).t(), out=out_nN)
    return out_RN


def _outer_segments(
    left_RN: torch.Tensor, right: torch.Tensor, counts_E: torch.Tensor, index_R: torch.Tensor | None = None
) -> torch.Tensor:
    experts, sizes = segments(counts_E, left_RN.shape[0])
    out_ENK = left_RN.new_empty(counts_E.numel(), left_RN.shape[1], right.shape[1])
    rights = (right if index_R is None else index_R).split(sizes)
    with products_of(left_RN.dtype):
        for expert, left_nN, right_n in zip(experts, left_RN.split(sizes), rights, strict=True):
            right_nK = right_n if index_R is None else right.index_select(0, right_n)
            torch.mm(left_nN.t(), right_nK, out=out_ENK[expert])
    zero_others(out_ENK, experts)
    return out_ENK


def zero_others(gradient_E: torch.Tensor, experts: list[int]) -> None:
    """Write 0 for the experts that are not listed."""
    for expert in set(range(len(gradient_E))).difference(experts):
        gradient_E[expert].zero_()


TRITON = Products(grouped_gemv_triton.multiply, kernels.outer)
SEGMENTS = Products(_multiply_segments, _outer_segments)


def products_for(rows: torch.Tensor) -> Products:
    """The products that run where `rows` lie: Triton on CUDA, one torch.mm per expert elsewhere."""
    return TRITON if by_triton(rows) else SEGMENTS


def _fake_multiply(rows_RK: torch.Tensor, weights_ENK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    return rows_RK.new_empty(rows_RK.shape[0], weights_ENK.shape[1])


@operation("multiply(Tensor rows, Tensor weights, Tensor counts) -> Tensor", _fake_multiply)
def _multiply(rows_RK: torch.Tensor, weights_ENK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    return products_for(rows_RK).multiply(rows_RK, weights_ENK, counts_E)


def _fake_outer(
    left_RN: torch.Tensor, right: torch.Tensor, counts_E: torch.Tensor, index_R: torch.Tensor | None = None
) -> torch.Tensor:
    return left_RN.new_empty(counts_E.shape[0], left_RN.shape[1], right.shape[1])


@operation("outer(Tensor left, Tensor right, Tensor counts, Tensor? index=None) -> Tensor", _fake_outer)
def _outer(
    left_RN: torch.Tensor, right: torch.Tensor, counts_E: torch.Tensor, index_R: torch.Tensor | None = None
) -> torch.Tensor:
    return products_for(left_RN).outer(left_RN, right, counts_E, index_R)


PRODUCTS = Products(_multiply, _outer)
"""By device, as operations of torch."""


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
    return _apply(rows_RK, weights_ENK, counts_E, PRODUCTS)


def grouped_gemm_triton(rows_RK: torch.Tensor, weights_ENK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """`grouped_gemm` by the Triton kernels whatever the device: on CPU tensors it needs TRITON_INTERPRET=1."""
    return _apply(rows_RK, weights_ENK, counts_E, TRITON)


def grouped_gemm_ref(rows_RK: torch.Tensor, weights_ENK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """The definition of `grouped_gemm`, by plain autograd."""
    groups = zip(rows_RK.split(counts_E.tolist()), weights_ENK.unbind(0), strict=True)
    return torch.cat([group_RK @ weights_NK.t() for group_RK, weights_NK in groups])
