"""What runs inside a worker process, whoever started it: Ray makes actors of these classes, but none knows of Ray."""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from expertmesh.kernels.device import Device, choose_device
from expertmesh.launch.chaos import strike
from expertmesh.launch.heartbeat import Pulse
from expertmesh.launch.lifeline import Lifeline
from expertmesh.launch.recipe import Recipe
from expertmesh.launch.rendezvous import join
from expertmesh.parallel.groups import Groups, build_groups, destroy_groups
from expertmesh.parallel.import_engines import import_engines
from expertmesh.parallel.timeline import Busy, Span
from expertmesh.system.model.checkpoint import Checkpoint
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.engine import EngineCounts
from expertmesh.system.serve.request import Failure, Output, Request
from expertmesh.system.serve.workers import AttentionWorker, FFNPool, FFNWorker
from expertmesh.system.train.run_log import RunLog
from expertmesh.system.train.trainer import Record, Trainer, Watch

COLLECTIVE_TIMEOUT = timedelta(seconds=300)


def log_to(path: Path) -> None:
    """Send this process's log and all that it or a library prints to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with open(path, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True)


@contextmanager
def streams_kept() -> Iterator[None]:
    """Undo `log_to` afterwards, in a process that is more than a worker."""
    kept = {number: os.dup(number) for number in (1, 2)}
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)


class Epoch(NamedTuple):
    """What the workers of a training job are to do until one of them is lost (see launch/recovery.py)."""

    number: int
    recipe: Recipe  # with the layout of this epoch
    model: ModelConfig
    settings: dict[str, Any]  # go into checkpoints
    resume_from: Path | None
    begin_with: Checkpoint | None  # where there is nothing to resume from; None: weights drawn from the seed
    opening: list[Record]  # the first records of the run's log
    skip: frozenset[int]  # steps whose batches are left out


class TrainerRole:
    """A process of a training job: one rank of it, or a spare until it is given one.

    Rank 0 writes the run's log and keeps records for whoever watches.
    """

    def __init__(self, place: int, host: str, port: int) -> None:
        """`place`: among the job's processes; it decides of the device, and stays when a spare gets a rank."""
        self._place, self._host, self._port = place, host, port
        self._records: list[Record] = []
        self._leave = -1  # the number of the epoch that is to be left
        self._preparing, self._needed = threading.Lock(), threading.Event()

    def prepare(self) -> None:
        """What takes time and needs no rank: imports, and a GPU's first use. Once is enough."""
        with self._preparing:  # two threads must not import the same
            import_engines()
            torch.empty(0, device=choose_device(self._place).name)

    def stand_by(self) -> None:
        """Return when this process is given a rank: who waits for that hears of its death."""
        self._needed.wait()

    def run(self, epoch: Epoch, rank: int) -> int:
        """Train to the end as `rank`, or until told to leave; returns the last step that was made.

        May be called again after it has raised: the process goes on in the next epoch.
        """
        self._needed.set()
        recipe, model, world = epoch.recipe, epoch.model, epoch.recipe.parallel.world_size
        log_to(recipe.run_folder / "logs" / f"trainer-{rank}.log")
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(self._place))
        meeting = join(self._host, self._port)
        pulse = Pulse(join(self._host, self._port), epoch.number, rank)
        line = Lifeline(self._host, meeting, epoch.number, rank)
        try:
            self.prepare()
            device = choose_device(self._place)
            store = dist.PrefixStore(f"trainers/{epoch.number}", meeting)
            dist.init_process_group(
                device.backend, store=store, rank=rank, world_size=world, timeout=COLLECTIVE_TIMEOUT
            )
            groups = build_groups(recipe.parallel, model.moe.experts_of_layers)
            gc.freeze()  # the libraries stay: the collection at the end, which peers wait for, passes them over
            return self._train(epoch, rank, groups, device, pulse)
        except BaseException as error:
            _let_go(error)
            raise
        finally:
            pulse.close()
            destroy_groups()
            gc.collect()  # what is left of the model goes before the next epoch builds its own
            line.close()

    def _train(self, epoch: Epoch, rank: int, groups: Groups, device: Device, pulse: Pulse) -> int:
        """A frame of its own: its trainer goes with it."""
        recipe = epoch.recipe
        trainer = Trainer(
            *(epoch.model, recipe.train, recipe.run_folder, groups, device, epoch.settings),
            *(epoch.resume_from, epoch.begin_with),
            dispatch=recipe.parallel.dispatch,
            skip=epoch.skip,
        )
        watch = _Watch(rank, epoch, pulse, lambda: self._leave == epoch.number)
        with closing(trainer):
            if rank:
                trainer.run(lambda record: pulse.advance(), watch)
            else:
                with RunLog(recipe.run_folder, first_step=trainer.state.step + 1) as run_log:

                    def keep(record: Record) -> None:
                        run_log.write(record)
                        self._records.append(record)

                    def report(record: Record) -> None:
                        pulse.advance()
                        keep(record)

                    for record in epoch.opening:
                        keep(record)
                    trainer.run(report, watch)
            return trainer.state.step

    def leave(self, epoch: int) -> None:
        """Have all workers save and return at the end of a step of `epoch`, which may not have begun yet."""
        self._leave = epoch

    def take_records(self) -> list[Record]:
        """What happened since the last call."""
        taken = self._records[:]
        del self._records[: len(taken)]
        return taken

    def dump_stacks(self) -> None:
        """Write to the log where each thread is."""
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)


def _let_go(error: BaseException | None) -> None:
    """Empty the frames that an error and those before it came through: they hold the model. What it says stays."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class _Watch(Watch):
    """Between steps: a heartbeat, a drill, and the wish to leave."""

    def __init__(self, rank: int, epoch: Epoch, pulse: Pulse, leaving: Callable[[], bool]) -> None:
        self._rank, self._epoch, self._pulse, self._leaving = rank, epoch, pulse, leaving

    def before(self, step: int, model: nn.Module) -> None:
        self._pulse.advance(step)
        epoch = self._epoch
        strike(epoch.recipe.chaos, self._rank, step, epoch.skip, model)

    def wants_to_leave(self) -> bool:
        return self._leaving()


class AttentionRole:
    """A worker of the attention pool."""

    def __init__(self, rank: int, host: str, port: int) -> None:
        self._rank, self._host, self._port = rank, host, port
        self._worker: AttentionWorker | None = None

    def start(self, checkpoint: Checkpoint, config: ServeConfig, pool: FFNPool, trace: bool) -> None:
        """Load the model and link up with the FFN pool. `trace`: keep what `spans` returns."""
        self._worker = AttentionWorker(checkpoint, config, self._rank, pool, join(self._host, self._port), trace)

    def prepare(self, pool: FFNPool) -> None:
        self._started.prepare(pool)

    def change_over(self, pool: FFNPool) -> None:
        self._started.change_over(pool)

    def submit(self, request: Request) -> None:
        self._started.loop.submit(request)

    def cancel(self, request_id: str) -> None:
        self._started.loop.cancel(request_id)

    def busy(self) -> Busy:
        return self._started.loop.busy()

    def counts(self) -> EngineCounts:
        return self._started.loop.counts()

    def loads(self) -> dict[int, list[int]]:
        return self._started.loop.loads()

    def spans(self) -> list[Span]:
        return self._started.loop.spans()

    def outputs(self) -> Iterator[list[Output | Failure]]:
        """One list a step."""
        yield from self._started.loop.outputs()

    @property
    def _started(self) -> AttentionWorker:
        assert self._worker is not None, "start comes first"
        return self._worker


class FFNRole:
    """A process of the FFN pool, and of the next one while the service changes over."""

    def __init__(self, rank: int, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._workers: dict[int, FFNWorker] = {}  # by the number of their pool
        self._retired: set[int] = set()

    def run(self, checkpoint: Checkpoint, config: ServeConfig, ffn: int, pool: FFNPool, attention_workers: int) -> None:
        """Be FFN worker `ffn` of `pool`, until the attention pool is gone or `retire` is called."""
        worker = FFNWorker(checkpoint, config, ffn, pool, join(self._host, self._port))
        self._workers[pool.number] = worker
        if pool.number not in self._retired:
            worker.serve(attention_workers)
        del self._workers[pool.number]

    def retire(self, number: int) -> None:
        """That pool is asked no more."""
        self._retired.add(number)
        if (worker := self._workers.get(number)) is not None:
            worker.close()
