"""The experts' SwiGLU as Triton kernels: two that fuse all they can with their product; the grouped GEMM does the rest.

Forward. `_up_kernel` takes each row straight from where its token lies and multiplies it with the gate's and the up
projection's weights at once, so that both halves of a hidden unit meet in registers: h is written once, for the
backward, and w * silu(gate) * up beside it. One more product brings that down to the model width.

Backward (SonicMoE, arXiv 2512.14080, section 3.2): with da = gradient @ down, still without the gate weight w, one
epilogue gives all that hangs on a hidden unit:

    dw = sum_f a da        dh = w da * d(silu(gate) up)        w a, again, for the gradient of down

so the experts' outputs are never needed, and are not kept. The epilogue takes a strip of columns at a time: all at once
it would need more registers than there are. Beside the 128 accumulators of 4 warps, strips of 16 with 32-bit offsets
from the tile's first row fit (sm_90: 242 registers); strips of 32 put 48 bytes a thread into memory, and 64-bit offsets
32 with strips of 16, 352 with strips of 32.

Legend: X source rows, R rows sorted by expert, E experts, D model width, F hidden width, G = 2F.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from expertmesh.kernels.grouped_gemm_triton import GROUP, dot
from expertmesh.kernels.tiles import (
    Build,
    Chip,
    Tile,
    chip_of,
    choose_tile,
    describable,
    descriptor_type,
    swizzle,
    tile_table,
)
from expertmesh.kernels.tuned_tiles import product_of, tile_of

STRIP = tl.constexpr(16)  # columns of the backward's epilogue at a time


@triton.jit
def _up_kernel(
    source,  # [X, D] float32 or bfloat16, contiguous: pointer; descriptor of [BLOCK_R, BLOCK_K] without GATHERED
    index_ptr,  # [R] int64 row of source for each row; unused without GATHERED
    gate_up,  # [E, 2F, D] dtype of source, contiguous: pointer, or descriptor of [1, BLOCK_F, BLOCK_K]
    weights_ptr,  # [R] float32 gate weight of each row; unused without WEIGHTED
    table_ptr,  # [tiles, 3] int32
    h_ptr,  # [R, 2F] dtype of source, output; unused without SAVED
    a_ptr,  # [R, F] dtype of source, output
    tiles,
    F,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATHERED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SAVED: tl.constexpr,
    EVEN: tl.constexpr,  # F and D are multiples of their blocks
    WIDEN: tl.constexpr,
):
    tile, block = swizzle(tl.program_id(0), tiles, tl.cdiv(F, BLOCK_F), GROUP)
    expert = tl.load(table_ptr + tile * 3)
    if expert < 0:
        return
    first_row = tl.load(table_ptr + tile * 3 + 1)
    row_end = tl.load(table_ptr + tile * 3 + 2)
    r = first_row + tl.arange(0, BLOCK_R)
    f = block * BLOCK_F + tl.arange(0, BLOCK_F)
    k = tl.arange(0, BLOCK_K)
    known = tl.minimum(r, row_end - 1)  # rows past the end repeat the last one and are not stored
    BY_POINTER: tl.constexpr = GATHERED or not DESCRIPTORS
    if BY_POINTER:
        from_row = tl.load(index_ptr + known) if GATHERED else known.to(tl.int64)
        source_ptrs = source + from_row[:, None] * D + k[None, :]
    if not DESCRIPTORS:
        gate_ptrs = gate_up + (expert.to(tl.int64) * 2 * F + f[None, :]) * D + k[:, None]
        up_ptrs = gate_ptrs + F.to(tl.int64) * D
    gate = tl.zeros((BLOCK_R, BLOCK_F), dtype=tl.float32)
    up = tl.zeros((BLOCK_R, BLOCK_F), dtype=tl.float32)
    for k_start in range(0, D, BLOCK_K):
        if BY_POINTER:
            if EVEN:
                x = tl.load(source_ptrs)
            else:
                x = tl.load(source_ptrs, mask=(k < D - k_start)[None, :], other=0.0)
            source_ptrs += BLOCK_K
        else:
            x = source.load([first_row, k_start])
        if DESCRIPTORS:
            w_gate = gate_up.load([expert, block * BLOCK_F, k_start]).reshape(BLOCK_F, BLOCK_K).T
            w_up = gate_up.load([expert, F + block * BLOCK_F, k_start]).reshape(BLOCK_F, BLOCK_K).T
        else:
            if EVEN:
                w_gate = tl.load(gate_ptrs)
                w_up = tl.load(up_ptrs)
            else:
                inside = (k < D - k_start)[:, None] & (f < F)[None, :]
                w_gate = tl.load(gate_ptrs, mask=inside, other=0.0)
                w_up = tl.load(up_ptrs, mask=inside, other=0.0)
            gate_ptrs += BLOCK_K
            up_ptrs += BLOCK_K
        gate = dot(x, w_gate, gate, WIDEN)
        up = dot(x, w_up, up, WIDEN)
    stored = (r < row_end)[:, None] & (f < F)[None, :]
    if SAVED:
        h_ptrs = h_ptr + r[:, None].to(tl.int64) * (2 * F) + f[None, :]
        tl.store(h_ptrs, gate.to(h_ptr.dtype.element_ty), mask=stored)
        tl.store(h_ptrs + F, up.to(h_ptr.dtype.element_ty), mask=stored)
    a = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        a *= tl.load(weights_ptr + known)[:, None]
    tl.store(a_ptr + r[:, None].to(tl.int64) * F + f[None, :], a.to(a_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _hidden_strip(
    dots, da, rows, height, f, F, weights_ptr, h_ptr, grad_h_ptr, a_ptr, WEIGHTED: tl.constexpr, KEPT: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Finish a strip of hidden units; returns the dots of each row with sum_f a da over the strip added.

    Pointers are those of the tile's first row. The order of the lines is that of fewest numbers held at a time.
    """
    inside = (rows < height)[:, None]
    if not EVEN:
        inside = inside & (f < F)[None, :]
    at = rows[:, None] * (2 * F) + f[None, :]
    gate = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + F + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    a = silu * up
    dots += tl.sum(a * da, 1)
    if WEIGHTED:
        weight = tl.load(weights_ptr + rows, mask=rows < height, other=0.0)[:, None]
        a *= weight
        da *= weight
    if KEPT:
        tl.store(a_ptr + rows[:, None] * F + f[None, :], a.to(a_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_h_ptr + F + at, (da * silu).to(grad_h_ptr.dtype.element_ty), mask=inside)
    grad_gate = da * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(grad_h_ptr + at, grad_gate.to(grad_h_ptr.dtype.element_ty), mask=inside)
    return dots


@triton.jit
def _hidden_strips(
    dots, da, rows, height, first, F, weights_ptr, h_ptr, grad_h_ptr, a_ptr, WEIGHTED: tl.constexpr, KEPT: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Halve the columns until they are a strip, from left to right."""
    if COLUMNS <= STRIP:
        f = first + tl.arange(0, COLUMNS)
        return _hidden_strip(
            dots, da, rows, height, f, F, weights_ptr, h_ptr, grad_h_ptr, a_ptr, WEIGHTED, KEPT, EVEN
        )  # fmt: skip
    else:
        HALF: tl.constexpr = COLUMNS // 2
        left, right = tl.split(tl.permute(tl.reshape(da, (ROWS, 2, HALF)), (0, 2, 1)))
        dots = _hidden_strips(
            dots, left, rows, height, first, F, weights_ptr, h_ptr, grad_h_ptr, a_ptr, WEIGHTED, KEPT, EVEN, ROWS, HALF
        )  # fmt: skip
        return _hidden_strips(
            dots, right, rows, height, first + HALF, F, weights_ptr, h_ptr, grad_h_ptr, a_ptr, WEIGHTED, KEPT, EVEN,
            ROWS, HALF,
        )  # fmt: skip


@triton.jit
def _hidden_kernel(
    grad,  # [R, D] float32 or bfloat16, contiguous: pointer, or descriptor of blocks [BLOCK_R, BLOCK_K]
    down,  # [E, D, F] dtype of grad, contiguous: pointer, or descriptor of [1, BLOCK_K, BLOCK_F]
    weights_ptr,  # [R] float32; unused without WEIGHTED
    table_ptr,  # [tiles, 3] int32
    h_ptr,  # [R, 2F] dtype of grad
    grad_h_ptr,  # [R, 2F] dtype of grad, output
    a_ptr,  # [R, F] dtype of grad, output: weighted a; unused without KEPT
    dots_ptr,  # [R, blocks of F] float32, output: parts of the gradient of weights; unused without WEIGHTED
    tiles,
    F,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    KEPT: tl.constexpr,
    EVEN: tl.constexpr,  # F and D are multiples of their blocks
    WIDEN: tl.constexpr,
):
    blocks = tl.cdiv(F, BLOCK_F)
    tile, block = swizzle(tl.program_id(0), tiles, blocks, GROUP)
    expert = tl.load(table_ptr + tile * 3)
    if expert < 0:
        return
    first_row = tl.load(table_ptr + tile * 3 + 1)
    row_end = tl.load(table_ptr + tile * 3 + 2)
    r = first_row + tl.arange(0, BLOCK_R)
    known = tl.minimum(r, row_end - 1)
    da = tl.zeros((BLOCK_R, BLOCK_F), dtype=tl.float32)
    if DESCRIPTORS:
        for k in range(0, D, BLOCK_K):
            g = grad.load([first_row, k])
            w = down.load([expert, k, block * BLOCK_F]).reshape(BLOCK_K, BLOCK_F)
            da = dot(g, w, da, WIDEN)
    else:
        k = tl.arange(0, BLOCK_K)
        f = block * BLOCK_F + tl.arange(0, BLOCK_F)
        grad_ptrs = grad + known.to(tl.int64)[:, None] * D + k[None, :]
        down_ptrs = down + (expert.to(tl.int64) * D + k[:, None]) * F + f[None, :]
        for k_start in range(0, D, BLOCK_K):
            if EVEN:
                g = tl.load(grad_ptrs)
                w = tl.load(down_ptrs)
            else:
                inside = k < D - k_start
                g = tl.load(grad_ptrs, mask=inside[None, :], other=0.0)
                w = tl.load(down_ptrs, mask=inside[:, None] & (f < F)[None, :], other=0.0)
            da = dot(g, w, da, WIDEN)
            grad_ptrs += BLOCK_K
            down_ptrs += BLOCK_K * F.to(tl.int64)
    base = first_row.to(tl.int64) * F  # beyond it 32 bits are enough: a tile has 2F * 128 numbers at most
    dots = _hidden_strips(
        tl.zeros((BLOCK_R,), dtype=tl.float32), da, tl.arange(0, BLOCK_R), row_end - first_row, block * BLOCK_F, F,
        weights_ptr + first_row if WEIGHTED else weights_ptr, h_ptr + 2 * base, grad_h_ptr + 2 * base,
        a_ptr + base if KEPT else a_ptr, WEIGHTED, KEPT, EVEN, BLOCK_R, BLOCK_F,
    )  # fmt: skip
    if WEIGHTED:
        tl.store(dots_ptr + r.to(tl.int64) * blocks + block, dots, mask=r < row_end)


def swiglu_tile(rows: int, experts: int, itemsize: int, chip: Chip, accumulators: int) -> Tile:
    """The tile of `_up_kernel` (2 accumulators) or `_hidden_kernel` (1, and an epilogue).

    As tall as the plain product's. Two accumulators take 8 warps from half the height on: 4 do not hold them.
    """
    tile = choose_tile(rows, experts, 128, itemsize, chip, wide=False)
    if accumulators == 1:
        return tile
    columns = 64 if chip.name == "sm_80" else 128  # mma.sync needs operands in registers too
    return tile._replace(columns=columns, warps=8 if tile.rows >= 64 else 4)


class Up(NamedTuple):
    """What the forward makes of the rows."""

    h_RG: torch.Tensor | None
    a_RF: torch.Tensor


def up(
    source_XD: torch.Tensor,
    index_R: torch.Tensor | None,
    counts_E: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    weights_R: torch.Tensor | None,
    saved: bool,
    tile: Tile | None = None,
) -> Up:
    """h = gate_up @ row, where `saved`, and w silu(gate) up. `tile` None: by the table of tuned tiles, or by rule."""
    source_XD, gate_up_EGD = source_XD.contiguous(), gate_up_EGD.contiguous()
    (E, G, D), F = gate_up_EGD.shape, gate_up_EGD.shape[1] // 2
    R, gathered = len(source_XD) if index_R is None else len(index_R), index_R is not None
    h_RG = source_XD.new_empty(R, G) if saved else None
    a_RF = source_XD.new_empty(R, F)
    if R == 0:
        return Up(h_RG, a_RF)
    chip = chip_of(source_XD)
    tile = tile or tile_of(
        product_of("up", source_XD, R, E, F, D), swiglu_tile(R, E, source_XD.element_size(), chip, accumulators=2)
    )
    table_T3 = tile_table(counts_E, R, tile.rows).table_T3
    descriptors = describable(chip, gate_up_EGD, *([] if gathered else [source_XD]))
    source, gate_up = source_XD, gate_up_EGD
    if descriptors:
        gate_up = TensorDescriptor.from_tensor(gate_up_EGD, [1, tile.columns, tile.depth])
        if not gathered:
            source = TensorDescriptor.from_tensor(source_XD, [tile.rows, tile.depth])
    _up_kernel[(len(table_T3) * triton.cdiv(F, tile.columns),)](
        *(source, index_R, gate_up, weights_R, table_T3, h_RG, a_RF, len(table_T3), F, D),
        BLOCK_R=tile.rows,
        BLOCK_F=tile.columns,
        BLOCK_K=tile.depth,
        GATHERED=gathered,
        DESCRIPTORS=descriptors,
        WEIGHTED=weights_R is not None,
        SAVED=saved,
        EVEN=F % tile.columns == 0 and D % tile.depth == 0,
        WIDEN=not source_XD.is_cuda,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return Up(h_RG, a_RF)


class Hidden(NamedTuple):
    """What the backward makes of the hidden units."""

    grad_h_RG: torch.Tensor
    a_RF: torch.Tensor | None
    grad_weights_R: torch.Tensor | None


def hidden(
    grad_RD: torch.Tensor,
    h_RG: torch.Tensor,
    counts_E: torch.Tensor,
    down_EDF: torch.Tensor,
    weights_R: torch.Tensor | None,
    kept: bool,
    tile: Tile | None = None,
) -> Hidden:
    """The gradients of h and of the gate weights, and, where `kept`, w silu(gate) up once more."""
    grad_RD, down_EDF = grad_RD.contiguous(), down_EDF.contiguous()
    (R, D), (E, _, F) = grad_RD.shape, down_EDF.shape
    chip, weighted = chip_of(grad_RD), weights_R is not None
    tile = tile or tile_of(
        product_of("hidden", grad_RD, R, E, F, D), swiglu_tile(R, E, grad_RD.element_size(), chip, accumulators=1)
    )
    blocks = triton.cdiv(F, tile.columns)
    grad_h_RG = torch.empty_like(h_RG)
    a_RF = h_RG.new_empty(R, F) if kept else None
    dots_RB = h_RG.new_empty(R, blocks, dtype=torch.float32) if weighted else None
    if R > 0:
        table_T3 = tile_table(counts_E, R, tile.rows).table_T3
        descriptors = describable(chip, grad_RD, down_EDF)
        grad, down = grad_RD, down_EDF
        if descriptors:
            grad = TensorDescriptor.from_tensor(grad_RD, [tile.rows, tile.depth])
            down = TensorDescriptor.from_tensor(down_EDF, [1, tile.depth, tile.columns])
        _hidden_kernel[(len(table_T3) * blocks,)](
            *(grad, down, weights_R, table_T3, h_RG, grad_h_RG, a_RF, dots_RB, len(table_T3), F, D),
            BLOCK_R=tile.rows,
            BLOCK_F=tile.columns,
            BLOCK_K=tile.depth,
            DESCRIPTORS=descriptors,
            WEIGHTED=weighted,
            KEPT=kept,
            EVEN=F % tile.columns == 0 and D % tile.depth == 0,
            WIDEN=not grad_RD.is_cuda,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return Hidden(grad_h_RG, a_RF, None if dots_RB is None else dots_RB.sum(1))


def shipped(chip: Chip) -> list[Build]:
    """The kernels as bfloat16 models whose sizes are multiples of the tiles run them."""
    bf16, builds = "*bf16:16", []
    common: dict[str, Any] = {
        "weights_ptr": "*fp32:16",
        "table_ptr": "*i32:16",
        "h_ptr": bf16,
        "a_ptr": bf16,
        "tiles": "i32",
    }
    common |= {"F": "i32:16", "D": "i32:16", "DESCRIPTORS": chip.descriptors, "WEIGHTED": True, "EVEN": True}
    for height in (16, 64, 128):
        tile = swiglu_tile(height, 1, 2, chip, accumulators=2)
        blocks = {"BLOCK_R": tile.rows, "BLOCK_F": tile.columns, "BLOCK_K": tile.depth, "WIDEN": False}
        arguments = {
            **{"source": bf16, "index_ptr": "*i64:16", "GATHERED": True, "SAVED": True},
            "gate_up": descriptor_type("bf16", 1, tile.columns, tile.depth) if chip.descriptors else bf16,
        }
        builds.append(Build("up", _up_kernel, common | blocks | arguments, tile, accumulators=2))
    for height in (64, 128):
        tile = swiglu_tile(height, 1, 2, chip, accumulators=1)
        blocks = {"BLOCK_R": tile.rows, "BLOCK_F": tile.columns, "BLOCK_K": tile.depth, "WIDEN": False}
        arguments = {
            **{"grad_h_ptr": bf16, "dots_ptr": "*fp32:16", "KEPT": True},
            "grad": descriptor_type("bf16", tile.rows, tile.depth) if chip.descriptors else bf16,
            "down": descriptor_type("bf16", 1, tile.depth, tile.columns) if chip.descriptors else bf16,
        }
        builds.append(Build("hidden", _hidden_kernel, common | blocks | arguments, tile))
    return builds
