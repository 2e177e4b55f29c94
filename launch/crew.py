"""The workers of a training job as whoever supervises them sees them: formed, watched, asked, ended.

PoolCrew has them in a pool, of Ray's actors (ray_cluster.py) or of processes (process_pool.py). Those that somebody
else has started are in started_ranks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from expertmesh.launch.heartbeat import read_beats
from expertmesh.launch.lifeline import Lifelines
from expertmesh.launch.recovery import Beat, How, Left, Spares
from expertmesh.launch.rendezvous import Rendezvous
from expertmesh.launch.roles import Epoch
from expertmesh.launch.worker_failed import WorkerFailed
from expertmesh.system.train.snapshot import SaveFailed
from expertmesh.system.train.trainer import NotFinite, Record

DIED = "died: killed, out of memory, or crashed"
DUMP_S = 2.0  # to write stacks in; a process that is stopped never does
TELLS_S = 0.02  # for a pool to tell how a process ended whose line broke: that of this host's processes can
ENDS_S = 5.0  # until a pool has ended a process, or says that it has
LAST_RECORDS_S = 30.0


class Crew(Protocol):
    """What `supervise` needs of a launcher."""

    starts_workers: bool
    """False: whoever has started them says how many there are, and starts them anew."""

    def form(self, epoch: Epoch, keep: tuple[int, ...], spares: tuple[int, ...]) -> None:
        """Have workers run `epoch`: ranks `keep` in their old processes, `spares` in those of spares, others in new.

        Raises WorkerFailed, a RuntimeError, where there is no place for them.
        """

    def wait(self, seconds: float) -> list[Left]:
        """Who has left since the last call; waits up to `seconds` for the first."""

    def beats(self) -> Iterator[Beat]: ...

    def records(self, last: bool = False) -> list[Record]:
        """What rank 0 has recorded since the last call. `last`: wait for all there is."""

    def spares(self) -> Spares:
        """How many wait to take a rank."""

    def refill(self) -> None:
        """Start lost spares anew; nothing waits for them."""

    def ask_to_leave(self) -> None: ...

    def dump(self, ranks: tuple[int, ...]) -> None: ...

    def kill(self, ranks: tuple[int, ...]) -> None: ...

    def stop(self) -> None:
        """End all workers."""


class WorkerPool(Protocol):
    """What a PoolCrew needs of a pool: processes by their place, on which calls are made that end later.

    Raises WorkerFailed where there is no place for them, and of a call whose worker raised or died.
    """

    def check_room(self) -> None: ...

    def await_started(self, places: Sequence[int]) -> None: ...

    def call(self, place: int, method: str, *arguments: Any) -> Any: ...

    def answer(self, place: int, call: Any, seconds: float) -> Any:
        """What a call gave; None when it takes longer than `seconds`."""

    def wait(self, calls: list[Any], seconds: float, count: int = 1) -> list[Any]:
        """Those of `calls` that have ended, once `count` have or `seconds` have passed."""

    def when_over(self, call: Any, tell: Callable[[], None]) -> None:
        """Have `tell` called, by any thread, once a call has ended."""

    def replace(self, place: int) -> None: ...

    def kill(self, place: int) -> None: ...

    def stop(self) -> None: ...


class PoolCrew:
    """Workers of one pool, which is made anew when their number changes.

    The pool knows each process by its place. A rank moves to another place when a spare takes it; spares have none.
    """

    starts_workers = True

    def __init__(
        self, host: str, make: Callable[..., WorkerPool], cpus: int, slots: int | None, spares: int = 0
    ) -> None:
        """`host`: by which workers reach this process. `make(workers, cpus of each, host, port, spares=)`: a pool.

        `cpus` of each worker. `slots`: of this machine, which more workers than the job began with share.
        """
        self._store, self._make = Rendezvous(host), make
        self._lines = Lifelines(host, self._store.store)
        self._cpus, self._slots, self._spares = cpus, slots, spares
        self._pool: WorkerPool | None = None
        self._epoch = 0
        self._places: list[int] = []  # of each rank
        self._idle: dict[int, Any] = {}  # of each spare, and what it was asked; None: its process is gone
        self._ready = set[int]()  # places of spares that have prepared
        self._runs: dict[Any, int] = {}  # the rank of each call that has not ended
        self._lost: list[Any] = []  # calls of those who have lost their lines, and which the pool has yet to tell of
        self._asked: Any = None  # for records; not yet answered

    def form(self, epoch: Epoch, keep: tuple[int, ...], spares: tuple[int, ...]) -> None:
        world = epoch.recipe.parallel.world_size
        self._asked = None
        if self._lost:  # who lives on might write where another does now
            self._made.wait(self._lost, ENDS_S, len(self._lost))
            self._lost = []
        if self._pool is not None and (keep or spares) and world == len(self._places):
            self._pool.check_room()
            for rank in sorted(set(range(world)) - set(keep)):
                if rank not in spares or not self._take_spare(rank):
                    self._pool.replace(self._places[rank])
        else:
            self.stop()
            every = world + self._spares
            cpus = min(self._cpus, self._slots / every) if self._slots else self._cpus
            self._pool = self._make(world, cpus, self._store.host, self._store.port, spares=self._spares)
            self._places, self._ready = list(range(world)), set()
            self._idle = {spare: self._pool.call(spare, "prepare") for spare in range(world, every)}
        self._pool.await_started(self._places)
        self._epoch = epoch.number
        self._lines.begin(self._epoch)
        self._runs = {self._pool.call(self._places[rank], "run", epoch, rank): rank for rank in range(world)}
        for call in self._runs:
            self._pool.when_over(call, self._lines.wake)

    def _take_spare(self, rank: int) -> bool:
        """Give `rank` to a spare, one that is ready before one that is not; False where none is left."""
        self.spares()
        alive = [place for place, call in self._idle.items() if call is not None]
        if not alive:
            return False
        place = min(alive, key=lambda place: place not in self._ready)
        del self._idle[place]
        self._ready.discard(place)
        self._idle[self._places[rank]] = None
        self._places[rank] = place
        return True

    def spares(self) -> Spares:
        for place, call in self._idle.items():
            if call is None or not self._made.wait([call], 0):
                continue
            try:
                self._made.answer(place, call, 0)
            except WorkerFailed:
                self._idle[place] = None
                self._ready.discard(place)
            else:
                self._ready.add(place)
                self._idle[place] = self._made.call(place, "stand_by")
        lost = sum(call is None for call in self._idle.values())
        ready = len(self._ready)
        return Spares(ready, len(self._idle) - ready - lost, lost)

    def refill(self) -> None:
        for place, call in self._idle.items():
            if call is None:
                self._made.replace(place)
                self._idle[place] = self._made.call(place, "prepare")

    def wait(self, seconds: float) -> list[Left]:
        if not self._runs:
            return []
        broken = self._lines.wait(seconds)
        over = self._made.wait(list(self._runs), TELLS_S if broken else 0, len(broken) or 1)
        left = [self._left(self._runs.pop(call), call) for call in over]
        for call, rank in list(self._runs.items()):
            if rank in broken:
                self._made.kill(self._places[rank])  # if it lives, cut off from here
                self._lost.append(call)
                del self._runs[call]
                left.append(Left(rank, How.DIED, DIED))
        return left

    def _left(self, rank: int, call: Any) -> Left:
        try:
            return Left(rank, How.DONE, step=self._made.answer(self._places[rank], call, 0))
        except WorkerFailed as failure:
            if failure.died:
                return Left(rank, How.DIED, f"died: {str(failure).split(' died: ', 1)[-1]}")
            return raised(rank, f"failed: {str(failure).split(' failed: ', 1)[-1]}", failure.cause)

    def beats(self) -> Iterator[Beat]:
        yield from read_beats(self._store.store, self._epoch, len(self._places))

    def records(self, last: bool = False) -> list[Record]:
        if self._pool is None:  # there was no place for them
            return []
        if self._asked is None:
            self._asked = self._made.call(self._places[0], "take_records")
        try:
            records = self._made.answer(self._places[0], self._asked, LAST_RECORDS_S if last else 0)
        except WorkerFailed:  # they are in the run's log, and its death is told by its run
            records = []
        if records is None:
            return []
        self._asked = None
        return records + self.records(last) if last and records else records

    def ask_to_leave(self) -> None:
        self._made.call(self._places[0], "leave", self._epoch)

    def dump(self, ranks: tuple[int, ...]) -> None:
        self._made.wait([self._made.call(self._places[rank], "dump_stacks") for rank in ranks], DUMP_S, len(ranks))

    def kill(self, ranks: tuple[int, ...]) -> None:
        for rank in ranks:
            self._lines.cut(rank)
            self._made.kill(self._places[rank])

    def stop(self) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool, self._idle = None, {}

    @property
    def _made(self) -> WorkerPool:
        assert self._pool is not None, "form comes first"
        return self._pool


def raised(rank: int, why: str, cause: BaseException | None) -> Left:
    """That a member raised `cause`, and whether trying again can help."""
    step = cause.step if isinstance(cause, NotFinite) else None
    return Left(rank, How.RAISED, why, not_finite=step, hopeless=isinstance(cause, ValueError | SaveFailed))
