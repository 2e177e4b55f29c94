"""The experts' SwiGLU on a CPU: one expert after the other, all of its steps while its rows are in the cache.

    forward     rows -> h = rows gate_up^T -> a = silu(gate) up -> w (a down^T)
    backward    da = (w grad) down -> dw = sum_f a da / w, dh = da d(silu(gate) up) -> d down, d gate_up, d rows

Steps over all experts at once would fetch h and a from memory at each of them. One expert's share is a few MB, which
the last cache holds, so what lies between the products costs a third. Every buffer but the results is as large as the
largest share, and used again by the next expert.

The gate weight w is put where rows are narrow, on the answers and on their gradients: D wide, not F or G. That leaves
da multiplied with w, so dw divides by it. A weight too small to divide by counts as 1 until dw is known, and its row is
struck out of the other gradients then.

Legend: X source rows, R rows sorted by expert, n those of one expert, E experts, D model width, F hidden width, G = 2F.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from expertmesh.kernels.float32_products import products_of
from expertmesh.kernels.grouped_gemm import segments, zero_others
from expertmesh.kernels.packed_weights import packed
from expertmesh.kernels.rows import sum_rows

TINY = 1e-30  # the gradient that a row gets through a smaller weight is 0 beside that of any other

aten = torch.ops.aten


class Wanted(NamedTuple):
    """Which gradients to compute."""

    source: bool
    gate_up: bool
    down: bool
    weights: bool


class Gradients(NamedTuple):
    """None for those that are not wanted."""

    source_XD: torch.Tensor | None
    gate_up_EGD: torch.Tensor | None
    down_EDF: torch.Tensor | None
    weights_R: torch.Tensor | None


def _shares(tensor_R: torch.Tensor | None, sizes: list[int]) -> tuple[torch.Tensor | None, ...]:
    """The rows of each expert; None of what is not there."""
    return (None,) * len(sizes) if tensor_R is None else tensor_R.split(sizes)


def forward(
    source_XD: torch.Tensor,
    index_R: torch.Tensor | None,
    counts_E: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
    weights_R: torch.Tensor | None,
    saved: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The answers [R, D], and h [R, G] where `saved`."""
    R = len(source_XD if index_R is None else index_R)
    experts, sizes = segments(counts_E, R)
    of_gate_up, of_down = (packed(gate_up_EGD), packed(down_EDF)) if R and not saved else (None, None)
    if of_gate_up is not None and of_down is not None:
        rows_RD = source_XD if index_R is None else source_XD.index_select(0, index_R)
        answers = []
        for expert, rows_nD in zip(experts, rows_RD.split(sizes), strict=True):
            gate_nF, up_nF = of_gate_up.multiply(rows_nD, gate_up_EGD, expert).chunk(2, dim=1)
            answers.append(of_down.multiply(functional.silu(gate_nF).mul_(up_nF), down_EDF, expert))
        out_RD = torch.cat(answers)
        return out_RD if weights_R is None else out_RD.mul_(weights_R[:, None]), None

    most, D, F, G = max(sizes, default=0), down_EDF.shape[1], down_EDF.shape[2], gate_up_EGD.shape[1]
    out_RD = source_XD.new_empty(R, D)
    h_RG = source_XD.new_empty(R if saved else most, G)
    a_F, rows_D = source_XD.new_empty(most, F), source_XD.new_empty(0 if index_R is None else most, D)
    h_of = h_RG.split(sizes) if saved else [h_RG.narrow(0, 0, size) for size in sizes]
    rows_of = (source_XD if index_R is None else index_R).split(sizes)
    shares = zip(experts, sizes, rows_of, h_of, out_RD.split(sizes), _shares(weights_R, sizes), strict=True)
    with products_of(source_XD.dtype):
        for expert, size, rows_nD, h_nG, out_nD, weights_n in shares:
            if index_R is not None:
                rows_nD = torch.index_select(source_XD, 0, rows_nD, out=rows_D.narrow(0, 0, size))
            torch.mm(rows_nD, gate_up_EGD.select(0, expert).t(), out=h_nG)
            a_nF = a_F.narrow(0, 0, size)
            aten.silu.out(h_nG.narrow(1, 0, F), out=a_nF).mul_(h_nG.narrow(1, F, F))
            torch.mm(a_nF, down_EDF.select(0, expert).t(), out=out_nD)
            if weights_n is not None:
                out_nD.mul_(weights_n.unsqueeze(1))
    return out_RD, h_RG if saved else None


def _hidden(
    h_nG: torch.Tensor,
    grad_a_nF: torch.Tensor,
    a_nF: torch.Tensor,
    grad_h_nG: torch.Tensor,
    silu_nF: torch.Tensor,
    grad_weights_n: torch.Tensor | None,
    divisor_n: torch.Tensor | None,
    struck_n: torch.Tensor | None,
) -> None:
    """What the backward computes at the hidden units: from h and da, which it spends, to a, dh and dw."""
    (gate_nF, up_nF), (grad_gate_nF, grad_up_nF) = h_nG.chunk(2, 1), grad_h_nG.chunk(2, 1)
    torch.mul(aten.silu.out(gate_nF, out=silu_nF), up_nF, out=a_nF)
    if grad_weights_n is not None:
        product_nF = torch.mul(a_nF, grad_a_nF, out=grad_up_nF)
        torch.sum(product_nF, 1, dtype=grad_weights_n.dtype, out=grad_weights_n).div_(divisor_n)
    if struck_n is not None:
        grad_a_nF.masked_fill_(struck_n.unsqueeze(1), 0.0)
    torch.mul(grad_a_nF, silu_nF, out=grad_up_nF)
    aten.silu_backward.grad_input(grad_a_nF.mul_(up_nF), gate_nF, grad_input=grad_gate_nF)


def backward(
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
    """`source_XD` may be None where the gradient of gate_up is not wanted; `sources` is X."""
    R, G = h_RG.shape
    E, D, F = down_EDF.shape
    experts, sizes = segments(counts_E, R)
    most, empty = max(sizes, default=0), h_RG.new_empty
    grad_rows_RD = empty(R, D) if wanted.source else None
    grad_gate_up_EGD = empty(E, G, D) if wanted.gate_up else None
    grad_down_EDF = empty(E, D, F) if wanted.down else None
    struck_R = divisor_R = None
    if weights_R is not None:
        small_R = weights_R.abs() < TINY
        struck_R, divisor_R = (small_R, weights_R.masked_fill(small_R, 1.0)) if small_R.any() else (None, weights_R)
    grad_weights_R = torch.empty_like(weights_R) if wanted.weights else None
    a_F, silu_F, grad_a_F, grad_h_G, grad_D, rows_D = (empty(most, width) for width in (F, F, F, G, D, D))

    of_rows = h_RG, grad_RD, index_R, divisor_R, struck_R, grad_weights_R, grad_rows_RD
    sources_of = _shares(source_XD, sizes) if index_R is None else (None,) * len(sizes)
    shares = zip(experts, sizes, sources_of, *(_shares(tensor, sizes) for tensor in of_rows), strict=True)
    with products_of(h_RG.dtype):
        for expert, size, rows_nD, h_nG, grad_nD, index_n, divisor_n, struck_n, grad_weights_n, grad_rows_nD in shares:
            a_nF, grad_a_nF, grad_h_nG = (buffer.narrow(0, 0, size) for buffer in (a_F, grad_a_F, grad_h_G))
            if divisor_n is not None:
                grad_nD = torch.mul(grad_nD, divisor_n.unsqueeze(1), out=grad_D.narrow(0, 0, size))
            torch.mm(grad_nD, down_EDF.select(0, expert), out=grad_a_nF)
            if struck_n is not None:
                grad_nD.masked_fill_(struck_n.unsqueeze(1), 0.0)
            _hidden(h_nG, grad_a_nF, a_nF, grad_h_nG, silu_F.narrow(0, 0, size), grad_weights_n, divisor_n, struck_n)
            if grad_down_EDF is not None:
                torch.mm(grad_nD.t(), a_nF, out=grad_down_EDF.select(0, expert))
            if grad_gate_up_EGD is not None:
                if index_n is not None:
                    assert source_XD is not None
                    rows_nD = torch.index_select(source_XD, 0, index_n, out=rows_D.narrow(0, 0, size))
                torch.mm(grad_h_nG.t(), rows_nD, out=grad_gate_up_EGD.select(0, expert))
            if grad_rows_nD is not None:
                torch.mm(grad_h_nG, gate_up_EGD.select(0, expert), out=grad_rows_nD)
    for gradient in (grad_gate_up_EGD, grad_down_EDF):
        if gradient is not None:
            zero_others(gradient, experts)
    grad_source_XD = grad_rows_RD
    if grad_rows_RD is not None and index_R is not None:
        grad_source_XD = sum_rows(grad_rows_RD, index_R, sources)
    return Gradients(grad_source_XD, grad_gate_up_EGD, grad_down_EDF, grad_weights_R)
