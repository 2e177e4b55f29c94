"""The workers of a training job as whoever supervises them sees them: formed, watched, asked, ended. Here, on Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from expertmesh.launch.heartbeat import read_beats
from expertmesh.launch.ray_cluster import Pool, WorkerFailed
from expertmesh.launch.recovery import Beat, How, Left
from expertmesh.launch.rendezvous import Rendezvous
from expertmesh.launch.roles import Epoch, TrainerRole
from expertmesh.system.train.snapshot import SaveFailed
from expertmesh.system.train.trainer import NotFinite, Record

DUMP_S = 2.0  # to write stacks in; a process that is stopped never does
LAST_RECORDS_S = 30.0


class Crew(Protocol):
    """What `supervise` needs of a launcher."""

    def form(self, epoch: Epoch, keep: tuple[int, ...]) -> None:
        """Have workers run `epoch`: those of the ranks `keep` in their old processes, the others in new ones.

        Raises WorkerFailed, a RuntimeError, where there is no place for them.
        """

    def wait(self, seconds: float) -> list[Left]:
        """Who has left since the last call; waits up to `seconds` for the first."""

    def beats(self) -> Iterator[Beat]: ...

    def records(self, last: bool = False) -> list[Record]:
        """What rank 0 has recorded since the last call. `last`: wait for all there is."""

    def ask_to_leave(self) -> None: ...

    def dump(self, ranks: tuple[int, ...]) -> None: ...

    def kill(self, ranks: tuple[int, ...]) -> None: ...

    def stop(self) -> None:
        """End all workers."""


class RayCrew:
    """Workers of one pool, which is made anew when their number changes."""

    def __init__(
        self, host: str, cpus: int, slots: int | None, where: dict[str, str] | None = None, strategy: str = "PACK"
    ) -> None:
        """`cpus` of each worker. `slots`: of an own Ray, which more workers than it was started for share.

        `where`, `strategy`: how they are placed on the nodes of a cluster.
        """
        self._store = Rendezvous(host)
        self._where, self._strategy = where, strategy
        self._cpus, self._slots = cpus, slots
        self._pool: Pool | None = None
        self._epoch, self._world = 0, 0
        self._runs: dict[Any, int] = {}  # the rank of each call that has not ended
        self._asked: Any = None  # for records; not yet answered

    def form(self, epoch: Epoch, keep: tuple[int, ...]) -> None:
        world = epoch.recipe.parallel.world_size
        self._asked = None
        if self._pool is not None and keep and world == self._world:
            self._pool.check_room()
            for rank in set(range(world)) - set(keep):
                self._pool.replace(rank)
        else:
            self.stop()
            place = (self._store.host, self._store.port)
            cpus = min(self._cpus, self._slots / world) if self._slots else self._cpus
            self._pool = Pool(
                "trainer", TrainerRole, world, cpus, world, *place, where=self._where, strategy=self._strategy
            )
        self._pool.await_started()
        self._epoch, self._world = epoch.number, world
        self._runs = {call: rank for rank, call in enumerate(self._pool.start("run", epoch))}

    def wait(self, seconds: float) -> list[Left]:
        if not self._runs:
            return []
        return [self._left(self._runs.pop(call), call) for call in self._made.wait(list(self._runs), seconds)]

    def _left(self, rank: int, call: Any) -> Left:
        try:
            return Left(rank, How.DONE, step=self._made.answer(rank, call, 0))
        except WorkerFailed as failure:
            if failure.died:
                return Left(rank, How.DIED, "died: killed, out of memory, or crashed")
            cause = failure.cause
            why = f"failed: {str(failure).split(' failed: ', 1)[-1]}"
            step = cause.step if isinstance(cause, NotFinite) else None
            return Left(rank, How.RAISED, why, not_finite=step, hopeless=isinstance(cause, ValueError | SaveFailed))

    def beats(self) -> Iterator[Beat]:
        yield from read_beats(self._store.store, self._epoch, self._world)

    def records(self, last: bool = False) -> list[Record]:
        if self._asked is None:
            self._asked = self._made.call(0, "take_records")
        try:
            records = self._made.answer(0, self._asked, LAST_RECORDS_S if last else 0)
        except WorkerFailed:  # they are in the run's log, and its death is told by its run
            records = []
        if records is None:
            return []
        self._asked = None
        return records + self.records(last) if last and records else records

    def ask_to_leave(self) -> None:
        self._made.call(0, "leave", self._epoch)

    def dump(self, ranks: tuple[int, ...]) -> None:
        self._made.wait([self._made.call(rank, "dump_stacks") for rank in ranks], DUMP_S, len(ranks))

    def kill(self, ranks: tuple[int, ...]) -> None:
        for rank in ranks:
            self._made.kill(rank)

    def stop(self) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool = None

    @property
    def _made(self) -> Pool:
        assert self._pool is not None, "form comes first"
        return self._pool
