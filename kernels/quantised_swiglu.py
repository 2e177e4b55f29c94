"""The FFN experts with quantised weights: down(silu(gate) up) of each row, every product one of FP8; for inference.

    source_XD -> fp8 --index--> rows --gate_up[e]--> h_RG = [gate | up] -> fp8(silu(gate) up) --down[e]--> out_RD

What several rows read is quantised once. Hidden units are quantised as they are made; a row's gate weight is a factor
on their scale, so that it costs no pass over the row, and is not rounded to FP8.

Legend: X source rows, R rows sorted by expert, E experts, D model width, F hidden width, G = 2F.
"""

from __future__ import annotations

import torch

from expertmesh.kernels.quantise import quantise_hidden_blocks, quantise_hidden_rows
from expertmesh.kernels.quantised_gemm import quantised_gemm, rows_for
from expertmesh.kernels.quantised_weights import QuantisedWeights, dequantise_expert
from expertmesh.kernels.scheme import Scheme


def quantised_swiglu(
    source_XD: torch.Tensor,
    index_R: torch.Tensor | None,
    counts_E: torch.Tensor,
    gate_up: QuantisedWeights,
    down: QuantisedWeights,
    weights_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run each row through its expert's SwiGLU (arXiv 2002.05202).

    Args:
        source_XD: [X, D] float32 or bfloat16, what the rows are read from.
        index_R: [R] int64, row r is source[index[r]]; sorted by expert. None: the source is sorted itself, R = X.
        counts_E: [E] int64 rows of each expert, on the source's device, adding up to R.
        gate_up: [E, 2F, D] in two parts, the gate's first.
        down: [E, D, F] by the same scheme.
        weights_R: [R] float32 factor of each row's answer, not negative; None: 1.

    Returns:
        [R, D] in the source's dtype, which h is rounded to as well.

    Raises:
        ValueError: if shapes or schemes do not fit.
    """
    if gate_up.parts != 2 or gate_up.scheme != down.scheme or gate_up.values.shape[1] != 2 * down.width:
        raise ValueError(
            f"gate_up and down do not fit: {gate_up.scheme}, {gate_up.parts} parts, {tuple(gate_up.values.shape)} "
            f"and {down.scheme}, {down.parts} parts, {tuple(down.values.shape)}"
        )
    scheme = gate_up.scheme
    h_RG = quantised_gemm(rows_for(scheme)(source_XD), index_R, counts_E, gate_up, source_XD.dtype)
    hidden = quantise_hidden_blocks(h_RG) if scheme == Scheme.FP8_BLOCK else quantise_hidden_rows(h_RG)
    if weights_R is not None:
        scales = hidden[1]
        scales.mul_(weights_R[:, None] if scales.dim() == 2 else weights_R)
    return quantised_gemm(hidden, None, counts_E, down, source_XD.dtype)


def quantised_swiglu_ref(
    source_XD: torch.Tensor,
    index_R: torch.Tensor | None,
    counts_E: torch.Tensor,
    gate_up: QuantisedWeights,
    down: QuantisedWeights,
    weights_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weights' part of the definition, in float64: rows and hidden units are not rounded here."""
    rows_RD = source_XD.double() if index_R is None else source_XD.double()[index_R]
    answers = []
    for expert, group_RD in enumerate(rows_RD.split(counts_E.tolist())):
        gate_RF, up_RF = (group_RD @ dequantise_expert(gate_up, expert).double().t()).chunk(2, dim=1)
        answers.append((torch.nn.functional.silu(gate_RF) * up_RF) @ dequantise_expert(down, expert).double().t())
    out_RD = torch.cat(answers)
    return out_RD if weights_R is None else out_RD * weights_R.double()[:, None]
