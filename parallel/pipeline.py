"""Pipeline parallelism: who computes which micro-batch when, and how activations and gradients cross between stages.

The layers are cut into runs, one or more on each pipeline rank; a micro-batch goes through all of them, and its
gradient back. One forward, one backward (PipeDream-Flush, arXiv 2006.09503, section 3.2) keeps no more than `ranks`
micro-batches on a rank, where all forwards first would keep all of them:

    4 micro-batches       rank 0    F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
    on 3 ranks            rank 1    .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .
                          rank 2    .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .

With several runs a rank (arXiv 2104.04473, section 2.2) rank r has runs r, r + ranks, ...; the time without work falls
by their number, and each micro-batch crosses as many times more often.

A rank's order is a pure function of its place, so every rank knows in which order any other sends. Messages between two
ranks are sent and received in that one order and need no tags, which gloo has and NCCL has not; on two ranks, where the
next is the one before too, a forward is not mistaken for a backward. What goes down and what goes up between two ranks
have a group each: on one, NCCL would have two ranks that both send first wait for ever (read, not run: no GPU here).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from expertmesh.parallel.groups import Groups
from expertmesh.parallel.whereabouts import inside


class Task(NamedTuple):
    """One pass of one micro-batch through one run of layers."""

    backward: bool
    micro_batch: int
    stage: int  # the number of the run, from the one that embeds


def runs_of_layers(layers: int, stages: int) -> list[range]:
    """The layers of each stage, as even as can be; where they are not, later stages have more."""
    return [range(layers * stage // stages, layers * (stage + 1) // stages) for stage in range(stages)]


def schedule(rank: int, ranks: int, micro_batches: int, runs: int = 1) -> list[Task]:
    """What rank `rank` of a pipeline does in one update, in order; each rank has `runs` runs of layers.

    With several runs, micro-batches go in groups of `ranks` through one run after the other, and `micro_batches` must
    be a multiple of it. A run's forwards are ahead of its backwards by the way to the last stage and back.
    """
    assert runs == 1 or micro_batches % ranks == 0, f"{micro_batches} micro-batches in groups of {ranks}"
    passes = micro_batches * runs

    def task(number: int, backward: bool) -> Task:
        group, place = divmod(number, ranks * runs)
        run = place // ranks
        return Task(backward, group * ranks + place % ranks, (runs - 1 - run if backward else run) * ranks + rank)

    if runs == 1:
        ahead = ranks - 1 - rank
    else:
        ahead = 2 * (ranks - 1 - rank) + (runs - 1) * ranks
    ahead = min(ahead, passes)
    order = [task(number, False) for number in range(ahead)]
    for number in range(passes - ahead):
        order += [task(ahead + number, False), task(number, True)]
    return order + [task(number, True) for number in range(passes - ahead, passes)]


def forwards_alone(rank: int, ranks: int, micro_batches: int, runs: int = 1) -> list[Task]:
    """The order of a validation, of any number of micro-batches."""
    return [Task(False, number, stage) for number in range(micro_batches) for stage in range(rank, ranks * runs, ranks)]


def reader(task: Task, stages: int) -> Task | None:
    """Who reads what `task` makes: the next stage's forward, or the backward of the stage before; None: nobody."""
    stage = task.stage + (-1 if task.backward else 1)
    return task._replace(stage=stage) if 0 <= stage < stages else None


Parts = list[torch.Tensor]
"""One message: some tensors, of shapes that both ends know."""


class Mail:
    """Messages of one update between the pipeline ranks of `groups`; each goes to the task that reads it.

    `order(rank)`: the tasks of any of these ranks. `blank(task)`: empty tensors like those that the task reads.
    Receiving waits; sending does not, and `close` waits for all that was sent.
    """

    def __init__(self, groups: Groups, order: Callable[[int], Sequence[Task]], blank: Callable[[Task], Parts]) -> None:
        self.groups, self.blank = groups, blank
        self.rank, self.ranks = groups.pipeline_rank, groups.pipeline_size
        stages = self.ranks * groups.interleave
        # Of each rank, what it sends here, in its order; and what came before it was asked for.
        self._due = {
            source: deque(
                read
                for read in (reader(task, stages) for task in order(source))
                if read is not None and read.stage % self.ranks == self.rank
            )
            for source in {(self.rank - 1) % self.ranks, (self.rank + 1) % self.ranks} - {self.rank}
        }
        self._early: dict[Task, Parts] = {}
        self._leaving: list[tuple[Any, torch.Tensor]] = []
        self.sent_bytes = 0

    def send(self, task: Task, parts: Parts) -> None:
        """Have `parts` brought to `task`, which is another rank's."""
        to = task.stage % self.ranks
        for part in parts:
            if part.numel():
                part = part.detach().contiguous()
                self._leaving.append((dist.isend(part, group=self._group(self.rank, to), group_dst=to), part))
                self.sent_bytes += part.numel() * part.element_size()

    def receive(self, task: Task) -> Parts:
        """What was sent to `task`; what its sender sent before it is kept until it is asked for."""
        source = (task.stage + (1 if task.backward else -1)) % self.ranks
        while task not in self._early:
            arriving = self._due[source].popleft()
            parts = self.blank(arriving)
            for part in parts:
                if part.numel():
                    with inside(f"a message from pipeline rank {source}"):
                        dist.recv(part, group=self._group(source, self.rank), group_src=source)
            self._early[arriving] = parts
        return self._early.pop(task)

    def close(self) -> None:
        assert not self._early and not any(self._due.values()), "messages that nobody read"
        for work, _ in self._leaving:
            with inside("messages to pipeline ranks"):
                work.wait()
        self._leaving.clear()

    def _group(self, source: int, to: int) -> dist.ProcessGroup:
        down = to == (source + 1) % self.ranks and (self.ranks > 2 or source == 0)
        group = self.groups.pipeline if down else self.groups.pipeline_back
        assert group is not None
        return group
