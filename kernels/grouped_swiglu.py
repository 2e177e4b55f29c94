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

from expertmesh.kernels import grouped_gemv_triton, grouped_swiglu_cpu
from expertmesh.kernels import grouped_swiglu_triton as kernels
from expertmesh.kernels.device import by_triton
from expertmesh.kernels.grouped_gemm import TRITON, check_groups, grouped_gemm_ref
from expertmesh.kernels.grouped_swiglu_cpu import Gradients, Wanted
from expertmesh.kernels.ops import operation
from expertmesh.kernels.rows import sum_rows


class Steps(NamedTuple):
    """What a device does; neither is differentiable by itself."""

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    """(source_XD, index_R, counts_E, gate_up_EGD, down_EDF, weights_R, saved) -> the answers, and h where `saved`."""
    backward: Callable[..., Gradients]
    """(grad_RD, source_XD, index_R, counts_E, gate_up_EGD, down_EDF, weights_R, h_RG, X, wanted) -> gradients."""


def _forward_triton(
    source_XD: torch.Tensor,
    index_R: torch.Tensor | None,
    counts_E: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
    weights_R: torch.Tensor | None,
    saved: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    h_RG, a_RF = grouped_gemv_triton.up(source_XD, index_R, counts_E, gate_up_EGD, weights_R, saved)
    return TRITON.multiply(a_RF, down_EDF, counts_E), h_RG


def _backward_triton(
    grad_RD: torch.Tensor,
    source_XD: torch.Tensor | None,
    index_R: torch.Tensor | None,
    counts_E: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
    weights_R: torch.Tensor | None,
    h_RG: torch.Tensor,
    sources: int,
    wanted: Wanted,
) -> Gradients:
    multiply, outer = TRITON
    grad_source = grad_gate_up = grad_down = None
    grad_h_RG, a_RF, grad_weights = kernels.hidden(grad_RD, h_RG, counts_E, down_EDF, weights_R, wanted.down)
    if wanted.down:
        grad_down = outer(grad_RD, a_RF, counts_E)
    if wanted.gate_up:
        grad_gate_up = outer(grad_h_RG, source_XD, counts_E, index_R)
    if wanted.source:
        grad_source = multiply(grad_h_RG, gate_up_EGD.transpose(1, 2), counts_E)
        if index_R is not None:
            grad_source = sum_rows(grad_source, index_R, sources)
    return Gradients(grad_source, grad_gate_up, grad_down, grad_weights if wanted.weights else None)


BY_SEGMENTS = Steps(grouped_swiglu_cpu.forward, grouped_swiglu_cpu.backward)
BY_TRITON = Steps(_forward_triton, _backward_triton)


def steps_for(rows: torch.Tensor) -> Steps:
    """The steps that run where `rows` lie: Triton on CUDA, one expert after the other elsewhere."""
    return BY_TRITON if by_triton(rows) else BY_SEGMENTS


def _fake_forward(source_XD, index_R, counts_E, gate_up_EGD, down_EDF, weights_R, saved):
    R = len(source_XD if index_R is None else index_R)
    return source_XD.new_empty(R, down_EDF.shape[1]), source_XD.new_empty(R if saved else 0, gate_up_EGD.shape[1])


@operation(
    "swiglu_forward(Tensor source, Tensor? index, Tensor counts, Tensor gate_up, Tensor down, Tensor? weights,"
    " bool saved) -> (Tensor, Tensor)",
    _fake_forward,
)
def _forward(source_XD, index_R, counts_E, gate_up_EGD, down_EDF, weights_R, saved):
    steps = steps_for(source_XD)
    out_RD, h_RG = steps.forward(source_XD, index_R, counts_E, gate_up_EGD, down_EDF, weights_R, saved)
    return out_RD, source_XD.new_empty(0, gate_up_EGD.shape[1]) if h_RG is None else h_RG


def _fake_backward(
    grad_RD, source_XD, index_R, counts_E, gate_up_EGD, down_EDF, weights_R, h_RG, sources, wanted
) -> list[torch.Tensor]:
    empty, wanted = h_RG.new_empty, Wanted(*wanted)
    return [
        empty(sources, down_EDF.shape[1]) if wanted.source else empty(0),
        empty(gate_up_EGD.shape) if wanted.gate_up else empty(0),
        empty(down_EDF.shape) if wanted.down else empty(0),
        torch.empty_like(weights_R) if wanted.weights else empty(0),
    ]


@operation(
    "swiglu_backward(Tensor grad, Tensor? source, Tensor? index, Tensor counts, Tensor gate_up, Tensor down,"
    " Tensor? weights, Tensor h, SymInt sources, bool[] wanted) -> Tensor[]",
    _fake_backward,
)
def _backward(
    grad_RD, source_XD, index_R, counts_E, gate_up_EGD, down_EDF, weights_R, h_RG, sources, wanted
) -> list[torch.Tensor]:
    of_inputs = source_XD, index_R, counts_E, gate_up_EGD, down_EDF, weights_R
    gradients = steps_for(h_RG).backward(grad_RD, *of_inputs, h_RG, sources, Wanted(*wanted))
    return [h_RG.new_empty(0) if gradient is None else gradient for gradient in gradients]


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source_XD, index_R, counts_E, gate_up_EGD, down_EDF, weights_R):
        saved = any(ctx.needs_input_grad)
        out_RD, h_RG = _forward(source_XD, index_R, counts_E, gate_up_EGD, down_EDF, weights_R, saved)
        if saved:
            source = source_XD if ctx.needs_input_grad[3] else None
            ctx.save_for_backward(source, index_R, counts_E, gate_up_EGD, down_EDF, weights_R, h_RG)
            ctx.sources = len(source_XD)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD):
        needs_source, _, _, *of_parameters = ctx.needs_input_grad
        wanted = Wanted(needs_source, *of_parameters)
        gradients = _backward(grad_RD, *ctx.saved_tensors, ctx.sources, wanted)
        source, *parameters = (gradient if needed else None for gradient, needed in zip(gradients, wanted, strict=True))
        return source, None, None, *parameters


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
    inputs = source_XD, index_R, counts_E, gate_up_EGD, down_EDF, weights_R
    if not torch.is_grad_enabled():  # a Function's forward is not told, and would keep h
        return _forward(*inputs, False)[0]
    return _GroupedSwiGLU.apply(*inputs)


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
