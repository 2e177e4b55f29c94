"""What no layer can beat: its matrix products alone, on buffers made before, with nothing between them.

Two limits, each by every GEMM library that torch has here, and the faster counts:

    grouped    the products of each expert with its real rows
    dense      all rows through one expert: the same floating-point operations without the ragged sizes

On AMD the MKL of torch.mm may run at half of the machine's speed in float32, where oneDNN does not; torch offers oneDNN
as a private operator, which makes a fresh output each time, and by a permission, which writes into ours
(float32_products.py).

Forward:  h = x W_up^T, y = a W_down^T.  Backward:  da = dy W_down, dW_down = dy^T a, dx = dh W_up, dW_up = dh^T x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from expertmesh.kernels.float32_products import ONEDNN, is_exact
from expertmesh.kernels.packed_weights import is_packable
from expertmesh.launch.bench.cases import Problem, choose


class Product(NamedTuple):
    """out = left @ right."""

    left: torch.Tensor
    right: torch.Tensor
    out: torch.Tensor


Library = Callable[[list[Product]], None]


def _mm(products: list[Product]) -> None:
    for left, right, out in products:
        torch.mm(left, right, out=out)


def _permitted_mm(products: list[Product]) -> None:
    with ONEDNN:
        _mm(products)


def _linear_pointwise(products: list[Product]) -> None:
    linear = torch.ops.mkldnn._linear_pointwise
    for left, right, _ in products:
        linear(left, right.t(), None, "none", [], "")


def libraries(dtype: torch.dtype) -> dict[str, Library]:
    """By name; those that this torch or machine lacks, or that round float32 to bfloat16, are left out."""
    found: dict[str, Library] = {"mm": _mm}
    if is_packable(dtype):  # the same operator multiplies by packed weights
        found["oneDNN"] = _linear_pointwise
    if dtype is torch.float32 and is_exact(ONEDNN):
        found["mm by oneDNN"] = _permitted_mm
    return found


class Limit(NamedTuple):
    """The products for one set of tokens."""

    forward: list[Product]
    backward: list[Product]


def limits(problem: Problem) -> dict[str, list[Limit]]:
    """ "grouped" and "dense", one for each set of tokens; all use the same buffers, and the weights of the case."""
    case, weights = problem.case, problem.weights
    R, D, F, E = case.rows, case.hidden_size, case.ffn_size, case.experts
    dtype = weights.down_EDF.dtype
    x_RD, h_RG, a_RF, y_RD = (torch.randn(R, width).to(dtype) for width in (D, 2 * F, F, D))
    grad_a_RF, grad_x_RD = torch.empty_like(a_RF), torch.empty_like(x_RD)
    grad_gate_up_EGD, grad_down_EDF = torch.empty_like(weights.gate_up_EGD), torch.empty_like(weights.down_EDF)

    def of(counts: list[int]) -> Limit:
        forward, backward, start = [], [], 0
        for expert, count in enumerate(counts):
            rows = slice(start, start + count)
            start += count
            if not count:
                continue
            gate_up, down = weights.gate_up_EGD[expert], weights.down_EDF[expert]
            forward.append(Product(x_RD[rows], gate_up.t(), h_RG[rows]))
            forward.append(Product(a_RF[rows], down.t(), y_RD[rows]))
            backward.append(Product(y_RD[rows], down, grad_a_RF[rows]))
            backward.append(Product(y_RD[rows].t(), a_RF[rows], grad_down_EDF[expert]))
            backward.append(Product(h_RG[rows], gate_up, grad_x_RD[rows]))
            backward.append(Product(h_RG[rows].t(), x_RD[rows], grad_gate_up_EGD[expert]))
        return Limit(forward, backward)

    chosen = [choose(x_TD, weights.router_ND, case.top_k).flatten() for x_TD in problem.inputs_STD]
    return {
        "grouped": [of(torch.bincount(experts_R, minlength=E).tolist()) for experts_R in chosen],
        "dense": [of([R])] * case.sets,
    }
