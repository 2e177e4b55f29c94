"""Weights kept a second time in the order that oneDNN multiplies in, for a process that serves.

torch.mm brings each matrix into that order on every call. For many rows that is 8 % of a product; for the few rows of a
decoding step, where a product is nothing but reading the weights, it halves the speed: here 0.7 ms in place of 0.4 ms
for a token's two experts in bfloat16.

What is kept is as large as the weights, so it is kept only where weights stay as they are: in inference mode, which
serving runs in and training does not, and from the second call on, since what was made for one call is not seen again.
It is made anew when the tensor was written to or moved. A write past torch's sight (through `.data`) is not noticed.

The operators are torch's own, and private: where a version lacks them, or a dtype has none, nothing is kept.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakIdKeyDictionary

ROWS = 16  # that the order is chosen for; with any other number of rows the answers are the same


class PackedWeights:
    """The matrices of one [E, N, K] tensor, each packed when it is first used."""

    def __init__(self, weights_ENK: torch.Tensor) -> None:
        self.written, self.address = weights_ENK._version, weights_ENK.data_ptr()
        self._matrices: dict[int, torch.Tensor] = {}

    def is_of(self, weights_ENK: torch.Tensor) -> bool:
        """Whether `weights_ENK` still holds what was packed."""
        return (self.written, self.address) == (weights_ENK._version, weights_ENK.data_ptr())

    def multiply(self, rows_nK: torch.Tensor, weights_ENK: torch.Tensor, expert: int) -> torch.Tensor:
        """rows @ weights[expert] transposed, [n, N]."""
        matrix = self._matrices.get(expert)
        if matrix is None:
            weights_NK = weights_ENK.select(0, expert).contiguous()
            matrix = self._matrices[expert] = torch.ops.mkldnn._reorder_linear_weight(weights_NK, ROWS)
        return torch.ops.mkldnn._linear_pointwise(rows_nK, matrix, None, "none", [], "")


_seen: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weights -> PackedWeights, gone with the weights


def packed(weights_ENK: torch.Tensor) -> PackedWeights | None:
    """What `weights_ENK` are packed as; None where they are not to be kept twice."""
    if not torch.is_inference_mode_enabled() or weights_ENK.is_inference() or not is_packable(weights_ENK.dtype):
        return None
    before = _seen.get(weights_ENK)
    if before is not None and before.is_of(weights_ENK):
        return before
    _seen[weights_ENK] = PackedWeights(weights_ENK)
    return None


def is_packable(dtype: torch.dtype) -> bool:
    """Whether this torch, on this machine, packs matrices of that dtype."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    mkldnn = torch.ops.mkldnn
    if not hasattr(mkldnn, "_linear_pointwise") or not hasattr(mkldnn, "_reorder_linear_weight"):
        return False
    return dtype is torch.float32 or bool(mkldnn._is_mkldnn_bf16_supported())
