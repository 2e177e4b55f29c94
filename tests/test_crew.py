"""Which process has which rank, with a pool of stand-ins; tests/test_cli.py has real ones."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import pytest
from commands import TINY_RECIPE

from expertmesh.launch.crew import PoolCrew
from expertmesh.launch.lifeline import Lifeline
from expertmesh.launch.recipe import load_recipe
from expertmesh.launch.recovery import How, Left, Spares
from expertmesh.launch.rendezvous import join
from expertmesh.launch.roles import Epoch
from expertmesh.launch.worker_failed import WorkerFailed


class StandIn:
    """A pool whose calls end when a test says so. A call is (place, life of the process there, method)."""

    def __init__(self, workers: int, cpus: float, *arguments: Any, spares: int = 0) -> None:
        self.lives = [0] * (workers + spares)
        self.calls: list[tuple[int, int, str]] = []
        self.arguments: dict[tuple[int, int, str], tuple[Any, ...]] = {}
        self.ended = set[tuple[int, int, str]]()
        self.dead = set[tuple[int, int]]()
        self.killed: list[int] = []
        self.waited_for: list[tuple[int, int, str]] = []

    def check_room(self) -> None:
        pass

    def await_started(self, places: list[int]) -> None:
        pass

    def call(self, place: int, method: str, *arguments: Any) -> tuple[int, int, str]:
        call = (place, self.lives[place], method)
        self.calls.append(call)
        self.arguments[call] = arguments
        return call

    def when_over(self, call: tuple[int, int, str], tell: Callable[[], None]) -> None:
        pass

    def kill(self, place: int) -> None:
        self.killed.append(place)

    def wait(self, calls: list, seconds: float, count: int = 1) -> list:
        if seconds:
            self.waited_for += calls
        return [call for call in calls if call in self.ended or call[:2] in self.dead]

    def answer(self, place: int, call: tuple[int, int, str], seconds: float) -> Any:
        if call[:2] in self.dead:
            raise WorkerFailed(f"trainer {place} died: killed, out of memory, or crashed", died=True)
        return 9

    def replace(self, place: int) -> None:
        self.lives[place] += 1

    def stop(self) -> None:
        pass


@pytest.fixture
def epoch(tmp_path) -> Epoch:
    (tmp_path / "tiny.yaml").write_text(TINY_RECIPE)
    recipe = load_recipe(str(tmp_path / "tiny.yaml"), [])
    return Epoch(0, recipe, recipe.model, {}, None, None, [], frozenset())


@pytest.fixture
def two_spares(epoch) -> tuple[PoolCrew, StandIn]:
    """Ranks 0 and 1 at places 0 and 1; of the spares at 2 and 3, the second is ready."""
    made = PoolCrew("127.0.0.1", StandIn, 1, 4, 2)
    made.form(epoch, (), ())
    pool: Any = made._pool
    pool.ended.add((3, 0, "prepare"))
    assert made.spares() == Spares(ready=1, starting=1)
    return made, pool


def runs(pool: StandIn, of: int) -> dict[int, tuple[int, int]]:
    """The place and life of each rank of epoch `of`."""
    found = {call: pool.arguments[call] for call in pool.calls if call[2] == "run"}
    return {rank: call[:2] for call, (epoch, rank) in found.items() if epoch.number == of}


def test_a_ready_spare_takes_the_rank_and_the_lost_place_is_a_spares(two_spares, epoch):
    made, pool = two_spares
    pool.dead.add((1, 0))
    assert made.wait(0) == [Left(1, How.DIED, "died: killed, out of memory, or crashed")]
    made.form(epoch._replace(number=1), (0,), (1,))
    assert runs(pool, 1) == {0: (0, 0), 1: (3, 0)}
    assert made.spares() == Spares(starting=1, lost=1)
    assert pool.lives == [0, 0, 0, 0], "nothing starts while members do"
    made.refill()
    assert pool.lives == [0, 1, 0, 0] and pool.calls[-1] == (1, 1, "prepare")
    pool.ended.add((1, 1, "prepare"))
    assert made.spares() == Spares(ready=1, starting=1)
    pool.ended.add((3, 0, "run"))
    assert made.wait(0) == [Left(1, How.DONE, step=9)], "rank 1, which is at place 3 now"


def test_a_spare_that_died_unseen_is_passed_over(two_spares, epoch):
    made, pool = two_spares
    pool.dead |= {(1, 0), (3, 0)}
    made.form(epoch._replace(number=1), (0,), (1,))
    assert runs(pool, 1)[1] == (2, 0)
    assert made.spares() == Spares(lost=2)


def hold_a_line(port: int, rank: int) -> None:
    Lifeline("127.0.0.1", join("127.0.0.1", port), 0, rank)
    time.sleep(600)


def test_a_death_that_ray_does_not_tell_of_is_known_by_the_line(two_spares, epoch):
    """And whoever lives on, cut off from here alone, is ended before its rank is another's."""
    made, pool = two_spares
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=hold_a_line, args=(made._store.port, rank), daemon=True) for rank in range(2)]
    for worker in workers:
        worker.start()
    while sum(len(heard) == 8 for heard in made._lines._heard.values()) < 2:  # both are at work
        assert made.wait(1) == [] and all(worker.is_alive() for worker in workers)
    workers[1].kill()
    assert made.wait(60) == [Left(1, How.DIED, "died: killed, out of memory, or crashed")]
    assert pool.killed == [1] and made.wait(0) == []
    made.kill((0,))
    workers[0].join(60)
    assert workers[0].exitcode == 1 and pool.killed == [1, 0]
    pool.waited_for.clear()  # the pool was given time to say how it ended
    made.form(epoch._replace(number=1), (), (1,))
    assert pool.waited_for == [(1, 0, "run")] and runs(pool, 1)[1] == (3, 0)


def test_where_no_spare_is_left_a_new_process_is_started(two_spares, epoch):
    made, pool = two_spares
    pool.dead |= {(1, 0), (2, 0), (3, 0)}
    made.form(epoch._replace(number=1), (0,), (1,))
    assert runs(pool, 1)[1] == (1, 1)


def test_after_no_place_was_found_there_is_nothing_to_be_told(epoch):
    def full(*_: Any, **__: Any) -> None:
        raise WorkerFailed("the cluster has room for 0")

    pools = iter([StandIn, full])
    made = PoolCrew("127.0.0.1", lambda *place, spares: next(pools)(*place, spares=spares), 1, None, 1)
    made.form(epoch, (), ())
    with pytest.raises(WorkerFailed):
        made.form(epoch._replace(number=1), (), ())
    assert made.records() == [] and list(made.beats()) == [] and made.spares() == Spares()
    made.stop()
