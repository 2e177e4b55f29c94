"""Tiles: the table covers every row once and in order, and the rule gives tiles that a chip can hold."""

from __future__ import annotations

import pytest
import torch

from expertmesh.kernels.tiles import CHIPS, SM_80, SM_90, choose_tile, describable, tile_table, tile_table_ref

COUNTS = [
    ([3, 0, 5], 4, "the example of the docstring"),
    ([0, 0], 16, "no rows: every tile is unused"),
    ([], 16, "no experts"),
    ([16, 32, 1], 16, "groups that end at a tile, and one row"),
    ([0, 5000, 0], 16, "all rows on one expert: more tiles than a program writes at once"),
    ([1] * 37, 16, "a row each"),
]


@pytest.mark.parametrize(("counts", "block"), [c[:2] for c in COUNTS], ids=[c[2] for c in COUNTS])
def test_table(counts, block):
    counts_E = torch.tensor(counts, dtype=torch.int64)
    torch.use_deterministic_algorithms(True)  # fresh memory is the largest integer
    got, want = tile_table(counts_E, sum(counts), block), tile_table_ref(counts_E, sum(counts), block)
    torch.use_deterministic_algorithms(False)
    assert torch.equal(got.table_T3, want.table_T3) and torch.equal(got.starts_E1, want.starts_E1)


def test_the_example():
    table_T3 = tile_table(torch.tensor([3, 0, 5]), 8, 4).table_T3
    assert table_T3.tolist() == [[0, 0, 3], [2, 3, 7 + 1], [2, 7, 8], [-1, 0, 0], [-1, 0, 0]]


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("rows", "height"), [(0, 16), (8, 16), (16 * 8, 16), (33 * 8, 64), (10**6, 128)])
def test_a_tile_is_as_tall_as_an_average_group_and_fits(rows, height, itemsize, chip):
    tile = choose_tile(rows, 8, 4096, itemsize, chip)
    assert tile.rows == height
    assert (tile.rows + tile.columns) * tile.depth * itemsize * tile.stages <= chip.shared_bytes


def test_descriptors_need_alignment_and_a_chip_that_has_them():
    good = torch.zeros(4, 8)
    assert describable(SM_90, good) and not describable(SM_80, good)
    assert not describable(SM_90, good, torch.zeros(4, 7)), "rows of 28 bytes"
    assert not describable(SM_90, torch.zeros(33)[1:].view(4, 8)), "begins 4 bytes late"
    assert not describable(SM_90, good.t()), "the last dimension has gaps"
    assert not describable(SM_90, good[:0]), "nothing there"
