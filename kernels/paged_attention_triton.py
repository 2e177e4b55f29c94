"""Decoding attention to a cache in pages as Triton kernels; paged_attention.py says what it is.

One program answers the query heads that share a key-value head (as many as a tile holds: 64) for one part of one
sequence, so a key is fetched once for all of them, and the products are large enough for tensor cores: with one query
a head they would be vectors. Where there are too few sequences to keep a chip busy, each is cut into parts of equal
length (flash-decoding, https://pytorch.org/blog/flash-decoding), and a second kernel joins them:

    part p: o_p, normalised, and lse_p = log2 sum of exp2(scores)       o = sum over p of 2^(lse_p - lse) o_p

in the order of p and without atomics, so that the same bits come out each time. How many parts there may be hangs on
the number of sequences and not on their lengths: nothing waits for the device, and a captured graph stays right.

Keys are read as a part of width A, a power of two or the width of the values where these are a part of the keys, and
the rest X, for a tile is a power of two wide: 576 = 512 + 64 (MLA), 192 = 128 + 64.

Legend: S sequences, H query heads, G key-value heads, N = H / G, P pages, B positions a page, M pages of a sequence at
most, C positions a step, Y parts, d and e widths of keys and of values.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from expertmesh.kernels.grouped_gemm_triton import dot
from expertmesh.kernels.tiles import GFX942, Build, Chip, Tile, chip_of

# At least, of a part: 5 us of reading at a multiprocessor's share of an H100's memory (8 query heads of 128 to a key),
# about what starting the second kernel takes. Reckoned, not measured.
PART_POSITIONS = 256
PARTS = 64  # at most


@triton.jit
def _columns(ptrs, at, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] from ptrs + at: zeros past WIDTH. A mask that the compiler cannot see through costs vectors."""
    if WIDTH == BLOCK:
        return tl.load(ptrs + at[None, :])
    return tl.load(ptrs + at[None, :], mask=(at < WIDTH)[None, :], other=0.0)


@triton.jit
def _span(length, window, parts, BLOCK_C: tl.constexpr, PART: tl.constexpr):
    """(first visible position, positions of a part) of a sequence."""
    first = tl.maximum(length - window, 0)
    span = tl.maximum(tl.cdiv(length - first, parts), PART)
    return first, tl.cdiv(span, BLOCK_C) * BLOCK_C


@triton.jit
def _attend_kernel(
    q_ptr,  # [S, H, d] float32 or bfloat16, contiguous
    keys_ptr,  # [P, B, G, d] dtype of q
    values_ptr,  # [P, B, G, e] dtype of q; unused if SHARED
    table_ptr,  # [S, M] int32
    lengths_ptr,  # [S] int32
    o_ptr,  # [S, H, e] dtype of q, output; [S, Y, H, e] float32 if SPLIT
    lse_ptr,  # [S, Y, H] float32, output; unused without SPLIT
    G,
    parts,
    window,
    scale,  # of scores as powers of 2
    stride_table,
    key_page,
    key_position,
    key_head,
    value_page,
    value_position,
    value_head,
    N: tl.constexpr,
    A: tl.constexpr,
    X: tl.constexpr,
    E: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PART: tl.constexpr,  # fewest positions of a part
    SPLIT: tl.constexpr,
    SHARED: tl.constexpr,  # values are the first E numbers of the keys, and A = E
    WIDEN: tl.constexpr,
):
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    # Programs that read the same keys are neighbours, and find them in the cache.
    program = tl.program_id(0)
    block, g = program % BLOCKS, program // BLOCKS % G
    part, s = program // (BLOCKS * G) % parts, program // (BLOCKS * G * parts)
    length = tl.load(lengths_ptr + s)
    first, span = _span(length, window, parts, BLOCK_C, PART)
    start = first + part * span
    end = tl.minimum(start + span, length)
    if SPLIT and start >= end:
        return
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    H = G * N
    a, e, step = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_C)
    q_ptrs = q_ptr + ((s.to(tl.int64) * H + g * N + tl.minimum(n, N - 1)) * (A + X))[:, None]
    q_a = _columns(q_ptrs, a, A, BLOCK_A)
    if X > 0:
        x = tl.arange(0, BLOCK_X)
        q_x = _columns(q_ptrs + A, x, X, BLOCK_X)
    top = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_E), dtype=tl.float32)
    pages = table_ptr + s.to(tl.int64) * stride_table
    # Past the end the last position is read again: what lies there unwritten may be NaN, and a weight of 0 is no help.
    # The pages of a step are looked up during the one before, or the keys would not be fetched ahead (sm_90: 38 KiB of
    # buffers for three stages, in place of 70).
    last = tl.maximum(end - 1, 0)
    c = tl.minimum(start + step, last)
    page = tl.load(pages + c // PAGE)
    for position in range(start, end, BLOCK_C):
        key_ptrs = keys_ptr + (page.to(tl.int64) * key_page + (c % PAGE) * key_position + g * key_head)[:, None]
        k = _columns(key_ptrs, a, A, BLOCK_A)
        scores = dot(q_a, k.T, tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32), WIDEN)
        if X > 0:
            scores = dot(q_x, _columns(key_ptrs + A, x, X, BLOCK_X).T, scores, WIDEN)
        if SHARED:
            v = k
        else:
            value_ptrs = (
                values_ptr + (page.to(tl.int64) * value_page + (c % PAGE) * value_position + g * value_head)[:, None]
            )
            v = _columns(value_ptrs, e, E, BLOCK_E)
        scores = tl.where((position + step < end)[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shrunk = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrunk + tl.sum(weights, 1)
        acc = dot(weights.to(v.dtype), v, acc * shrunk[:, None], WIDEN)
        top = higher
        c = tl.minimum(position + BLOCK_C + step, last)
        page = tl.load(pages + c // PAGE)
    acc = acc / tl.maximum(total, 1.0)[:, None]  # the highest score adds 1 to the total; it is 0 without positions
    row = (s * parts + part).to(tl.int64) * H + g * N + n
    stored = n < N
    if SPLIT:
        tl.store(lse_ptr + row, top + tl.log2(total), mask=stored)
    stored = stored[:, None] if E == BLOCK_E else stored[:, None] & (e < E)[None, :]
    tl.store(o_ptr + row[:, None] * E + e[None, :], acc.to(o_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _join_kernel(
    parts_ptr,  # [S, Y, H, e] float32
    lse_ptr,  # [S, Y, H] float32
    lengths_ptr,  # [S] int32
    o_ptr,  # [S, H, e] float32 or bfloat16, output
    H,
    parts,
    window,
    E: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_C: tl.constexpr,  # of the kernel that made the parts
    BLOCK_E: tl.constexpr,
    PART: tl.constexpr,
):
    s, h = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths_ptr + s)
    first, span = _span(length, window, parts, BLOCK_C, PART)
    used = tl.cdiv(length - first, span)  # the others wrote nothing
    y, e = tl.arange(0, BLOCK_Y), tl.arange(0, BLOCK_E)
    row = s.to(tl.int64) * parts * H + h
    top = tl.max(tl.load(lse_ptr + row + y * H, mask=y < used, other=float("-inf")), 0)
    total = 0.0
    acc = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for _ in range(0, used):
        weight = tl.exp2(tl.load(lse_ptr + row) - top)
        part = parts_ptr + row * E + e
        total += weight
        acc += weight * (tl.load(part) if E == BLOCK_E else tl.load(part, mask=e < E, other=0.0))
        row += H
    o = (acc / tl.maximum(total, 1.0)).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + (s.to(tl.int64) * H + h) * E + e, o, mask=e < E)


class Widths(NamedTuple):
    """How keys are read: `a` numbers by a tile `block_a` wide, then `x` by one of `block_x` (0: none)."""

    a: int
    block_a: int
    x: int
    block_x: int
    block_e: int


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))  # of a matrix instruction, at least


def widths(d: int, e: int, shared: bool) -> Widths:
    """The cut of keys of width d; where the values are a part of them they are the first cut, to be read once."""
    a = e if shared else 1 << d.bit_length() - 1
    return Widths(a, _block(a), d - a, _block(d - a) if d > a else 0, _block(e))


def attention_tile(heads: int, d: int, e: int, itemsize: int, shared: bool, chip: Chip) -> Tile:
    """`rows` query heads of one key-value head, `columns` numbers of a value, `depth` positions a step.

    A step's keys and values take a quarter of a program's shared memory: two buffers of them, and the queries. Heads
    beyond the tile fetch the keys again, from the cache. 64 of them with values of 512 (MLA) would need more registers
    than there are (sm_90: 184 bytes a thread in memory with 8 warps, 392 with 16), so these are 32.
    """
    cut = widths(d, e, shared)
    rows = min(64, 64 * 512 // (cut.block_e * itemsize), _block(heads))
    position_bytes = (cut.block_a + cut.block_x + (0 if shared else cut.block_e)) * itemsize
    depth = min(64, max(16, 1 << (chip.shared_bytes // 4 // position_bytes).bit_length() - 1))
    return Tile(rows, cut.block_e, depth, 8 if rows * cut.block_e >= 64 * 256 else 4, 2 if chip == GFX942 else 3)


def parts_for(programs: int, positions: int, chip: Chip) -> int:
    """In how many parts a sequence of up to `positions` is cut where whole sequences would be so many programs."""
    return max(1, min(2 * chip.multiprocessors // max(programs, 1), triton.cdiv(positions, PART_POSITIONS), PARTS))


def part_span(positions: int, parts: int, depth: int) -> int:
    """How many positions a part has, as `_span` says it; the last part of a sequence may have fewer."""
    return triton.cdiv(max(triton.cdiv(positions, parts), PART_POSITIONS), depth) * depth


def paged_attention(
    q_SHd: torch.Tensor,
    keys_PBGd: torch.Tensor,
    values_PBGe: torch.Tensor,
    table_SM: torch.Tensor,
    lengths_S: torch.Tensor,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """[S, H, e]: the answer to the newest token of each sequence."""
    q_SHd = q_SHd.contiguous()
    (S, H, d), (_, size, G, e), chip = q_SHd.shape, values_PBGe.shape, chip_of(q_SHd)
    assert keys_PBGd.stride(3) == values_PBGe.stride(3) == table_SM.stride(1) == 1, "the last dimension has gaps"
    o_SHe = q_SHd.new_empty(S, H, e)
    if S * table_SM.shape[1] == 0:
        return o_SHe.zero_()
    shared = values_PBGe.data_ptr() == keys_PBGd.data_ptr() and values_PBGe.stride() == keys_PBGd.stride()
    cut, tile = widths(d, e, shared), attention_tile(H // G, d, e, q_SHd.element_size(), shared, chip)
    programs, positions = S * G * triton.cdiv(H // G, tile.rows), table_SM.shape[1] * size
    window = positions if window is None else window
    parts = parts_for(programs, min(positions, window), chip)
    parts_SYHe, lse_SYH = o_SHe, None
    if parts > 1:
        parts_SYHe = q_SHd.new_empty(S, parts, H, e, dtype=torch.float32)
        lse_SYH = q_SHd.new_empty(S, parts, H, dtype=torch.float32)
    _attend_kernel[(programs * parts,)](
        *(q_SHd, keys_PBGd, values_PBGe, table_SM, lengths_S, parts_SYHe, lse_SYH),
        *(G, parts, window, scale / math.log(2), table_SM.stride(0)),
        *(*keys_PBGd.stride()[:3], *values_PBGe.stride()[:3]),
        N=H // G,
        A=cut.a,
        X=cut.x,
        E=e,
        PAGE=size,
        BLOCK_N=tile.rows,
        BLOCK_C=tile.depth,
        BLOCK_A=cut.block_a,
        BLOCK_X=cut.block_x,
        BLOCK_E=cut.block_e,
        PART=PART_POSITIONS,
        SPLIT=parts > 1,
        SHARED=shared,
        WIDEN=not q_SHd.is_cuda,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if parts > 1:
        _join_kernel[(S, H)](
            *(parts_SYHe, lse_SYH, lengths_S, o_SHe, H, parts, window),
            E=e,
            BLOCK_Y=triton.next_power_of_2(parts),
            BLOCK_C=tile.depth,
            BLOCK_E=cut.block_e,
            PART=PART_POSITIONS,
            num_warps=_join_warps(cut.block_e),
        )
    return o_SHe


def _join_warps(block_e: int) -> int:
    return max(1, block_e // 128)  # 16 bytes a thread


class Heads(NamedTuple):
    """The attention of a model that the kernel is shipped for."""

    name: str
    shared_by: int  # query heads of a key-value head
    d: int
    e: int
    shared: bool


SHIPPED = [
    Heads("grouped queries", 8, 128, 128, False),  # Qwen3, Llama 3, Mixtral
    Heads("MFA", 64, 256, 256, False),  # Step-3
    Heads("MLA", 128, 576, 512, True),  # DeepSeek-V3, absorbed
]
PAGE = 64


def shipped(chip: Chip) -> list[Build]:
    """The kernels at the widths of bfloat16 models, each sequence whole, and in parts."""
    builds = []
    for heads in SHIPPED:
        cut = widths(heads.d, heads.e, heads.shared)
        tile = attention_tile(heads.shared_by, heads.d, heads.e, 2, heads.shared, chip)
        arguments: dict[str, Any] = {
            **dict.fromkeys(("q_ptr", "keys_ptr", "values_ptr"), "*bf16:16"),
            **{"table_ptr": "*i32:16", "lengths_ptr": "*i32:16", "scale": "fp32"},
            **dict.fromkeys(("G", "parts"), "i32"),
            **dict.fromkeys(("window", "stride_table"), "i32:16"),
            **{f"{what}_{of}": "i32:16" for what in ("key", "value") for of in ("page", "position", "head")},
            **{"N": heads.shared_by, "A": cut.a, "X": cut.x, "E": heads.e, "PAGE": PAGE},
            **{"BLOCK_N": tile.rows, "BLOCK_C": tile.depth, "BLOCK_A": cut.block_a, "BLOCK_X": cut.block_x},
            **{"BLOCK_E": cut.block_e, "PART": PART_POSITIONS, "SHARED": heads.shared, "WIDEN": False},
        }
        for split in (False, True):
            outputs = {"o_ptr": "*fp32:16", "lse_ptr": "*fp32:16"} if split else {"o_ptr": "*bf16:16", "lse_ptr": None}
            name = f"paged {heads.name}{' in parts' if split else ''}"
            builds.append(Build(name, _attend_kernel, arguments | outputs | {"SPLIT": split}, tile, accumulators=2))
        join: dict[str, Any] = {
            **{"parts_ptr": "*fp32:16", "lse_ptr": "*fp32:16", "lengths_ptr": "*i32:16", "o_ptr": "*bf16:16"},
            **{"H": "i32", "parts": "i32", "window": "i32", "E": heads.e, "BLOCK_Y": PARTS, "BLOCK_C": tile.depth},
            **{"BLOCK_E": cut.block_e, "PART": PART_POSITIONS},
        }
        joined = Tile(1, cut.block_e, 1, _join_warps(cut.block_e), 3)
        builds.append(Build(f"join {heads.name}", _join_kernel, join, joined))
    return builds
