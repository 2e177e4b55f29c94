"""Every rank of a pipeline can go on, does each pass once, keeps few, and reads what was sent to it."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from expertmesh.parallel.groups import Groups, build_groups
from expertmesh.parallel.pipeline import Mail, Task, forwards_alone, reader, runs_of_layers, schedule
from expertmesh.parallel.sizes import ParallelSizes


def done_together(ranks: int, micro_batches: int, runs: int = 1) -> Iterator[list[tuple[int, Task]]]:
    """(rank, task) pairs that are done at one time, if each task takes as long. Fails where no rank can."""
    left = {rank: deque(schedule(rank, ranks, micro_batches, runs)) for rank in range(ranks)}
    stages, done = ranks * runs, set[Task]()

    def ready(task: Task) -> bool:
        if not task.backward:
            return task.stage == 0 or task._replace(stage=task.stage - 1) in done
        after = task._replace(stage=task.stage + 1)
        return task._replace(backward=False) in done and (task.stage == stages - 1 or after in done)

    while any(left.values()):
        now = [(rank, tasks[0]) for rank, tasks in left.items() if tasks and ready(tasks[0])]
        assert now, f"all ranks wait: {[tasks[0] for tasks in left.values() if tasks]}"
        for rank, task in now:
            left[rank].popleft()
            done.add(task)
        yield now


def picture(ranks: int, micro_batches: int) -> list[str]:
    rows = [""] * ranks
    for now in done_together(ranks, micro_batches):
        for rank in range(ranks):
            task = dict(now).get(rank)
            rows[rank] += f"{'FB'[task.backward]}{task.micro_batch} " if task else ".  "
    return [row.rstrip(" .") for row in rows]


def test_one_forward_one_backward():
    """The picture at the top of the file."""
    assert picture(3, 4) == [
        "F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3",
        ".  F0 F1 .  B0 F2 B1 F3 B2 .  B3",
        ".  .  F0 B0 F1 B1 F2 B2 F3 B3",
    ]
    assert picture(1, 2) == ["F0 B0 F1 B1"], "gradient accumulation"


SIZES = [
    (1, 1, 1, "nothing to share"),
    (1, 5, 1, "gradient accumulation"),
    (2, 1, 1, "fewer micro-batches than ranks: each waits for the other"),
    (4, 3, 1, "fewer micro-batches than ranks, again"),
    (4, 9, 1, "an odd number of them"),
    (2, 2, 2, "the next rank is the one before: the silent trap"),
    (2, 8, 3, "three runs on each of two"),
    (4, 4, 2, "a single group"),
    (4, 12, 2, "several groups"),
    (64, 128, 4, "a large pipeline"),
]


@pytest.mark.parametrize("ranks, micro_batches, runs, reason", SIZES, ids=[reason for *_, reason in SIZES])
def test_all_passes_are_done_once_and_nobody_waits_for_ever(ranks, micro_batches, runs, reason):
    steps = list(done_together(ranks, micro_batches, runs))
    passes = Counter(task for now in steps for _, task in now)
    all_of_them = itertools.product((False, True), range(micro_batches), range(ranks * runs))
    assert passes == Counter(Task(*each) for each in all_of_them)
    assert all(task.stage % ranks == rank for now in steps for rank, task in now)
    # A step of the first rank's work for each pass, and the way to the last stage and back.
    assert len(steps) <= 2 * runs * micro_batches + 2 * (ranks - 1) + (2 * ranks * runs if runs > 1 else 0)


@pytest.mark.parametrize("ranks, micro_batches, runs, reason", SIZES, ids=[reason for *_, reason in SIZES])
def test_few_micro_batches_are_kept(ranks, micro_batches, runs, reason):
    """arXiv 2104.04473, section 2.2: with one run never more than the ranks from here on; else as many more as runs."""
    for rank in range(ranks):
        kept, most = 0, 0
        for task in schedule(rank, ranks, micro_batches, runs):
            kept += -1 if task.backward else 1
            most = max(most, kept)
        assert kept == 0
        assert most <= (ranks - rank if runs == 1 else 2 * (ranks - 1 - rank) + (runs - 1) * ranks + 1)


def test_layers_of_stages():
    assert runs_of_layers(5, 4) == [range(0, 1), range(1, 2), range(2, 3), range(3, 5)]
    assert runs_of_layers(4, 1) == [range(0, 4)]
    for layers in range(1, 20):
        for stages in range(1, layers + 1):
            runs = runs_of_layers(layers, stages)
            assert [layer for run in runs for layer in run] == list(range(layers)) and min(map(len, runs)) > 0


def number_of(task: Task) -> float:
    return float(task.backward * 10_000 + task.micro_batch * 100 + task.stage)


def check_mail(runs: int) -> int:
    """Every task reads what was made for it, in training and in validation; returns how many bytes left."""
    groups = build_groups(ParallelSizes(pp=dist.get_world_size(), interleave=runs))
    stages, sent = groups.pipeline_size * runs, 0
    for order in (schedule, forwards_alone):
        tasks = [order(rank, groups.pipeline_size, 4, runs) for rank in range(groups.pipeline_size)]
        # Two parts, of which micro-batch 3 has none of: a rank without tokens.
        mail = Mail(groups, tasks.__getitem__, lambda task: [torch.empty(3 - task.micro_batch), torch.empty(2)])
        for task in tasks[groups.pipeline_rank]:
            if reader(task._replace(backward=not task.backward), stages):  # somebody wrote to it
                rows, number = mail.receive(task)
                assert len(rows) == 3 - task.micro_batch and number.tolist() == [number_of(task)] * 2
            if (to := reader(task, stages)) is not None:
                mail.send(to, [torch.zeros(3 - task.micro_batch), torch.full((2,), number_of(to))])
        mail.close()
        sent += mail.sent_bytes
    return sent


@pytest.mark.parametrize("ranks", [2, 3])
def test_messages_reach_the_task_that_reads_them(ranks):
    for runs in (1, 2) if ranks == 2 else (1,):
        stages = ranks * runs
        sent = run_ranks(check_mail, ranks, runs)
        # 4 micro-batches of 3, 2, 1, 0 floats and of 2 cross each border down, up, and down again.
        assert sum(sent) == 3 * (stages - 1) * 4 * (6 + 4 * 2)


def test_one_rank_sends_nothing():
    mail = Mail(Groups(), lambda rank: schedule(rank, 1, 3), lambda task: [])
    mail.close()
    assert mail.sent_bytes == 0
