"""How the grouped GEMMs cut their work: tiles by a written rule, and a table of them that the device makes for itself.

The rule (no timing when a program starts; figures in `choose_tile`) takes tokens per expert, width, dtype and chip.
The rows of an expert are cut into tiles of BLOCK_R; how many that gives only the device knows, so the table has the
most there can be and the unused rest says so:

    counts_E = [3, 0, 5], BLOCK_R = 4      table_T3 = [[0, 0, 3], [2, 3, 8], [2, 7, 8], [-1, 0, 0], [-1, 0, 0]]
                                                       expert, first row, end of the expert's rows

Legend: R rows, E experts, T tiles of rows, N output width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

DESCRIPTOR_ALIGNMENT = 16  # bytes, of the base and of every stride


class Chip(NamedTuple):
    """What tiles depend on."""

    name: str
    descriptors: bool  # tensor memory access: blocks are fetched by hardware, bounds included
    shared_bytes: int  # that one program may have
    multiprocessors: int


SM_80 = Chip("sm_80", False, 163 * 1024, 108)
SM_90 = Chip("sm_90", True, 227 * 1024, 132)
SM_100 = Chip("sm_100", True, 227 * 1024, 148)
GFX942 = Chip("gfx942", False, 64 * 1024, 304)
CHIPS = {chip.name: chip for chip in (SM_80, SM_90, SM_100, GFX942)}


def chip_of(tensor: torch.Tensor) -> Chip:
    """The chip that the tensor lies on; for CPU tensors (Triton's interpreter) the one most is written for."""
    if not tensor.is_cuda:
        return SM_90
    if torch.version.hip:
        return GFX942
    major = torch.cuda.get_device_capability(tensor.device)[0]
    return SM_80 if major < 9 else SM_90 if major == 9 else SM_100


class Tile(NamedTuple):
    """One program's part of a product, and how it works on it."""

    rows: int
    columns: int
    depth: int  # of the inner dimension, a step
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth}, {self.warps} warps, {self.stages} stages"


class Build(NamedTuple):
    """A kernel at sizes that it is shipped for, to be compiled without a device (ahead_of_time.py)."""

    name: str
    kernel: Any
    arguments: dict[str, Any]  # by parameter: "*bf16:16", "i32:16", "desc:bf16[1, 64, 64]", or the constant itself
    tile: Tile
    accumulators: int = 1  # products of the tile's size in one step of the inner loop
    operand_bytes: int = 2  # of a number as the tensor cores read it


def choose_tile(rows: int, experts: int, columns: int, itemsize: int, chip: Chip, wide: bool = True) -> Tile:
    """The tile of a product of `rows` sorted rows with the weights of `experts`.

    A tile is as tall as an average group: a taller one computes rows that nobody has, a lower one reads weights more
    often. At full height it is 256 wide where `wide` (one accumulator and no epilogue to speak of): a step of
    128x256x64 asks for 1.5 times the bytes of 128x128x64 and does twice the work; 4 warps do not hold it. Each
    operand's row of a step is 128 bytes, the widest that shared memory is swizzled for.
    """
    height = min(128, max(16, triton.next_power_of_2(triton.cdiv(max(rows, 1), max(experts, 1)))))
    depth = 128 // itemsize
    if chip.shared_bytes < SM_80.shared_bytes:  # AMD: two buffers of what fits in 64 KiB
        return Tile(height, 128, depth // 2, 8 if height == 128 else 4, 2)
    width = 256 if wide and chip.descriptors and height == 128 and columns > 128 and itemsize == 2 else 128
    stages = 4 if width == 256 else 3  # 192 KiB of buffers; 96 KiB, so that two programs share a multiprocessor
    # 4 warps at 128x128 issue two thirds of what 8 do for a step (sm_90: 0.19 against 0.34 of the issue slots).
    warps = 8 if width == 256 or (height == 128 and not chip.descriptors) else 4
    return Tile(height, width, depth, warps, stages)


class Cut(NamedTuple):
    """How a product of few rows is spread over a chip."""

    tile: Tile
    parts: int  # of the inner width


FEW_ROWS = 32  # the rows of all experts together


def few_rows_cut(
    rows: int, experts: int, columns: int, inner: int, itemsize: int, chip: Chip, accumulators: int = 1
) -> Cut | None:
    """The cut of a product of so few rows that one tile holds them, whosever they are; None where there are more.

    Two programs for each multiprocessor are wanted, with a step's operands three times in half of its shared memory.
    Narrow tiles give them for nothing, since each row of weights is still 256 bytes in a piece; parts of the inner
    width cost a second kernel, and are 4 steps at least.
    """
    if not 0 < rows <= FEW_ROWS:
        return None
    active, wanted = min(rows, experts), 2 * chip.multiprocessors
    widths = [width for width in (128, 64, 32) if width * accumulators <= 128]
    width = next((w for w in widths if active * triton.cdiv(columns, w) >= wanted), widths[-1])
    programs, height = active * triton.cdiv(columns, width), 16 if rows <= 16 else 32
    fits = 3 * (height + width * accumulators) * 256 <= chip.shared_bytes // 2
    depth = (256 if fits else 128) // itemsize
    parts = max(1, min(triton.cdiv(wanted, programs), inner // (4 * depth)))
    return Cut(Tile(height, width, depth, 4, 2 if chip == GFX942 else 3), parts)


@triton.jit
def _tile_table_kernel(
    counts_ptr,  # [E] int64
    table_ptr,  # [tiles, 3] int32, output
    starts_ptr,  # [E + 1] int32, output
    E,
    tiles,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    expert = tl.program_id(0)  # the last program has no expert, and marks what is left over
    e = tl.arange(0, BLOCK_E)
    before = tl.load(counts_ptr + e, mask=e < expert, other=0).to(tl.int32)
    first_row = tl.sum(before, 0)
    first_tile = tl.sum((before + BLOCK_R - 1) // BLOCK_R, 0)
    tl.store(starts_ptr + expert, first_row)
    count = tl.load(counts_ptr + expert, mask=expert < E, other=0).to(tl.int32)
    if expert == E:
        here = tiles - first_tile
        named, step, row_end = -1, 0, 0
        first_row = 0
    else:
        here = (count + BLOCK_R - 1) // BLOCK_R
        named, step, row_end = expert, BLOCK_R, first_row + count
    for block in range(0, here, BLOCK_T):
        t = block + tl.arange(0, BLOCK_T)
        inside = t < here
        at = table_ptr + (first_tile + t) * 3
        tl.store(at, tl.zeros_like(t) + named, mask=inside)
        tl.store(at + 1, first_row + t * step, mask=inside)
        tl.store(at + 2, tl.zeros_like(t) + row_end, mask=inside)


class Tiles(NamedTuple):
    """Where each tile's rows are."""

    table_T3: torch.Tensor
    """int32: expert (-1: unused), first row, end of the expert's rows."""
    starts_E1: torch.Tensor
    """int32 first row of each expert, and R."""


def tile_table(counts_E: torch.Tensor, rows: int, block_rows: int) -> Tiles:
    """Cut each expert's rows into tiles, on the device, in one launch and without a wait."""
    E = counts_E.numel()
    tiles = triton.cdiv(rows, block_rows) + E
    table_T3 = torch.empty(tiles, 3, dtype=torch.int32, device=counts_E.device)
    starts_E1 = torch.empty(E + 1, dtype=torch.int32, device=counts_E.device)
    _tile_table_kernel[(E + 1,)](
        *(counts_E, table_T3, starts_E1, E, tiles),
        BLOCK_R=block_rows,
        BLOCK_E=triton.next_power_of_2(max(E, 1)),
        BLOCK_T=128,
    )
    return Tiles(table_T3, starts_E1)


def tile_table_ref(counts_E: torch.Tensor, rows: int, block_rows: int) -> Tiles:
    """The definition of `tile_table`: one expert after the other."""
    table, starts = [], [0]
    for expert, count in enumerate(counts_E.tolist()):
        end = starts[-1] + count
        table += [[expert, first, end] for first in range(starts[-1], end, block_rows)]
        starts.append(end)
    table += [[-1, 0, 0]] * (triton.cdiv(rows, block_rows) + len(counts_E) - len(table))
    return Tiles(torch.tensor(table, dtype=torch.int32).view(-1, 3), torch.tensor(starts, dtype=torch.int32))


@triton.jit
def swizzle(program, tiles, blocks, GROUP: tl.constexpr):
    """(tile of rows, block of columns) of a program: GROUP tiles at a time share each block's weights in the cache."""
    per_group = GROUP * blocks
    first = program // per_group * GROUP
    height = tl.minimum(tiles - first, GROUP)
    within = program % per_group
    return first + within % height, within // height


def describable(chip: Chip, *tensors: torch.Tensor) -> bool:
    """Whether hardware can fetch blocks of all of them: aligned, the last dimension contiguous, something there."""
    return chip.descriptors and all(
        t.numel() > 0
        and t.stride(-1) == 1
        and t.data_ptr() % DESCRIPTOR_ALIGNMENT == 0
        and all(stride * t.element_size() % DESCRIPTOR_ALIGNMENT == 0 for stride in t.stride()[:-1])
        for t in tensors
    )


def descriptor_type(dtype: str, *block: int) -> str:
    """How a `Build` spells a descriptor of blocks of this shape."""
    return f"desc:{dtype}[{', '.join(map(str, block))}]"
