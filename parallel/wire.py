"""What a row looks like between ranks: as it is, as bfloat16, or as FP8 with a scale of its own.

    format    bytes of a row of D float32     of bfloat16     each number is off by at most
    native    4 D                             2 D             nothing
    bf16      2 D                             2 D             1/256 of itself
    fp8       D + 4                           D + 4           1/16 of itself (see kernels/quantise.py)

Rows and their gradients travel in one format. For FP8 that is E4M3 both ways: the scale of a row takes care of how
large a gradient is, and E5M2's wider range, of no use within a row, would cost half of the precision (DeepSeek-V3 takes
E4M3 for gradients too: arXiv 2412.19437, section 3.3.2). Rounding counts as the identity in the backward: a gradient
passes straight through it, and is rounded on its own way.

A format says nothing of sums: rows are narrowed before they leave and widened where they arrive, and added there.

Legend: R rows, D width, W what a row has on the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from expertmesh.kernels.quantise import FP8, QuantisedRows, dequantise_rows, quantise_rows
from expertmesh.parallel.dispatch_config import WireName

SCALE_BYTES = torch.float32.itemsize


class Wire(NamedTuple):
    """A format: `unpack(pack(rows_RD), rows_RD.dtype)` is rows_RD, but for rounding."""

    pack: Callable[[torch.Tensor], torch.Tensor]
    """From rows [R, D] of any float dtype to contiguous [R, W] of a dtype that every backend carries."""
    unpack: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    """From [R, W] back to [R, D] in that dtype."""
    row_bytes: Callable[[int, torch.dtype], int]
    """Of a row of so many numbers of that dtype."""


def _pack_fp8(rows_RD: torch.Tensor) -> torch.Tensor:
    """uint8 [R, D + 4]: gloo has no FP8."""
    values_RD, scales_R = quantise_rows(rows_RD)
    return torch.cat([values_RD.view(torch.uint8), scales_R[:, None].view(torch.uint8)], dim=1)


def _unpack_fp8(packed_RW: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    values_RD, scales_R4 = packed_RW.split([packed_RW.shape[1] - SCALE_BYTES, SCALE_BYTES], dim=1)
    # A copy even of a single row, which is contiguous as it lies: its address may be no multiple of 4.
    scales_R = scales_R4.clone(memory_format=torch.contiguous_format).view(torch.float32)[:, 0]
    return dequantise_rows(QuantisedRows(values_RD.contiguous().view(FP8), scales_R), dtype)


WIRES: dict[WireName, Wire] = {
    "native": Wire(
        lambda rows_RD: rows_RD.contiguous(),
        lambda packed_RW, dtype: packed_RW,
        lambda width, dtype: width * dtype.itemsize,
    ),
    "bf16": Wire(
        lambda rows_RD: rows_RD.to(torch.bfloat16).contiguous(),
        lambda packed_RW, dtype: packed_RW.to(dtype),
        lambda width, dtype: width * torch.bfloat16.itemsize,
    ),
    "fp8": Wire(_pack_fp8, _unpack_fp8, lambda width, dtype: width + SCALE_BYTES),
}
NATIVE = WIRES["native"]
