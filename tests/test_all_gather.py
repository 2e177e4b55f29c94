"""Every rank has the rows of all, or those of them that it wants; what is padded counts as sent."""

from __future__ import annotations

import pytest
import torch
from ranks import run_threads

from expertmesh.parallel.all_gather import AllGather, all_gather
from expertmesh.parallel.all_to_all import Lane, Traffic
from expertmesh.parallel.wire import NATIVE, WIRES

CASES = [
    ([3], "one rank: nothing leaves"),
    ([2, 2], "as many of each"),
    ([4, 0, 1], "one has most, one has none"),
    ([0, 0], "nobody has rows: no collective"),
]
EACH = pytest.mark.parametrize("rows, reason", CASES, ids=[reason for _, reason in CASES])
WIDTH = 3


def rows_of(rank: int, rows: int) -> torch.Tensor:
    return torch.arange(rows * WIDTH, dtype=torch.float32).view(rows, WIDTH) + 100 * (rank + 1)


@EACH
def test_all_rows_padded_with_zeros(rows, reason):
    most = max(rows)
    expected = torch.zeros(len(rows), most, WIDTH)
    for rank, count in enumerate(rows):
        expected[rank, :count] = rows_of(rank, count)

    def rank_main(group):
        return all_gather(rows_of(group.rank(), rows[group.rank()]), most, group)

    for gathered in run_threads(rank_main, len(rows)):
        assert torch.equal(gathered, expected.view(-1, WIDTH))


@pytest.mark.parametrize("wire", ["native", "bf16", "fp8"])
@EACH
def test_wanted_rows_and_bytes(rows, reason, wire):
    most, all_rows = max(rows), [(rank, row) for rank, count in enumerate(rows) for row in range(count)]

    def rank_main(group):
        me, traffic = group.rank(), Traffic()
        wanted = all_rows[me::2]
        lane = Lane(group, WIRES[wire], traffic, far=tuple(rank == 2 for rank in range(len(rows))))
        exchange = AllGather(lane, most, torch.tensor([rank * most + row for rank, row in wanted], dtype=torch.int64))
        exchange.start(rows_of(me, rows[me]))
        row_bytes = {"native": 4 * WIDTH, "bf16": 2 * WIDTH, "fp8": WIDTH + 4}[wire]
        assert traffic.sent == (len(rows) - 1) * most * row_bytes
        assert traffic.far == (len(rows) > 2 and me != 2) * most * row_bytes
        came_VD = exchange.finish()
        expected = [rows_of(rank, rows[rank])[row] for rank, row in wanted]
        assert came_VD.shape == (len(wanted), WIDTH)
        for row_D, wanted_D in zip(came_VD, expected, strict=True):
            assert torch.allclose(row_D, wanted_D, rtol={"native": 0, "bf16": 2**-8, "fp8": 2**-4}[wire], atol=0)

    run_threads(rank_main, len(rows))


def test_rows_may_be_whole_numbers():
    """Choices travel so."""

    def rank_main(group):
        return all_gather(torch.tensor([[group.rank(), -1]], dtype=torch.int32), 1, group)

    for gathered in run_threads(rank_main, 2):
        assert gathered.tolist() == [[0, -1], [1, -1]]
    assert NATIVE.row_bytes(2, torch.int32) == 8
