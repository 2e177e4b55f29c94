"""Between what rows are read from and the rows: copy them out, and sum rows back into their sources.

Row r is read from source[index[r]]; several rows may read one source, and some sources are read by none:

    index_R = [1, 2, 1, 0]    4 sources        sources 0 1 2 3 get the rows  [3]  [0, 2]  [1]  []

Summing back is done by gathering, never by scattering: each source adds its own rows in the order of r, which needs no
atomics and gives the same bits on every run. On CUDA that is a Triton kernel, elsewhere `embedding_bag`.

Legend: X sources, R rows, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from torch.nn import functional

from expertmesh.kernels.device import by_triton
from expertmesh.kernels.ops import operation
from expertmesh.kernels.tiles import Build, Chip, Tile


class Rows(NamedTuple):
    """The rows that some experts are to compute, not yet read from where they lie."""

    source_XD: torch.Tensor
    index_R: torch.Tensor | None
    """int64: row r is source[index[r]], sorted by expert. None: the source is sorted itself."""
    counts_E: torch.Tensor
    """int64 rows of each expert."""
    weights_R: torch.Tensor | None = None
    """float32 factor of each row's answer; None where whoever combines them puts it on."""

    def gathered(self) -> torch.Tensor:
        """[R, D] a sorted copy, for experts that have no kernel that reads rows where they lie."""
        return self.source_XD if self.index_R is None else gather_rows(self.source_XD, self.index_R)

    def weighted(self, answers_RD: torch.Tensor) -> torch.Tensor:
        """The answers times the weights, for experts that have no kernel that does it on the way."""
        if self.weights_R is None:
            return answers_RD
        return (answers_RD * self.weights_R[:, None]).to(answers_RD.dtype)


@triton.jit
def _sum_rows_kernel(
    rows_ptr,  # [R, D] any float dtype, contiguous
    order_ptr,  # [R] int64 rows, those of a source together
    offsets_ptr,  # [X + 1] int64 where each source's rows begin in order
    out_ptr,  # [X, D] dtype of rows, output
    D,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,  # D is a multiple of BLOCK_D
):
    x = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (d >= 0) if EVEN else (d < D)
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for i in range(tl.load(offsets_ptr + x), tl.load(offsets_ptr + x + 1)):
        row = tl.load(order_ptr + i)
        acc += tl.load(rows_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + x * D + d, acc.to(out_ptr.dtype.element_ty), mask=inside)


def width_tile(width: int) -> Tile:
    """What one program does of a row of `width`: 16 bytes a thread and more, in bfloat16."""
    columns = min(1024, max(16, triton.next_power_of_2(width)))
    return Tile(1, columns, 1, 4 if columns >= 512 else 1, 3)


def sum_rows_triton(rows_RD: torch.Tensor, index_R: torch.Tensor, sources: int) -> torch.Tensor:
    """`sum_rows` by the Triton kernel whatever the device: on CPU tensors it needs TRITON_INTERPRET=1."""
    rows_RD, D = rows_RD.contiguous(), rows_RD.shape[1]
    out_XD = rows_RD.new_empty(sources, D)
    order, offsets = _bags(index_R, sources)
    if sources:
        tile = width_tile(D)
        _sum_rows_kernel[(sources, triton.cdiv(D, tile.columns))](
            *(rows_RD, order, offsets, out_XD, D),
            BLOCK_D=tile.columns,
            EVEN=D % tile.columns == 0,
            num_warps=tile.warps,
        )
    return out_XD


def _bags(index_R: torch.Tensor, sources: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows ordered by source, and where each source's begin; the last offset is R."""
    ordered, order = index_R.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(sources + 1, device=index_R.device))


def _sum_rows_bags(rows_RD: torch.Tensor, index_R: torch.Tensor, sources: int) -> torch.Tensor:
    order, offsets = _bags(index_R, sources)
    # Rows of 16 bits are summed in float32 and rounded once.
    return functional.embedding_bag(order, rows_RD, offsets, mode="sum", include_last_offset=True)


def _fake_sum_rows(rows_RD: torch.Tensor, index_R: torch.Tensor, sources: int) -> torch.Tensor:
    return rows_RD.new_empty(sources, rows_RD.shape[1])


@operation("sum_rows(Tensor rows, Tensor index, SymInt sources) -> Tensor", _fake_sum_rows)
def sum_rows(rows_RD: torch.Tensor, index_R: torch.Tensor, sources: int) -> torch.Tensor:
    """[X, D] in the rows' dtype: for each source the sum of its rows in float32 (float64 for float64); 0 for none.

    Args:
        rows_RD: [R, D] any float dtype. Not differentiable: this is a gradient.
        index_R: [R] int64 in [0, X), in any order.
        sources: X.
    """
    return (sum_rows_triton if by_triton(rows_RD) else _sum_rows_bags)(rows_RD, index_R, sources)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source_XD, index_R):
        ctx.save_for_backward(index_R)
        ctx.sources = len(source_XD)
        return source_XD.index_select(0, index_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD):
        (index_R,) = ctx.saved_tensors
        return sum_rows(grad_RD, index_R, ctx.sources), None


def gather_rows(source_XD: torch.Tensor, index_R: torch.Tensor) -> torch.Tensor:
    """[R, D]: row r is source[index[r]]; differentiable in the source, by `sum_rows`.

    Args:
        source_XD: [X, D] any float dtype.
        index_R: [R] int64 in [0, X), repeated or not.
    """
    return _GatherRows.apply(source_XD, index_R)


def gather_rows_ref(source_XD: torch.Tensor, index_R: torch.Tensor) -> torch.Tensor:
    """The definition of `gather_rows`, by plain autograd."""
    return torch.cat([source_XD[:0], *(source_XD[source][None] for source in index_R.tolist())])


def shipped(chip: Chip) -> list[Build]:
    """The kernel at the widths of bfloat16 models."""
    tile = width_tile(4096)
    pointers = {"rows_ptr": "*bf16:16", "order_ptr": "*i64:16", "offsets_ptr": "*i64:16", "out_ptr": "*bf16:16"}
    return [
        Build("sum rows", _sum_rows_kernel, pointers | {"D": "i32:16", "BLOCK_D": tile.columns, "EVEN": True}, tile)
    ]
