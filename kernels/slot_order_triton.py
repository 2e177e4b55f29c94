"""The order of the experts' rows as Triton kernels: a stable counting sort of slots by expert.

Each tile of slots counts its experts; sums over the tiles before it, and over the experts before each, say where its
first slot of an expert goes; within a tile the slots before decide. All of it is integer sums in a fixed order and
without atomics, so the order is the same on every run. Slots of other experts (zero-computation ones) take no part:

    experts  2 0 | 0 5 | 1 0      3 FFN experts, tiles of 2 slots      slots by expert  1 2 5 | 4 | 0

Legend: S slots, E FFN experts, B tiles of slots.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from expertmesh.kernels.ops import operation
from expertmesh.kernels.tiles import Build, Chip, Tile


@triton.jit
def _slot_counts_kernel(
    experts_ptr,  # [S] int64
    counts_ptr,  # [tiles, E] int32, output
    S,
    E,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    expert = tl.load(experts_ptr + s, mask=s < S, other=-1)
    counts = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + tl.program_id(0) * E + e, counts, mask=e < E)


@triton.jit
def _slot_places_kernel(
    experts_ptr,  # [S] int64
    firsts_ptr,  # [tiles, E] int64 row of the first slot of each expert in each tile
    slots_ptr,  # [R, at least] int64, output
    S,
    E,
    BLOCK_S: tl.constexpr,
):
    i = tl.arange(0, BLOCK_S)
    s = tl.program_id(0) * BLOCK_S + i
    expert = tl.load(experts_ptr + s, mask=s < S, other=-1)
    has_row = (expert >= 0) & (expert < E)
    same = (expert[:, None] == expert[None, :]) & (i[None, :] < i[:, None])
    place = tl.load(firsts_ptr + tl.program_id(0).to(tl.int64) * E + expert, mask=has_row, other=0)
    place += tl.sum(same.to(tl.int32), 1)  # a stable sort: those before it in the tile
    tl.store(slots_ptr + place, s.to(tl.int64), mask=has_row)


SLOTS_TILE = Tile(64, 64, 1, 4, 3)


def _fake_sort_slots(experts_TK: torch.Tensor, ffn_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    return experts_TK.new_empty(experts_TK.numel()), experts_TK.new_empty(ffn_experts)


@operation("sort_slots(Tensor experts, int ffn_experts) -> (Tensor, Tensor)", _fake_sort_slots)
def sort_slots_triton(experts_TK: torch.Tensor, ffn_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(slots, counts_E): the stable counting sort of `sort_slots`, and as many numbers more as there are other slots.

    Integer sums in a fixed order, so the result is the same on every run.
    """
    flat, E = experts_TK.contiguous().view(-1), ffn_experts
    S, tiles = len(flat), triton.cdiv(len(flat), SLOTS_TILE.rows)
    counts_BE = torch.zeros(tiles, E, dtype=torch.int32, device=flat.device)
    slots = torch.empty_like(flat)
    if S and E:
        _slot_counts_kernel[(tiles, triton.cdiv(E, SLOTS_TILE.columns))](
            *(flat, counts_BE, S, E), BLOCK_S=SLOTS_TILE.rows, BLOCK_E=SLOTS_TILE.columns, num_warps=SLOTS_TILE.warps
        )
    ends_BE = counts_BE.cumsum(0)
    counts_E = ends_BE[-1].clone() if tiles else counts_BE.new_zeros(E, dtype=torch.int64)
    firsts_BE = ends_BE - counts_BE + (counts_E.cumsum(0) - counts_E)
    if S and E:
        _slot_places_kernel[(tiles,)](
            *(flat, firsts_BE, slots, S, E), BLOCK_S=SLOTS_TILE.rows, num_warps=SLOTS_TILE.warps
        )
    return slots, counts_E


def shipped(chip: Chip) -> list[Build]:
    """The kernels; nothing about them hangs on a model."""
    slots: dict[str, Any] = {"experts_ptr": "*i64:16", "S": "i32:16", "E": "i32:16", "BLOCK_S": SLOTS_TILE.rows}
    counts = slots | {"counts_ptr": "*i32:16", "BLOCK_E": SLOTS_TILE.columns}
    places = slots | {"firsts_ptr": "*i64:16", "slots_ptr": "*i64:16"}
    return [
        Build("slot counts", _slot_counts_kernel, counts, SLOTS_TILE),
        Build("slot places", _slot_places_kernel, places, SLOTS_TILE),
    ]
