"""One matrix product per expert, of quantised rows with quantised weights; for inference, so without gradients.

    out_RN[r]  =  scales x values of row r, times scales x values of its expert's weights, transposed

CUDA tensors run a Triton kernel on the bytes (quantised_gemm_triton.py). On the CPU, which has no product of bytes with
such scales, the weights of each expert that has rows are made float32 for the call, and thrown away after: the memory
that quantised weights save stays saved, and a call pays for it by the weights it reads. Both add up in float32.

Legend: X source rows, R rows sorted by expert, E experts, K inner width, N output width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from expertmesh.kernels import quantised_gemm_triton
from expertmesh.kernels.device import by_triton
from expertmesh.kernels.ops import operation
from expertmesh.kernels.quantise import (
    QuantisedBlocks,
    QuantisedRows,
    dequantise_rows,
    quantise_blocks,
    quantise_rows,
)
from expertmesh.kernels.quantised_weights import QuantisedWeights, dequantise_expert
from expertmesh.kernels.scheme import Scheme

AnyRows = QuantisedRows | QuantisedBlocks


def rows_for(scheme: Scheme) -> Callable[[torch.Tensor], AnyRows]:
    """How the rows are quantised that meet weights of `scheme`."""
    return quantise_blocks if scheme == Scheme.FP8_BLOCK else quantise_rows


def _multiply_segments(
    rows: AnyRows,
    index_R: torch.Tensor | None,
    counts_E: torch.Tensor,
    weights: QuantisedWeights,
    dtype: torch.dtype,
) -> torch.Tensor:
    wide_XK = dequantise_rows(rows, torch.float32)
    rows_RK = wide_XK if index_R is None else wide_XK.index_select(0, index_R)
    out_RN = rows_RK.new_empty(len(rows_RK), weights.values.shape[1])
    counts = counts_E.tolist()
    if sum(counts) != len(rows_RK):
        raise ValueError(f"counts_E add up to {sum(counts)}, but there are {len(rows_RK)} rows")
    for expert, (group_RK, out) in enumerate(zip(rows_RK.split(counts), out_RN.split(counts), strict=True)):
        if len(group_RK):
            torch.mm(group_RK, dequantise_expert(weights, expert).t(), out=out)
    return out_RN.to(dtype)


def _fake_multiply(rows_XK, row_scales, index_R, counts_E, scheme, values_ENK, scales, factors_EP, parts, width, dtype):
    return rows_XK.new_empty(len(rows_XK if index_R is None else index_R), values_ENK.shape[1], dtype=dtype)


@operation(
    "quantised_multiply(Tensor rows, Tensor row_scales, Tensor? index, Tensor counts, str scheme, Tensor values,"
    " Tensor scales, Tensor? factors, int parts, SymInt width, ScalarType dtype) -> Tensor",
    _fake_multiply,
)
def _multiply(rows_XK, row_scales, index_R, counts_E, scheme, values_ENK, scales, factors_EP, parts, width, dtype):
    weights = QuantisedWeights(Scheme(scheme), values_ENK, scales, factors_EP, parts, width)
    rows = (QuantisedBlocks if weights.scheme == Scheme.FP8_BLOCK else QuantisedRows)(rows_XK, row_scales)
    multiply = quantised_gemm_triton.multiply if by_triton(rows_XK) else _multiply_segments
    return multiply(rows, index_R, counts_E, weights, dtype)


def quantised_gemm(
    rows: AnyRows,
    index_R: torch.Tensor | None,
    counts_E: torch.Tensor,
    weights: QuantisedWeights,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply each row with its expert's weights.

    Args:
        rows: X rows of width K, quantised as `rows_for` the weights' scheme says.
        index_R: [R] int64, row r is rows[index[r]], sorted by expert. None: rows are sorted themselves, R = X.
        counts_E: [E] int64 rows of each expert, on the rows' device, adding up to R.
        weights: of E experts, [N, K] each.
        dtype: of the result, float32 or bfloat16.

    Returns:
        [R, N], accumulated in float32 and rounded once.

    Raises:
        ValueError: if rows and weights do not fit, or, on the CPU, the counts do not add up to R.
    """
    _check(rows, counts_E, weights)
    scheme, *stored, parts, width = weights
    return _multiply(*rows, index_R, counts_E, scheme, *stored, parts, width, dtype)


def _check(rows: AnyRows, counts_E: torch.Tensor, weights: QuantisedWeights) -> None:
    by_block = isinstance(rows, QuantisedBlocks)
    if by_block != (weights.scheme == Scheme.FP8_BLOCK):
        raise ValueError(f"rows with a scale a {'block' if by_block else 'row'} do not fit weights of {weights.scheme}")
    if rows[0].shape[1] != weights.width or counts_E.shape != weights.values.shape[:1]:
        raise ValueError(
            f"rows [X, K], counts [E] and weights [E, N, K] do not fit: {tuple(rows[0].shape)}, "
            f"{tuple(counts_E.shape)}, {(*weights.values.shape[:2], weights.width)}"
        )


def quantised_gemm_ref(
    rows: AnyRows,
    index_R: torch.Tensor | None,
    counts_E: torch.Tensor,
    weights: QuantisedWeights,
) -> torch.Tensor:
    """The definition of `quantised_gemm`, in float64."""
    wide_XK = dequantise_rows(rows, torch.float64)
    rows_RK = wide_XK if index_R is None else wide_XK[index_R]
    groups = enumerate(rows_RK.split(counts_E.tolist()))
    return torch.cat([group_RK @ dequantise_expert(weights, expert).double().t() for expert, group_RK in groups])
