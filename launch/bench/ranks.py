"""The gloo ranks of a bench: processes that share the cores, each with its own tokens and its part of the experts.

Rank 0 speaks for all. A step is timed from one barrier to the next: the slowest rank counts.

Legend: T tokens of a rank.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from expertmesh.launch.bench.cases import Problem
from expertmesh.launch.bench.layer import Layer
from expertmesh.launch.bench.reference import Answers, Right
from expertmesh.parallel.placement import expert_shard

SPREAD = ("router", "mix", "constant")  # what all ranks have a copy of, and a part of the gradient
FAR = timedelta(seconds=600)
Row = dict[str, Any]
Say = Callable[[str], None]
Tables = Callable[[int, Say], Iterator[list[Row]]]  # of a rank, and of what it calls to be heard


def tables_of_ranks(
    ranks: int, tables: Tables, say: Say, enter: Callable[[int], object] | None = None
) -> list[list[Row]]:
    """What rank 0 has of `tables`, which every rank goes through; `enter`, if any, is called first, with the rank.

    Both are pickled. Raises RuntimeError if a rank fails.
    """
    reports: Any = mp.get_context("spawn").SimpleQueue()
    found: list[list[Row]] = []
    with tempfile.TemporaryDirectory() as folder:
        args = (ranks, tables, enter, str(Path(folder) / "store"), reports)
        processes = mp.start_processes(_rank_main, args, ranks, join=False, start_method="spawn")
        assert processes is not None
        finished = False
        while not finished:
            try:
                finished = processes.join(timeout=0.1)
            except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
                raise RuntimeError(f"a rank failed: {str(error).strip().splitlines()[-1]}") from error
            while not reports.empty():
                kind, report = reports.get()
                say(report) if kind == "say" else found.append(report)
    return found


def _rank_main(
    rank: int, ranks: int, tables: Tables, enter: Callable[[int], object] | None, store: str, reports: Any
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    if enter is not None:
        enter(rank)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=FAR)

    def say(line: str) -> None:
        if rank == 0:
            reports.put(("say", line))

    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings(action="ignore"):  # of peers: no result
            for table in tables(rank, say):
                if rank == 0:
                    reports.put(("table", table))
    finally:
        dist.destroy_process_group()


def share_of(whole: Problem, rank: int, tokens: int) -> Problem:
    """This rank's tokens, all of them in one set."""
    mine = slice(rank * tokens, (rank + 1) * tokens)
    parts = whole.inputs_STD[:1, mine], whole.gradients_STD[:1, mine]
    return Problem(replace(whole.case, tokens=tokens), whole.weights, *(part.contiguous() for part in parts))


def answers_of(layer: Layer, mine: Problem) -> Answers:
    """What a rank's layer says of its tokens; gradients of what all have a copy of are summed over the ranks."""
    answers = layer.answers(mine)
    for name in SPREAD:
        if name in answers and answers[name].numel():
            answers[name] = answers[name].double()
            dist.all_reduce(answers[name])
    return answers


def right_of(right: Right, mine: Problem, rank: int, ranks: int) -> Right:
    """What is expected of one rank: its tokens and its experts, but of what all ranks have the whole."""
    tokens, shard = mine.case.tokens, expert_shard(mine.case.experts, rank, ranks)
    own, held = slice(rank * tokens, (rank + 1) * tokens), slice(shard.start, shard.stop)
    parts = {"y": own, "x": own, "gate_up": held, "down": held}
    return right._replace(answers={name: part[parts.get(name, slice(None))] for name, part in right.answers.items()})


def reason_of_any(reason: str, ranks: int) -> str:
    """The first reason that a rank has; nothing where none has one."""
    reasons: list[str] = [""] * ranks
    dist.all_gather_object(reasons, reason)
    return next((reason for reason in reasons if reason), "")


def time_steps_in_turn(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each by round, from barrier to barrier; who begins moves on by one from round to round."""
    names = list(steps)
    seconds: dict[str, list[float]] = {what: [] for what in names}
    gc.collect()
    gc.freeze()  # or a collection would look through every library that is loaded
    try:
        for number in range(rounds):
            first = number % len(names)
            for what in names[first:] + names[:first]:
                dist.barrier()
                start = time.perf_counter()
                steps[what]()
                dist.barrier()
                seconds[what].append(time.perf_counter() - start)
    finally:
        gc.unfreeze()
    return seconds


def train_step(layer: Layer, mine: Problem) -> None:
    """Forward and backward."""
    layer.learn(mine.inputs_STD[0], mine.gradients_STD[0])
    layer.forget()
