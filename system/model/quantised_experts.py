"""SwiGLU experts held in FP8 or INT4, as `expertmesh convert quantize` wrote them: a third to an eighth of the memory.

In a checkpoint each matrix lies under its own name as bytes, with what turns them into numbers beside it:

    layers.2.mlp.experts.5.down_proj.weight              values
    layers.2.mlp.experts.5.down_proj.weight_scale_inv    scales, which values are multiplied with (DeepSeek-V3's name)
    layers.2.mlp.experts.5.down_proj.weight_factor       int4-fp8 alone

They are for inference: nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from expertmesh.kernels.quantised_swiglu import quantised_swiglu
from expertmesh.kernels.quantised_weights import QuantisedWeights, layout
from expertmesh.kernels.rows import Rows
from expertmesh.kernels.scheme import Scheme
from expertmesh.system.model.context import AS_TRAINED, AnyContext
from expertmesh.system.model.experts import RoutedExperts, SwiGLUExperts
from expertmesh.system.model.experts_config import SwiGLUConfig

SUFFIXES = {"values": "", "scales": "_scale_inv", "factors": "_factor"}
"""Of what is kept of a matrix (`quantised_weights.layout`), the end of its name in a checkpoint."""


class QuantisedExperts(RoutedExperts):
    """As `SwiGLUExperts`, with quantised weights."""

    PARTS = {
        f"{matrix}_{kept}": tuple(name + suffix for name in names)
        for matrix, names in SwiGLUExperts.PARTS.items()
        for kept, suffix in SUFFIXES.items()
    }

    def __init__(self, config: SwiGLUConfig, scheme: Scheme, hidden_size: int, shard: Sequence[int]) -> None:
        super().__init__(shard)
        self.scheme = scheme
        widths = {"gate_up": (config.hidden_size, hidden_size), "down": (hidden_size, config.hidden_size)}
        self.widths = {matrix: k for matrix, (_, k) in widths.items()}
        for matrix, (n, k) in widths.items():
            parts = len(SwiGLUExperts.PARTS[matrix])
            for kept, told in layout(scheme, n, k)._asdict().items():
                if told is None:
                    continue
                (rows, *rest), dtype = told
                held = torch.empty(len(shard), parts * rows, *rest, dtype=dtype)
                self.register_parameter(f"{matrix}_{kept}", nn.Parameter(held, requires_grad=False))

    def _quantised(self, matrix: str) -> QuantisedWeights:
        return QuantisedWeights(
            scheme=self.scheme,
            values=self.get_parameter(f"{matrix}_values"),
            scales=self.get_parameter(f"{matrix}_scales"),
            factors_EP=getattr(self, f"{matrix}_factors", None),
            parts=len(SwiGLUExperts.PARTS[matrix]),
            width=self.widths[matrix],
        )

    def forward(self, rows: Rows, context: AnyContext = AS_TRAINED) -> torch.Tensor:
        gate_up, down = self._quantised("gate_up"), self._quantised("down")
        return quantised_swiglu(rows.source_XD, rows.index_R, rows.counts_E, gate_up, down, rows.weights_R)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """What moves a module moves this one; what changes a module's dtype leaves bytes and scales as they are."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(moved, recurse)
