"""The ranks of a job that torchrun or Slurm has started, one a process. Rank 0 supervises, beside its own part.

    rank 0    opens a store and says where, prepares the data, runs the job (supervise.py), and in a thread its rank
    others    wait for that, run their rank, tell how it ended, and end when rank 0 has (`follow`)

    at MASTER_ADDR:MASTER_PORT    meet/ATTEMPT = the port of rank 0's store
    there                         come, left = how many ranks have; left/N = the Nth that has; epoch; dump; heartbeats

Nobody here ends a process or starts one: a job that fails ends, and whoever started its ranks may start them again. The
store ends with rank 0, and with it all others, whatever holds them up.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from expertmesh.launch.asked_to_end import asked_to_end
from expertmesh.launch.crew import raised
from expertmesh.launch.environment import Seat
from expertmesh.launch.heartbeat import read_beats
from expertmesh.launch.recovery import Beat, How, Left, Spares
from expertmesh.launch.rendezvous import WAIT, Rendezvous, join
from expertmesh.launch.roles import Epoch, TrainerRole, streams_kept
from expertmesh.launch.worker_failed import in_a_line
from expertmesh.system.train.trainer import Record

LOOK_EVERY_S = 0.25

log = logging.getLogger(__name__)


class OwnRank:
    """This process's rank, in a thread."""

    def __init__(self, seat: Seat, port: int) -> None:
        """`port`: of rank 0's store."""
        self.role = TrainerRole(seat.local_rank, seat.host, port)
        self.left: Left | None = None
        self._seat, self._port = seat, port
        self._thread: threading.Thread | None = None

    def start(self, epoch: Epoch) -> None:
        self._thread = threading.Thread(target=self._run, args=(epoch,), name="rank", daemon=True)
        self._thread.start()

    def _run(self, epoch: Epoch) -> None:
        seat = self._seat
        if seat.threads is not None:
            torch.set_num_threads(epoch.recipe.cluster.cpus_per_worker or seat.threads)
        try:
            left = Left(seat.rank, How.DONE, step=self.role.run(epoch, seat.rank))
        except Exception as error:
            log.exception("trainer %d failed", seat.rank)
            left = raised(seat.rank, f"failed: {in_a_line(error)}", error)
        self.left = left
        with suppress(RuntimeError):  # rank 0 is gone
            store = join(seat.host, self._port)
            store.set(f"left/{store.add('left', 1)}", pickle.dumps(left))

    def ended(self, seconds: float = 0) -> bool:
        """Whether it has ended and told, in `seconds` at the latest."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The process ends with whatever ends this, also where the rank sits in a collective that nothing else ends."""
        try:
            with streams_kept():
                yield
        except (RuntimeError, KeyboardInterrupt) as end:
            if not self.ended():
                print(f"expertmesh: {str(end) or 'interrupted'}", file=sys.stderr, flush=True)
                os._exit(130 if isinstance(end, KeyboardInterrupt) else 1)
            raise


class FirstRank:
    """Rank 0: the crew of a job that has one epoch."""

    starts_workers = False

    def __init__(self, seat: Seat) -> None:
        """Meet the others: they see now when this process ends. Raises RuntimeError where one does not come."""
        try:
            self._meeting, self._common = Rendezvous(seat.host), _common_store(seat)
        except RuntimeError as error:
            place = f"{seat.host}:{seat.port} (MASTER_ADDR, MASTER_PORT)"
            raise RuntimeError(f"ranks cannot meet at {place}: {str(error).splitlines()[0]}") from error
        self._common.set(_meet(seat), str(self._meeting.port))
        self._await_all(seat.world)
        self._world, self._epoch = seat.world, 0
        self._seen = 0  # of the ranks that have left
        self.own = OwnRank(seat, self._meeting.port)

    def _await_all(self, world: int) -> None:
        deadline = time.monotonic() + WAIT.total_seconds()
        while (come := 1 + self._meeting.store.add("come", 0)) < world:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{come} of {world} ranks have come within {WAIT.total_seconds():g} s")
            time.sleep(LOOK_EVERY_S)

    def form(self, epoch: Epoch, keep: tuple[int, ...], spares: tuple[int, ...]) -> None:
        self._epoch = epoch.number
        self._meeting.store.set("epoch", pickle.dumps(epoch))
        self.own.start(epoch)

    def wait(self, seconds: float) -> list[Left]:
        store, deadline = self._meeting.store, time.monotonic() + seconds
        while (count := store.add("left", 0)) == self._seen and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY_S)
        told = [pickle.loads(store.get(f"left/{number}")) for number in range(self._seen + 1, count + 1)]
        self._seen = count
        return told

    def beats(self) -> Iterator[Beat]:
        yield from read_beats(self._meeting.store, self._epoch, self._world)

    def records(self, last: bool = False) -> list[Record]:
        return self.own.role.take_records()

    def spares(self) -> Spares:
        return Spares()

    def refill(self) -> None:
        """There are none."""

    def ask_to_leave(self) -> None:
        self.own.role.leave(self._epoch)

    def dump(self, ranks: tuple[int, ...]) -> None:
        self._meeting.store.set("dump", "")
        self.own.role.dump_stacks()

    def kill(self, ranks: tuple[int, ...]) -> None:
        """They end when this process does, as it will."""

    def stop(self) -> None:
        """As `kill`."""


def follow(seat: Seat) -> None:
    """Be another rank than 0 until the job is over.

    Raises RuntimeError when the job failed, KeyboardInterrupt when it was left before its last step.
    """
    port = int(_await(_common_store(seat), _meet(seat)))
    store = join(seat.host, port)
    store.add("come", 1)
    epoch: Epoch = pickle.loads(_await(store, "epoch"))
    own, dumped = OwnRank(seat, port), False
    with asked_to_end() as ending, own.at_work():
        own.start(epoch)
        while not own.ended(LOOK_EVERY_S):
            if ending.is_set():
                own.role.leave(epoch.number)
            try:
                if not dumped and _has(store, "dump"):
                    own.role.dump_stacks()
                    dumped = True
            except RuntimeError:
                if not own.ended(LOOK_EVERY_S):  # else all had left, and rank 0 was quicker
                    raise
        assert own.left is not None, "it has ended"
        if own.left.how == How.RAISED:
            with suppress(RuntimeError):  # until rank 0 has told of it: whoever started it ends it once we end
                while not ending.is_set() and _has(store, "epoch"):
                    time.sleep(LOOK_EVERY_S)
            raise RuntimeError(f"trainer {seat.rank} {own.left.why}")
    if own.left.step < epoch.recipe.train.steps:
        raise KeyboardInterrupt


def _has(store: dist.Store, key: str) -> bool:
    try:
        return store.check([key])
    except RuntimeError:
        raise RuntimeError("trainer 0 is gone, and with it the job; what it said is why") from None


def _await(store: dist.Store, key: str) -> bytes:
    """What rank 0 has put there, once it has: its data may take hours to prepare."""
    while not _has(store, key):
        time.sleep(LOOK_EVERY_S)
    return store.get(key)


def _meet(seat: Seat) -> str:
    return f"meet/{seat.attempt}"


def _common_store(seat: Seat) -> dist.Store:
    """At MASTER_ADDR:MASTER_PORT, where torchrun listens, or else rank 0. Raises RuntimeError where nobody does."""
    listens = seat.rank == 0 and not seat.agent_listens
    deadline = time.monotonic() + WAIT.total_seconds()
    while not listens:
        try:
            socket.create_connection((seat.host, seat.port), timeout=LOOK_EVERY_S).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                told = f"nobody listens at {seat.host}:{seat.port} (MASTER_ADDR, MASTER_PORT): {error}"
                raise RuntimeError(told) from None
            time.sleep(LOOK_EVERY_S)
    return dist.TCPStore(seat.host, seat.port, is_master=listens, wait_for_workers=False, timeout=WAIT)
