"""What runs inside a worker process. Ray makes actors of these classes, but nothing here knows of Ray."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from expertmesh.kernels.device import choose_device
from expertmesh.launch.recipe import Recipe
from expertmesh.launch.rendezvous import join
from expertmesh.parallel.groups import build_groups
from expertmesh.parallel.timeline import Busy, Span
from expertmesh.system.model.checkpoint import Checkpoint
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.engine import EngineCounts
from expertmesh.system.serve.loop import EngineLoop
from expertmesh.system.serve.request import Output, Request
from expertmesh.system.serve.workers import attention_engine, run_ffn_worker
from expertmesh.system.train.run_log import RunLog
from expertmesh.system.train.trainer import Record, Trainer

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


class TrainerRole:
    """One rank of a training job. Rank 0 writes the run's log and keeps records for whoever watches."""

    def __init__(self, rank: int, world: int, host: str, port: int) -> None:
        self._rank, self._world, self._host, self._port = rank, world, host, port
        self._records: list[Record] = []

    def run(
        self,
        recipe: Recipe,
        model: ModelConfig,
        settings: dict[str, Any],
        resume_from: Path | None,
        begin_with: Checkpoint | None,
        opening: list[Record],
    ) -> None:
        """Train to the end. `settings` go into checkpoints; `opening` are the first records of the run's log."""
        log_to(recipe.run_folder / "logs" / f"trainer-{self._rank}.log")
        os.environ.update(RANK=str(self._rank), WORLD_SIZE=str(self._world), LOCAL_RANK=str(self._rank))
        device = choose_device(self._rank)
        store = dist.PrefixStore("trainers", join(self._host, self._port))
        dist.init_process_group(
            device.backend, store=store, rank=self._rank, world_size=self._world, timeout=COLLECTIVE_TIMEOUT
        )
        groups = build_groups(recipe.parallel)
        trainer = Trainer(
            *(model, recipe.train, recipe.run_folder, groups, device, settings, resume_from, begin_with),
            dispatch=recipe.parallel.dispatch,
        )
        if self._rank:
            trainer.run(lambda record: None)
        else:
            with RunLog(recipe.run_folder, first_step=trainer.state.step + 1) as run_log:

                def report(record: Record) -> None:
                    run_log.write(record)
                    self._records.append(record)

                for record in opening:
                    report(record)
                trainer.run(report)
        dist.destroy_process_group()

    def take_records(self) -> list[Record]:
        """What happened since the last call."""
        taken = self._records[:]
        del self._records[: len(taken)]
        return taken


class AttentionRole:
    """A worker of the attention pool."""

    def __init__(self, rank: int, host: str, port: int) -> None:
        self._rank, self._host, self._port = rank, host, port
        self._loop: EngineLoop | None = None

    def start(self, checkpoint: Checkpoint, config: ServeConfig, ffn_workers: int, trace: bool) -> None:
        """Load the model and link up with the FFN pool. `trace`: keep what `spans` returns."""
        self._loop = attention_engine(checkpoint, config, self._rank, ffn_workers, join(self._host, self._port), trace)

    def submit(self, request: Request) -> None:
        self._started.submit(request)

    def cancel(self, request_id: str) -> None:
        self._started.cancel(request_id)

    def busy(self) -> Busy:
        return self._started.busy()

    def counts(self) -> EngineCounts:
        return self._started.counts()

    def loads(self) -> dict[int, list[int]]:
        return self._started.loads()

    def spans(self) -> list[Span]:
        return self._started.spans()

    def outputs(self) -> Iterator[list[Output]]:
        """One list a step."""
        yield from self._started.outputs()

    @property
    def _started(self) -> EngineLoop:
        assert self._loop is not None, "start comes first"
        return self._loop


class FFNRole:
    """A worker of the FFN pool."""

    def __init__(self, rank: int, host: str, port: int) -> None:
        self._rank, self._host, self._port = rank, host, port

    def run(self, checkpoint: Checkpoint, config: ServeConfig, ffn_workers: int, attention_workers: int) -> None:
        """Answer the attention pool until it is gone."""
        store = join(self._host, self._port)
        run_ffn_worker(checkpoint, config, self._rank, ffn_workers, attention_workers, store)
