"""The FFN experts: down(silu(gate) * up) of each row by its own expert's weights, as one autograd Function.

    rows_RD --gate_up[e]--> h_RG = [gate | up] --silu(gate)*up--> a_RF --down[e]--> rows_RD      (G = 2F)

Written out by hand because autograd would keep the rows, h, silu(gate) and the product a for the backward. Here only
the rows and h are kept, and the rest is computed again: per row D + 2F numbers in place of D + 4F.

Legend: R rows sorted by expert, E experts, D model width, F hidden width.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from expertmesh.kernels.grouped_gemm import check_groups, grouped_gemm_ref, products_for


def _activate(h_RG: torch.Tensor) -> torch.Tensor:
    gate_RF, up_RF = h_RG.chunk(2, dim=-1)
    return functional.silu(gate_RF).mul_(up_RF)


def _activate_backward(grad_RF: torch.Tensor, h_RG: torch.Tensor) -> torch.Tensor:
    gate_RF, up_RF = h_RG.chunk(2, dim=-1)
    grad_h_RG = torch.empty_like(h_RG)
    grad_gate_RF, grad_up_RF = grad_h_RG.chunk(2, dim=-1)
    torch.mul(grad_RF, functional.silu(gate_RF), out=grad_up_RF)
    torch.ops.aten.silu_backward.grad_input(grad_RF * up_RF, gate_RF, grad_input=grad_gate_RF)
    return grad_h_RG


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD, counts_E, gate_up_EGD, down_EDF, products):
        h_RG = products.multiply(rows_RD, gate_up_EGD, counts_E)
        ctx.save_for_backward(rows_RD, h_RG, counts_E, gate_up_EGD, down_EDF)
        ctx.products = products
        return products.multiply(_activate(h_RG), down_EDF, counts_E)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD):
        rows_RD, h_RG, counts_E, gate_up_EGD, down_EDF = ctx.saved_tensors
        multiply, outer = ctx.products
        needs_rows, _, needs_gate_up, needs_down, _ = ctx.needs_input_grad
        grad_rows = grad_gate_up = grad_down = None
        if needs_down:
            grad_down = outer(grad_RD, _activate(h_RG), counts_E)
        if needs_rows or needs_gate_up:
            grad_a_RF = multiply(grad_RD, down_EDF.transpose(1, 2), counts_E)
            grad_h_RG = _activate_backward(grad_a_RF, h_RG)
            if needs_gate_up:
                grad_gate_up = outer(grad_h_RG, rows_RD, counts_E)
            if needs_rows:
                grad_rows = multiply(grad_h_RG, gate_up_EGD.transpose(1, 2), counts_E)
        return grad_rows, None, grad_gate_up, grad_down, None


def _check(rows_RD: torch.Tensor, counts_E: torch.Tensor, gate_up_EGD: torch.Tensor, down_EDF: torch.Tensor) -> None:
    check_groups(rows_RD, gate_up_EGD, counts_E)
    E, G, D = gate_up_EGD.shape
    if G % 2 or down_EDF.shape != (E, D, G // 2) or down_EDF.dtype != gate_up_EGD.dtype:
        described = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (gate_up_EGD, down_EDF))
        raise ValueError(f"gate_up [E, 2F, D] and down [E, D, F] do not fit: {described}")


def grouped_swiglu(
    rows_RD: torch.Tensor, counts_E: torch.Tensor, gate_up_EGD: torch.Tensor, down_EDF: torch.Tensor
) -> torch.Tensor:
    """Run each row through its expert's SwiGLU (Shazeer, arXiv 2002.05202); differentiable in rows and both weights.

    Args:
        rows_RD: [R, D] rows sorted by expert; bfloat16 or float32 (the CPU also takes float64).
        counts_E: [E] int64 rows of each expert, on the rows' device, adding up to R.
        gate_up_EGD: [E, 2F, D] in the rows' dtype; of the 2F rows the first F are the gate's (Hugging Face's layout).
        down_EDF: [E, D, F] in the rows' dtype.

    Returns:
        [R, D] in the rows' dtype. Products accumulate in float32; h and the activation are rounded to the rows' dtype,
        as a layer of separate Linear modules rounds them.

    Raises:
        ValueError: if shapes or dtypes do not fit, or, on the CPU, the counts do not add up to R.
    """
    _check(rows_RD, counts_E, gate_up_EGD, down_EDF)
    return _GroupedSwiGLU.apply(rows_RD, counts_E, gate_up_EGD, down_EDF, products_for(rows_RD))


def grouped_swiglu_ref(
    rows_RD: torch.Tensor, counts_E: torch.Tensor, gate_up_EGD: torch.Tensor, down_EDF: torch.Tensor
) -> torch.Tensor:
    """The definition of `grouped_swiglu`, by plain autograd."""
    gate_RF, up_RF = grouped_gemm_ref(rows_RD, gate_up_EGD, counts_E).chunk(2, dim=-1)
    return grouped_gemm_ref(functional.silu(gate_RF) * up_RF, down_EDF, counts_E)
