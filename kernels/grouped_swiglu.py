"""The FFN experts: down(w silu(gate) up) of each row by its own expert's weights, as one autograd Function.

    source_XD --index--> rows --gate_up[e]--> h_RG = [gate | up] --> a_RF = w silu(gate) up --down[e]--> rows_RD

Rows are read where they lie: row r is source[index[r]], tokens in one process, arrived rows after an all-to-all; nobody
makes a sorted copy. The gate weight w of a row (SonicMoE, arXiv 2512.14080) is put on the hidden units, so that its
gradient comes from what the backward computes anyway, sum_f a da, and the experts' outputs need not be kept.

Written out by hand because autograd would keep the rows, h, silu(gate), the product a and the outputs. Here the source
and h are kept, and the rest is computed again: per row 2F numbers and a share of D, in place of 2D + 4F.

Legend: X source rows, R rows sorted by expert, E experts, D model width, F hidden width, G = 2F.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from expertmesh.kernels import grouped_gemv_triton, grouped_swiglu_triton
from expertmesh.kernels.device import by_triton
from expertmesh.kernels.grouped_gemm import PRODUCTS, SEGMENTS, check_groups, grouped_gemm_ref
from expertmesh.kernels.grouped_swiglu_triton import Hidden, Up
from expertmesh.kernels.ops import operation
from expertmesh.kernels.rows import sum_rows


class Steps(NamedTuple):
    """What a device does at the hidden units; the plain products around it are the grouped GEMM's."""

    up: Callable[..., Up]
    """(source_XD, index_R, counts_E, gate_up_EGD, weights_R, saved) -> h where `saved`, and a."""
    hidden: Callable[..., Hidden]
    """(grad_RD, h_RG, counts_E, down_EDF, weights_R, kept) -> gradient of h, a where `kept`, gradient of weights."""


def _activate(h_RG: torch.Tensor) -> torch.Tensor:
    gate_RF, up_RF = h_RG.chunk(2, dim=-1)
    return functional.silu(gate_RF).mul_(up_RF)


def _up_segments(
    source_XD: torch.Tensor,
    index_R: torch.Tensor | None,
    counts_E: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    weights_R: torch.Tensor | None,
    saved: bool,
) -> Up:
    rows_RD = source_XD if index_R is None else source_XD.index_select(0, index_R)
    h_RG = SEGMENTS.multiply(rows_RD, gate_up_EGD, counts_E)
    a_RF = _activate(h_RG)
    if weights_R is not None:
        a_RF.mul_(weights_R[:, None])
    return Up(h_RG if saved else None, a_RF)


def _hidden_segments(
    grad_RD: torch.Tensor,
    h_RG: torch.Tensor,
    counts_E: torch.Tensor,
    down_EDF: torch.Tensor,
    weights_R: torch.Tensor | None,
    kept: bool,
) -> Hidden:
    grad_a_RF = SEGMENTS.multiply(grad_RD, down_EDF.transpose(1, 2), counts_E)
    grad_weights = None
    a_RF = _activate(h_RG) if kept or weights_R is not None else None
    if weights_R is not None:
        assert a_RF is not None
        grad_weights = (a_RF.to(weights_R.dtype) * grad_a_RF).sum(1)
        a_RF.mul_(weights_R[:, None])
        grad_a_RF.mul_(weights_R[:, None])
    gate_RF, up_RF = h_RG.chunk(2, dim=-1)
    grad_h_RG = torch.empty_like(h_RG)
    grad_gate_RF, grad_up_RF = grad_h_RG.chunk(2, dim=-1)
    torch.mul(grad_a_RF, functional.silu(gate_RF), out=grad_up_RF)
    torch.ops.aten.silu_backward.grad_input(grad_a_RF.mul_(up_RF), gate_RF, grad_input=grad_gate_RF)
    return Hidden(grad_h_RG, a_RF, grad_weights)


BY_SEGMENTS = Steps(_up_segments, _hidden_segments)
BY_TRITON = Steps(grouped_gemv_triton.up, grouped_swiglu_triton.hidden)


def steps_for(rows: torch.Tensor) -> Steps:
    """The steps that run where `rows` lie: Triton on CUDA, one torch.mm per expert elsewhere."""
    return BY_TRITON if by_triton(rows) else BY_SEGMENTS


def _fake_up(source_XD, index_R, counts_E, gate_up_EGD, weights_R, saved):
    R, G = len(source_XD if index_R is None else index_R), gate_up_EGD.shape[1]
    return source_XD.new_empty(R if saved else 0, G), source_XD.new_empty(R, G // 2)


@operation(
    "swiglu_up(Tensor source, Tensor? index, Tensor counts, Tensor gate_up, Tensor? weights, bool saved)"
    " -> (Tensor, Tensor)",
    _fake_up,
)
def _up(source_XD, index_R, counts_E, gate_up_EGD, weights_R, saved):
    h_RG, a_RF = steps_for(source_XD).up(source_XD, index_R, counts_E, gate_up_EGD, weights_R, saved)
    return source_XD.new_empty(0, gate_up_EGD.shape[1]) if h_RG is None else h_RG, a_RF


def _fake_hidden(grad_RD, h_RG, counts_E, down_EDF, weights_R, kept):
    R, G = h_RG.shape
    grad_weights = h_RG.new_empty(0) if weights_R is None else torch.empty_like(weights_R)
    return torch.empty_like(h_RG), h_RG.new_empty(R if kept else 0, G // 2), grad_weights


@operation(
    "swiglu_hidden(Tensor grad, Tensor h, Tensor counts, Tensor down, Tensor? weights, bool kept)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_hidden,
)
def _hidden(grad_RD, h_RG, counts_E, down_EDF, weights_R, kept):
    grad_h_RG, a_RF, grad_weights = steps_for(h_RG).hidden(grad_RD, h_RG, counts_E, down_EDF, weights_R, kept)
    return (
        grad_h_RG,
        h_RG.new_empty(0, down_EDF.shape[2]) if a_RF is None or not kept else a_RF,
        h_RG.new_empty(0) if grad_weights is None else grad_weights,
    )


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source_XD, index_R, counts_E, gate_up_EGD, down_EDF, weights_R):
        saved = any(ctx.needs_input_grad)
        h_RG, a_RF = _up(source_XD, index_R, counts_E, gate_up_EGD, weights_R, saved)
        if saved:
            source = source_XD if ctx.needs_input_grad[3] else None
            ctx.save_for_backward(source, index_R, counts_E, gate_up_EGD, down_EDF, weights_R, h_RG)
            ctx.sources = len(source_XD)
        return PRODUCTS.multiply(a_RF, down_EDF, counts_E)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD):
        source_XD, index_R, counts_E, gate_up_EGD, down_EDF, weights_R, h_RG = ctx.saved_tensors
        multiply, outer = PRODUCTS
        needs_source, _, _, needs_gate_up, needs_down, needs_weights = ctx.needs_input_grad
        grad_source = grad_gate_up = grad_down = None
        grad_h_RG, a_RF, grad_weights = _hidden(grad_RD, h_RG, counts_E, down_EDF, weights_R, needs_down)
        if needs_down:
            grad_down = outer(grad_RD, a_RF, counts_E)
        if needs_gate_up:
            grad_gate_up = outer(grad_h_RG, source_XD, counts_E, index_R)
        if needs_source:
            grad_source = multiply(grad_h_RG, gate_up_EGD.transpose(1, 2), counts_E)
            if index_R is not None:
                grad_source = sum_rows(grad_source, index_R, ctx.sources)
        return grad_source, None, None, grad_gate_up, grad_down, grad_weights if needs_weights else None


def _check(source_XD: torch.Tensor, counts_E: torch.Tensor, gate_up_EGD: torch.Tensor, down_EDF: torch.Tensor) -> None:
    check_groups(source_XD, gate_up_EGD, counts_E)
    E, G, D = gate_up_EGD.shape
    if G % 2 or down_EDF.shape != (E, D, G // 2) or down_EDF.dtype != gate_up_EGD.dtype:
        described = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (gate_up_EGD, down_EDF))
        raise ValueError(f"gate_up [E, 2F, D] and down [E, D, F] do not fit: {described}")


def grouped_swiglu(
    source_XD: torch.Tensor,
    index_R: torch.Tensor | None,
    counts_E: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
    weights_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run each row through its expert's SwiGLU (Shazeer, arXiv 2002.05202); differentiable in all but index and counts.

    Args:
        source_XD: [X, D] what the rows are read from; bfloat16 or float32 (the CPU also takes float64).
        index_R: [R] int64, row r is source[index[r]]; sorted by expert. None: the source is sorted itself, R = X.
        counts_E: [E] int64 rows of each expert, on the source's device, adding up to R.
        gate_up_EGD: [E, 2F, D] in the source's dtype; of the 2F rows the first F are the gate's (Hugging Face).
        down_EDF: [E, D, F] in the source's dtype.
        weights_R: [R] float32 (float64 for float64) factor of each row's answer; None: 1.

    Returns:
        [R, D] in the source's dtype. Products accumulate in float32; h and a are rounded to the source's dtype. A
        source row that several rows read gets the sum of their gradients, in a fixed order.

    Raises:
        ValueError: if shapes or dtypes do not fit, or, on the CPU, the counts do not add up to R.
    """
    _check(source_XD, counts_E, gate_up_EGD, down_EDF)
    return _GroupedSwiGLU.apply(source_XD, index_R, counts_E, gate_up_EGD, down_EDF, weights_R)


def grouped_swiglu_ref(
    source_XD: torch.Tensor,
    index_R: torch.Tensor | None,
    counts_E: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
    weights_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition of `grouped_swiglu`, by plain autograd."""
    rows_RD = source_XD if index_R is None else source_XD[index_R]
    gate_RF, up_RF = grouped_gemm_ref(rows_RD, gate_up_EGD, counts_E).chunk(2, dim=-1)
    out_RD = grouped_gemm_ref(functional.silu(gate_RF) * up_RF, down_EDF, counts_E)
    return out_RD if weights_R is None else weights_R[:, None] * out_RD
