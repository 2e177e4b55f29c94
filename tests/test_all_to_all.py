"""Rows reach the ranks they were meant for, gradients find the way back, and every byte that left is counted."""

from __future__ import annotations

import pytest
import torch
from ranks import run_threads

from expertmesh.parallel.all_to_all import Traffic, all_to_all, remote_share

CASES = [
    # rows that rank s sends to rank d: splits[s][d]
    ([[3]], "one rank: nothing leaves"),
    ([[2, 3], [4, 1]], "two ranks"),
    ([[0, 5], [0, 0]], "one rank sends all it has, the other nothing"),
    ([[0, 0], [0, 0]], "nobody has rows"),
    ([[1, 0, 4], [0, 0, 0], [2, 7, 0]], "three ranks; the middle one only receives"),
]
WIDTH = 5


def row(source: int, destination: int, index: int, dtype: torch.dtype) -> torch.Tensor:
    """What row `index` of those from `source` to `destination` holds: small whole numbers, exact in every dtype."""
    return torch.tensor([source, destination, index, 1, 0], dtype=dtype)


def rows(pairs: list[tuple[int, int]], splits: list[list[int]], dtype: torch.dtype) -> torch.Tensor:
    listed = [row(s, d, i, dtype) for s, d in pairs for i in range(splits[s][d])]
    return torch.stack([torch.empty(WIDTH, dtype=dtype), *listed])[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("splits, reason", CASES, ids=[reason for _, reason in CASES])
def test_rows_gradients_and_bytes(splits, reason, dtype):
    world = len(splits)

    def exchange(group):
        me, traffic = group.rank(), Traffic()
        to_send, to_receive = splits[me], [splits[s][me] for s in range(world)]
        mine_RD = rows([(me, d) for d in range(world)], splits, dtype).T.contiguous().T  # strides of no use to gloo
        mine_RD.requires_grad_()
        received_RD = all_to_all(mine_RD, to_send, to_receive, group, traffic)
        assert torch.equal(received_RD, rows([(s, me) for s in range(world)], splits, dtype))

        row_bytes, out = WIDTH * dtype.itemsize, sum(to_send) - to_send[me]
        assert traffic == Traffic(sent=out * row_bytes, saved=0)
        # The gradient of a row is twice the row: had it come back to another place, or from one, it would differ.
        received_RD.backward(2 * received_RD.detach())
        assert torch.equal(mine_RD.grad, 2 * mine_RD.detach())
        back = sum(to_receive) - to_receive[me]
        assert traffic.take() == ((out + back) * row_bytes, 0)
        assert traffic == Traffic(0, 0)

    run_threads(exchange, world)


@pytest.mark.parametrize(
    "splits, rank, share",
    [
        ([3, 1], 0, 0.25),
        ([3, 1], 1, 0.75),
        ([0, 4], 0, 1.0),
        ([4], 0, 0.0),
        ([0, 0, 0, 0], 2, 0.75),  # no rows: an even spread over four ranks sends three quarters away
    ],
)
def test_remote_share(splits, rank, share):
    assert remote_share(splits, rank) == pytest.approx(share)
