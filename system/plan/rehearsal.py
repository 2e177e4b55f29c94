"""The collectives of any rank of any layout, in order, found without the other ranks: does each meet its like?

A rank's real forwards and backwards run over torch's fake process group, in which a world of thousands is one process.
A collective there moves nothing; here its results are filled in as if every other rank sent what this one sends. So
shapes are right and values are not: what a rank asks for depends on the layout, not on values (splits of rows do, and
are not compared).

`play` then lets the ranks go on together. Each waits at a collective for the others of its group, and at a receive for
what was sent; a rank that waits for ever, or meets another collective than its own, is named.

Widths do not change the order, so the model is made narrow. The optimizer's own collectives are rehearsed at ZeRO 3,
where they come as layers are computed. At other stages they are not: DeepSpeed reduces one group of parameters after
the other, in the order of zero.py's list, which all ranks of a stage have in common.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.build_dispatcher import build_dispatcher
from expertmesh.parallel.groups import Groups, build_groups, destroy_groups
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.context import TrainingStep
from expertmesh.system.model.tensor_parallel import parallel_transformer
from expertmesh.system.model.weights import initialise
from expertmesh.system.plan.widths import NARROW, narrowest, resized
from expertmesh.system.train.build_optimizer import build_optimizer
from expertmesh.system.train.config import TrainConfig
from expertmesh.system.train.loss import LanguageModelLoss
from expertmesh.system.train.passes import MicroBatch, Passes
from expertmesh.system.train.tally import tally


class Call(NamedTuple):
    """One collective, or one end of a message."""

    what: str  # such as "allreduce_", or "send", "recv_"
    ranks: tuple[int, ...]  # of its group; of a message, from and to
    numbers: int | None  # how many this rank gives; None where that follows the routing

    def __str__(self) -> str:
        count = "" if self.numbers is None else f" of {self.numbers} numbers"
        between = f"{self.ranks[0]} to {self.ranks[-1]}" if len(self.ranks) > 8 else str(list(self.ranks))
        return f"{self.what.strip('_')}{count} among ranks {between}"


class Recorder(TorchDispatchMode):
    """Notes each collective that this rank asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            boxed = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
            self.note(name, args, tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(boxed))))
        return answer

    def note(self, name: str, args: tuple[Any, ...], ranks: tuple[int, ...]) -> None:
        given = args[0] if name in ("send", "recv_", "allreduce_") else [args[1]]
        numbers: int | None = sum(part.numel() for part in given)
        if name in ("send", "recv_"):
            here, there = dist.get_rank(), ranks[args[2]]
            ranks = (here, there) if name == "send" else (there, here)
        elif name == "alltoall_base_" and args[3]:
            numbers = None
        self.calls.append(Call(name, ranks, numbers))


class Alone(Recorder):
    """Fills in what would come of it if all ranks gave what this one gives. Of an all-reduce that stays as it is."""

    def note(self, name: str, args: tuple[Any, ...], ranks: tuple[int, ...]) -> None:
        super().note(name, args, ranks)
        if name == "recv_":
            args[0][0].zero_()
        elif name == "alltoall_base_":
            args[0].copy_(args[1].view_as(args[0]))
        elif name == "_allgather_base_":
            args[0].view(len(ranks), -1).copy_(args[1].reshape(1, -1).expand(len(ranks), -1))
        elif name == "_reduce_scatter_base_":
            args[0].copy_(args[1][: len(args[0])])
        else:
            assert name in ("send", "allreduce_"), f"what comes of {name}?"


@contextmanager
def fake_world(rank: int, size: int) -> Iterator[None]:
    """This process as one rank of a world that is not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        destroy_groups()


def calls_of(
    rank: int, sizes: ParallelSizes, model: ModelConfig, micro_batches: int, length: int, zero_stage: int = 1
) -> list[Call]:
    """What rank `rank` asks for in one update, with one sequence of `length` a data-parallel rank and micro-batch."""
    with fake_world(rank, sizes.world_size):
        groups = build_groups(sizes, model.moe.experts_of_layers)
        part = parallel_transformer(resized(model, narrowest(model, sizes)), groups)
        initialise(part, 0, 0.02)
        loss = LanguageModelLoss(part, build_dispatcher(groups, sizes.dispatch, Traffic(), "cpu"), groups)
        fully_sharded = None
        if zero_stage == 3:
            fully_sharded = build_optimizer(loss, TrainConfig(zero_stage=3), "cpu", lambda *_: None)
        with Alone() as recorder:
            passes = Passes(loss, _batches(groups, micro_batches, length))
            if fully_sharded:
                fully_sharded.step(passes.totals(), 0.0)
            else:
                for total in passes.totals():
                    total.backward()
            tally(passes.answers, micro_batches, part.config, groups)
        return recorder.calls


def _batches(groups: Groups, micro_batches: int, length: int) -> list[MicroBatch]:
    found = []
    for number in range(micro_batches):
        mine = number * groups.batch_size + groups.batch_rank
        tokens_BS1 = (torch.arange(length + 1)[None] + mine) % NARROW
        found.append(MicroBatch(tokens_BS1, TrainingStep(1, 1, 0, range(mine, mine + 1), length)))
    return found


def to_rehearse(sizes: ParallelSizes, most: int = 16) -> list[int]:
    """Ranks that stand for all: of few all, of many the first and the last of each stage.

    Ranks of a stage run the same code; what differs is who is in their groups.
    """
    if sizes.world_size <= most:
        return list(range(sizes.world_size))
    stages = [range(first, first + sizes.stage_size) for first in range(0, sizes.world_size, sizes.stage_size)]
    return sorted({rank for stage in stages for rank in (stage[0], stage[-1])})


def play(calls_of_rank: Mapping[int, list[Call]]) -> str | None:
    """What goes wrong when these ranks go on together; None: each comes to its end."""
    left = {rank: deque(calls) for rank, calls in calls_of_rank.items()}
    sent: defaultdict[tuple[int, ...], deque[int | None]] = defaultdict(deque)
    going = True
    while going:
        going = False
        for rank, calls in left.items():
            while calls:
                call = calls[0]
                if call.what == "send":
                    sent[call.ranks].append(call.numbers)
                elif call.what == "recv_":
                    source = call.ranks[0]
                    if source in left and not sent[call.ranks]:
                        break
                    if source in left and (came := sent[call.ranks].popleft()) != call.numbers:
                        return f"rank {rank} waits for {call.numbers} numbers of rank {source}, which sent {came}"
                else:
                    others = [other for other in call.ranks if other in left]
                    if any(not left[other] for other in others):
                        ended = next(other for other in others if not left[other])
                        return f"rank {rank} waits at {call}, but rank {ended} has come to its end"
                    if any(call.ranks != left[other][0].ranks for other in others):
                        break
                    for other in others:
                        if left[other][0] != call:
                            return f"rank {rank} is at {call}, rank {other} at {left[other][0]}"
                    for other in others:
                        if other != rank:
                            left[other].popleft()
                calls.popleft()
                going = True
    waiting = {rank: calls[0] for rank, calls in left.items() if calls}
    if waiting:
        return "all wait: " + "; ".join(f"rank {rank} at {call}" for rank, call in list(waiting.items())[:4])
    unread = [pair for pair, numbers in sent.items() if numbers and pair[1] in left]
    return f"rank {unread[0][1]} never reads what rank {unread[0][0]} sent" if unread else None
