"""The experts' forward products where a whole batch has a few rows, as when one request or a handful is decoded.

Then all that counts is how fast weights arrive. Against the grouped GEMM's kernels these do three things otherwise:

- No table of tiles: all rows of an expert are one tile, and a program finds its expert in the counts. One launch less.
- The weights are the left operand. 16 rows are too low for the tensor cores of sm_90 in one piece, 64 columns are not.
- As many programs as keep a chip busy: columns are cut down to 32 a program, and after that the inner width into parts,
  whose sums a second kernel adds in order, so that there are no atomics and the same bits each time.

    counts_E = [0, 3, 0, 1], 4 rows     programs 0 and 1 take the experts 1 and 3; 2 and 3 find that there are no more

Every active expert's weights are read once. `multiply` and `up` are those of the grouped GEMM and SwiGLU, which they
call themselves where there are more rows. The rule is `few_rows_cut` in tiles.py.

Legend: X source rows, R rows sorted by expert, E experts, K inner width, N output width, Y parts of the inner width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from expertmesh.kernels import grouped_gemm_triton, grouped_swiglu_triton
from expertmesh.kernels.grouped_gemm_triton import dot
from expertmesh.kernels.grouped_swiglu_triton import Up
from expertmesh.kernels.tiles import Build, Chip, Cut, Tile, chip_of, few_rows_cut


@triton.jit
def _finish(gate, up, factor, r, n, N, inside, h_ptr, out_ptr, TWO: tl.constexpr, SAVED: tl.constexpr):
    """Store finished sums of rows r and columns n, which fit each other's shape; TWO: of a hidden unit's two halves."""
    row = r.to(tl.int64)
    out = gate
    if TWO:
        if SAVED:
            h_ptrs = h_ptr + row * (2 * N) + n
            tl.store(h_ptrs, gate.to(h_ptr.dtype.element_ty), mask=inside)
            tl.store(h_ptrs + N, up.to(h_ptr.dtype.element_ty), mask=inside)
        out = gate * tl.sigmoid(gate) * up * factor
    tl.store(out_ptr + row * N + n, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gemv_kernel(
    rows_ptr,  # [X, K] float32 or bfloat16, contiguous
    index_ptr,  # [R] int64 row of rows for each row; unused without GATHERED
    weights_ptr,  # [E, N, K], or [E, 2N, K] if TWO, dtype of rows, the last dimension contiguous
    counts_ptr,  # [E] int64
    factors_ptr,  # [R] float32 factor of each row's answer; unused without WEIGHTED
    h_ptr,  # [R, 2N] dtype of rows, output; unused without SAVED
    out_ptr,  # [R, N] dtype of rows, output; [Y, R, N or 2N] float32 if SPLIT
    E,
    R,
    N,
    K,
    parts,
    stride_e,
    stride_n,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,  # holds all rows, whosever they are
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TWO: tl.constexpr,  # a gate and an up projection: silu(gate) * up comes out
    GATHERED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SAVED: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,  # K is a multiple of BLOCK_K
    WIDEN: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks % parts
    place = tl.program_id(0) // (blocks * parts)
    e = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + e, mask=e < E, other=0).to(tl.int32)
    used = (counts > 0).to(tl.int32)
    mine = (tl.cumsum(used, 0) == place + 1) & (counts > 0)
    count = tl.sum(tl.where(mine, counts, 0), 0)
    if count == 0:
        return
    expert = tl.sum(tl.where(mine, e, 0), 0)
    first_row = tl.sum(tl.where(e < expert, counts, 0), 0)
    r = first_row + tl.arange(0, BLOCK_R)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Columns past the end repeat the last one, so that weights need no mask. Rows have one that no step changes: most
    # of a tile is no row at all, and repeating one would ask the cache for up to half as much again as the weights.
    there = (r < first_row + count)[None, :]
    known = tl.minimum(r, first_row + count - 1)
    source = tl.load(index_ptr + known) if GATHERED else known.to(tl.int64)
    span = tl.cdiv(tl.cdiv(K, parts), BLOCK_K) * BLOCK_K
    start = part * span
    row_ptrs = rows_ptr + source[None, :] * K + (start + k)[:, None]
    weight_ptrs = weights_ptr + expert.to(tl.int64) * stride_e + (start + k)[None, :]
    weight_ptrs += tl.minimum(n, N - 1).to(tl.int64)[:, None] * stride_n
    gate = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for k_start in range(start, tl.minimum(start + span, K), BLOCK_K):
        if EVEN:
            x = tl.load(row_ptrs, mask=there, other=0.0)
            gate = dot(tl.load(weight_ptrs), x, gate, WIDEN)
            if TWO:
                up = dot(tl.load(weight_ptrs + tl.cast(N, tl.int64) * stride_n), x, up, WIDEN)
        else:
            inside = k < K - k_start
            x = tl.load(row_ptrs, mask=inside[:, None] & there, other=0.0)
            gate = dot(tl.load(weight_ptrs, mask=inside[None, :], other=0.0), x, gate, WIDEN)
            if TWO:
                up_ptrs = weight_ptrs + tl.cast(N, tl.int64) * stride_n
                up = dot(tl.load(up_ptrs, mask=inside[None, :], other=0.0), x, up, WIDEN)
        row_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    inside = (r < first_row + count)[:, None] & (n < N)[None, :]
    if SPLIT:
        WIDTH: tl.constexpr = 2 if TWO else 1
        at = out_ptr + (part * R + r[:, None]).to(tl.int64) * (WIDTH * N) + n[None, :]
        tl.store(at, gate.T, mask=inside)
        if TWO:
            tl.store(at + N, up.T, mask=inside)
    else:
        factor = tl.load(factors_ptr + known)[:, None] if WEIGHTED else 1.0
        _finish(gate.T, up.T, factor, r[:, None], n[None, :], N, inside, h_ptr, out_ptr, TWO, SAVED)


@triton.jit
def _add_parts_kernel(
    parts_ptr,  # [Y, R, N], or [Y, R, 2N] if TWO, float32
    factors_ptr,  # [R] float32; unused without WEIGHTED
    h_ptr,  # [R, 2N] dtype of out, output; unused without SAVED
    out_ptr,  # [R, N] float32 or bfloat16, output
    R,
    N,
    parts,
    BLOCK_N: tl.constexpr,
    TWO: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SAVED: tl.constexpr,
    EVEN: tl.constexpr,  # N is a multiple of BLOCK_N
):
    r = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (n >= 0) if EVEN else (n < N)
    WIDTH: tl.constexpr = 2 if TWO else 1
    at = parts_ptr + r.to(tl.int64) * (WIDTH * N) + n
    gate = tl.zeros((BLOCK_N,), dtype=tl.float32)
    up = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for _ in range(parts):
        gate += tl.load(at, mask=inside, other=0.0)
        if TWO:
            up += tl.load(at + N, mask=inside, other=0.0)
        at += R * (WIDTH * N)
    factor = tl.load(factors_ptr + r) if WEIGHTED else 1.0
    _finish(gate, up, factor, r, n, N, inside, h_ptr, out_ptr, TWO, SAVED)


def _apply(
    rows: torch.Tensor,
    index_R: torch.Tensor | None,
    weights_ENK: torch.Tensor,
    counts_E: torch.Tensor,
    factors_R: torch.Tensor | None,
    h_RG: torch.Tensor | None,
    out_RN: torch.Tensor,
    two: bool,
    cut: Cut,
) -> None:
    (R, N), E, K, tile, parts = out_RN.shape, len(counts_E), rows.shape[1], cut.tile, cut.parts
    switches = {"TWO": two, "WEIGHTED": factors_R is not None, "SAVED": h_RG is not None}
    sums = out_RN if parts == 1 else rows.new_empty(parts, R, weights_ENK.shape[1], dtype=torch.float32)
    _gemv_kernel[(min(R, E) * parts * triton.cdiv(N, tile.columns),)](
        *(rows, index_R, weights_ENK, counts_E, factors_R, h_RG, sums, E, R, N, K, parts, *weights_ENK.stride()[:2]),
        BLOCK_E=triton.next_power_of_2(E),
        BLOCK_R=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        GATHERED=index_R is not None,
        SPLIT=parts > 1,
        EVEN=K % tile.depth == 0,
        WIDEN=not rows.is_cuda,
        **switches,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if parts > 1:
        _add_parts_kernel[(R, triton.cdiv(N, ADD_TILE.columns))](
            *(sums, factors_R, h_RG, out_RN, R, N, parts),
            BLOCK_N=ADD_TILE.columns,
            EVEN=N % ADD_TILE.columns == 0,
            **switches,
            num_warps=ADD_TILE.warps,
        )


ADD_TILE = Tile(1, 256, 1, 1, 3)  # 16 bytes a thread of bfloat16


def multiply(rows_RK: torch.Tensor, weights_ENK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """[R, N]: row r of expert e times weights[e] transposed; by these kernels where rows are few."""
    (R, K), (E, N, _) = rows_RK.shape, weights_ENK.shape
    cut = few_rows_cut(R, E, N, K, rows_RK.element_size(), chip_of(rows_RK))
    if cut is None or weights_ENK.stride(2) != 1:  # transposed weights are asked for in training only
        return grouped_gemm_triton.multiply(rows_RK, weights_ENK, counts_E)
    out_RN = rows_RK.new_empty(R, N)
    _apply(rows_RK.contiguous(), None, weights_ENK, counts_E, None, None, out_RN, False, cut)
    return out_RN


def up(
    source_XD: torch.Tensor,
    index_R: torch.Tensor | None,
    counts_E: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    weights_R: torch.Tensor | None,
    saved: bool,
) -> Up:
    """h = gate_up @ row, where `saved`, and w silu(gate) up; by these kernels where rows are few."""
    R, (E, G, D) = len(source_XD if index_R is None else index_R), gate_up_EGD.shape
    cut = few_rows_cut(R, E, G // 2, D, source_XD.element_size(), chip_of(source_XD), accumulators=2)
    if cut is None:
        return grouped_swiglu_triton.up(source_XD, index_R, counts_E, gate_up_EGD, weights_R, saved)
    h_RG, a_RF = source_XD.new_empty(R, G) if saved else None, source_XD.new_empty(R, G // 2)
    source_XD, gate_up_EGD = source_XD.contiguous(), gate_up_EGD.contiguous()
    _apply(source_XD, index_R, gate_up_EGD, counts_E, weights_R, h_RG, a_RF, True, cut)
    return Up(h_RG, a_RF)


def shipped(chip: Chip) -> list[Build]:
    """The kernels as bfloat16 models whose sizes are multiples of the tiles run them, with 8 rows and with 32."""
    builds: list[Build] = []
    pointers = {name: "*bf16:16" for name in ("rows_ptr", "weights_ptr", "h_ptr", "out_ptr")}
    numbers = {"E": "i32", "R": "i32", "parts": "i32", **dict.fromkeys(("N", "K", "stride_e", "stride_n"), "i32:16")}
    common: dict[str, Any] = pointers | numbers | {"index_ptr": "*i64:16", "counts_ptr": "*i64:16", "BLOCK_E": 128}
    common |= {"factors_ptr": "*fp32:16", "EVEN": True, "WIDEN": False, "SAVED": False}
    for two in (False, True):
        for rows, columns, inner in ((8, 1 << 16, 4096), (8, 512, 4096), (32, 1 << 16, 4096)):
            cut = few_rows_cut(rows, 8, columns, inner, 2, chip, accumulators=2 if two else 1)
            assert cut is not None
            tile, split = cut.tile, cut.parts > 1
            arguments: dict[str, Any] = {"TWO": two, "GATHERED": two, "WEIGHTED": two, "SPLIT": split}
            arguments |= {"BLOCK_R": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth}
            arguments |= {"out_ptr": "*fp32:16"} if split else {}
            name = f"few rows {'up' if two else 'multiply'}{' in parts' if split else ''}"
            build = Build(name, _gemv_kernel, common | arguments, tile, accumulators=2 if two else 1)
            if build not in builds:
                builds.append(build)
        add: dict[str, Any] = {"parts_ptr": "*fp32:16", "BLOCK_N": ADD_TILE.columns, "TWO": two, "WEIGHTED": two}
        builds.append(Build("few rows add up" if two else "few rows add", _add_parts_kernel, common | add, ADD_TILE))
    return builds
