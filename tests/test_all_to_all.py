"""Rows reach the ranks they were meant for, gradients find the way back, and every byte that left is counted."""

from __future__ import annotations

import pytest
import torch
from ranks import run_threads

from expertmesh.parallel.all_to_all import AllToAll, Flight, Lane, Traffic, arrive, depart
from expertmesh.parallel.wire import NATIVE

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


def flight_of(lane: Lane, send: list[int], receive: list[int]) -> Flight:
    return Flight(AllToAll(lane, send, receive), AllToAll(lane, receive, send), "rows")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("splits, reason", CASES, ids=[reason for _, reason in CASES])
def test_rows_gradients_and_bytes(splits, reason, dtype):
    world = len(splits)

    def exchange(group):
        me, traffic = group.rank(), Traffic()
        lane = Lane(group, NATIVE, traffic, far=tuple(rank == 0 for rank in range(world)))  # whoever is not rank 0's
        to_send, to_receive = splits[me], [splits[s][me] for s in range(world)]
        mine_RD = rows([(me, d) for d in range(world)], splits, dtype).T.contiguous().T  # strides of no use to gloo
        mine_RD.requires_grad_()
        flight = flight_of(lane, to_send, to_receive)
        received_RD = arrive(depart(mine_RD, flight), flight)
        assert torch.equal(received_RD, rows([(s, me) for s in range(world)], splits, dtype))

        row_bytes, out = WIDTH * dtype.itemsize, sum(to_send) - to_send[me]
        far = to_send[0] if me else 0
        assert traffic == Traffic(sent=out * row_bytes, saved=0, far=far * row_bytes)
        # The gradient of a row is twice the row: had it come back to another place, or from one, it would differ.
        received_RD.backward(2 * received_RD.detach())
        assert torch.equal(mine_RD.grad, 2 * mine_RD.detach())
        back = sum(to_receive) - to_receive[me]
        far += to_receive[0] if me else 0
        assert traffic.take() == ((out + back) * row_bytes, 0, far * row_bytes)
        assert traffic == Traffic()

    run_threads(exchange, world)


def test_exchanges_overlap_and_the_backward_mirrors_them():
    """What begins and ends when: the second exchange begins before work on the first, and so do their gradients."""

    class Logged(AllToAll):
        def __init__(self, name: str, log: list[str], *args):
            super().__init__(*args)
            self.name, self.log = name, log

        def start(self, rows_RD):
            self.log.append(f"{self.name} starts")
            super().start(rows_RD)

        def finish(self):
            self.log.append(f"{self.name} ends")
            return super().finish()

    class Work(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, name, log):
            ctx.name, ctx.log = name, log
            log.append(f"work on {name}")
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            ctx.log.append(f"work back on {ctx.name}")
            return grad, None, None

    def exchange(group):
        log: list[str] = []
        lane = Lane(group, NATIVE, Traffic(), (False, False))

        def flight(name: str) -> Flight:
            there, back = Logged(name, log, lane, [1, 1], [1, 1]), Logged(f"{name}'", log, lane, [1, 1], [1, 1])
            return Flight(there, back, name)

        x_RD = torch.randn(2, WIDTH, requires_grad=True)
        there, home = [flight("a"), flight("b")], [flight("A"), flight("B")]
        tickets = [depart(x_RD, there[0]), depart(x_RD, there[1])]
        back = []
        for number in range(2):
            answers_RD = Work.apply(arrive(tickets[number], there[number]), "ab"[number], log)
            back.append(depart(answers_RD, home[number]))
        torch.cat([arrive(ticket, flight) for ticket, flight in zip(back, home, strict=True)]).sum().backward()
        return log

    for log in run_threads(exchange, 2):
        forward = "a starts, b starts, a ends, work on a, A starts, b ends, work on b, B starts, A ends, B ends"
        backward = (
            "B' starts, A' starts, B' ends, work back on b, b' starts, A' ends, work back on a, a' starts, "
            "b' ends, a' ends"
        )
        assert ", ".join(log) == f"{forward}, {backward}"
