"""A job from start to end, with a crew of stand-ins; tests/test_cli.py has real workers lost, stopped and resized."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from commands import TINY_RECIPE

from expertmesh.launch import supervise
from expertmesh.launch.chaos import ChaosConfig
from expertmesh.launch.event_log import EventLog, read_events
from expertmesh.launch.recipe import load_recipe
from expertmesh.launch.recovery import Beat, FaultConfig, How, Left, Spares
from expertmesh.launch.roles import Epoch
from expertmesh.launch.run_folder import REQUEST
from expertmesh.launch.supervise import Job, JobFailed
from expertmesh.launch.worker_failed import WorkerFailed
from expertmesh.system.train.snapshot import RunState
from expertmesh.system.train.trainer import Record


class Script:
    """A crew that acts by the epoch: each has rounds of (who leaves, who beats)."""

    starts_workers = True

    def __init__(self, *epochs: list[tuple[list[Left], list[Beat]]]) -> None:
        self._epochs = [list(rounds) for rounds in epochs]
        self.formed: list[tuple[Epoch, tuple[int, ...]]] = []
        self.waiting = Spares()
        self.done: list[Any] = []
        self._now: tuple[list[Left], list[Beat]] = ([], [])

    def form(self, epoch: Epoch, keep: tuple[int, ...], spares: tuple[int, ...]) -> None:
        self.formed.append((epoch, keep))
        if spares:
            self.done.append(("spares", spares))
            self.waiting = Spares(lost=1)

    def spares(self) -> Spares:
        return self.waiting

    def refill(self) -> None:
        self.done.append("refill")
        self.waiting = Spares(starting=1)

    def wait(self, seconds: float) -> list[Left]:
        rounds = self._epochs[self.formed[-1][0].number]
        self._now = rounds.pop(0) if rounds else ([], [])
        return self._now[0]

    def beats(self) -> Iterator[Beat]:
        yield from self._now[1]

    def records(self, last: bool = False) -> list[Record]:
        """Of whoever works: that the epoch's log was opened."""
        return [{"kind": "opened"}] if self._now[1] else []

    def ask_to_leave(self) -> None:
        self.done.append("leave")

    def dump(self, ranks: tuple[int, ...]) -> None:
        self.done.append(("dump", ranks))

    def kill(self, ranks: tuple[int, ...]) -> None:
        self.done.append(("kill", ranks))

    def stop(self) -> None:
        self.done.append("stop")


WORK = ([], [Beat(0, 1, 3, 3), Beat(1, 1, 3, 3)])
LOSS = ([Left(1, How.DIED, "died"), Left(0, How.RAISED, "failed: cut")], [])
END = ([Left(0, How.DONE, step=30), Left(1, How.DONE, step=30)], [])
SAVED = ([Left(0, How.DONE, step=3), Left(1, How.DONE, step=3)], [])


@pytest.fixture
def first(tmp_path, monkeypatch) -> Epoch:
    (tmp_path / "tiny.yaml").write_text(TINY_RECIPE)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("tiny.yaml", [])
    recipe.run_folder.mkdir(parents=True)
    return Epoch(0, recipe, recipe.model, {}, None, None, [{"kind": "start"}], frozenset())


def run(first: Epoch, crew: Script, ending: bool = False) -> list[Record]:
    watched: list[Record] = []
    told = threading.Event()
    if ending:
        told.set()
    Job(first, crew, EventLog(first.recipe.run_folder), watched.append).run(told)
    return watched


def happened(first: Epoch) -> list[str]:
    return [event["what"] for event in read_events(first.recipe.run_folder)]


def test_before_the_first_checkpoint_a_job_begins_again_where_it_began(first):
    crew = Script([WORK, LOSS], [WORK, END])
    watched = run(first, crew)
    (_, again) = crew.formed
    assert again[1] == (0,) and again[0].number == 1 and again[0].resume_from is None
    events = [record["what"] for record in watched if record["kind"] == "event"]
    assert [record["what"] for record in again[0].opening] == ["failed", "re-formed"] == events
    waits = [record["for"] for record in watched if record["kind"] == "waiting"]
    assert waits == ["trainer 0, 1 to start", "trainer 0, 1 to start"], "once an epoch"
    assert happened(first) == ["started", "failed", "re-formed", "finished"]
    status = json.loads((first.recipe.run_folder / "status.json").read_text())
    assert (status["phase"], status["epoch"], status["failures"]) == ("over", 1, 1)


def test_what_the_log_was_to_open_with_is_not_lost_with_an_epoch_that_never_opened_it(first):
    crew = Script([LOSS], [([Left(0, How.DIED, "died"), Left(1, How.RAISED, "failed: cut")], [])], [WORK, LOSS], [END])
    run(first, crew)
    openings = [[record.get("what", record["kind"]) for record in epoch.opening] for epoch, _ in crew.formed]
    again = ["failed", "re-formed"]
    assert openings == [["start"], ["start", *again], ["start", *again, *again], again]


def test_a_spare_takes_the_rank_of_a_lost_worker(first):
    recipe = first.recipe.model_copy(update={"fault": FaultConfig(spares=1)})
    crew = Script([WORK, LOSS], [WORK, ([], []), END])
    crew.waiting = Spares(ready=1)
    run(first._replace(recipe=recipe), crew)
    assert crew.done == [("spares", (1,)), "refill"]
    (formed,) = [event for event in read_events(recipe.run_folder) if event["what"] == "re-formed"]
    assert formed["kept"] == [0] and formed["spares"] == [1]
    status = json.loads((recipe.run_folder / "status.json").read_text())
    assert status["spares"] == {"ready": 0, "starting": 1, "lost": 0}


def test_a_job_shrinks_though_its_drill_was_on_a_worker_that_it_has_no_more(first):
    changed = {"fault": FaultConfig(policy="shrink"), "chaos": ChaosConfig(kill="trainer:1@step=3")}
    crew = Script([WORK, LOSS], [([Left(0, How.DONE, step=30)], [])])
    run(first._replace(recipe=first.recipe.model_copy(update=changed)), crew)
    again = crew.formed[1][0].recipe
    assert again.parallel.world_size == 1 and again.chaos == ChaosConfig()


def test_no_place_for_the_workers_is_told(first, monkeypatch):
    class Full(Script):
        def form(self, epoch: Epoch, keep: tuple[int, ...], spares: tuple[int, ...]) -> None:
            if epoch.number:
                raise WorkerFailed("pool trainer asks for 2 workers of 1 CPU; the cluster has room for 1: a has 1 CPU")
            super().form(epoch, keep, spares)

    with pytest.raises(JobFailed, match="the cluster has room for 1"):
        run(first, Full([WORK, LOSS]))
    assert happened(first)[-1] == "gave up"


def checkpoints(first: Epoch, monkeypatch: pytest.MonkeyPatch, whole: int | None, damaged: int | None) -> None:
    folder = first.recipe.run_folder / "checkpoints"
    found = folder / f"step-{whole:06d}" if whole else None
    bad = {folder / f"step-{damaged:06d}": "x.safetensors: not what was written"} if damaged else {}
    for path in (found, *bad):
        if path:
            path.mkdir(parents=True)
    monkeypatch.setattr(supervise, "last_whole", lambda run_dir: (found, bad))
    monkeypatch.setattr(supervise, "read_state", lambda path: RunState(whole or 0, {}))


def test_a_damaged_checkpoint_is_passed_over_and_told(first, monkeypatch):
    checkpoints(first, monkeypatch, whole=5, damaged=10)
    crew = Script([WORK, LOSS], [WORK, END])
    run(first, crew)
    assert crew.formed[1][0].resume_from == first.recipe.run_folder / "checkpoints" / "step-000005"
    assert happened(first) == ["started", "failed", "damaged checkpoint", "re-formed", "finished"]
    left = {path.name for path in (first.recipe.run_folder / "checkpoints").iterdir()}
    assert left == {"step-000005", "damaged-step-000010"}
    assert (first.recipe.run_folder / "checkpoint").resolve().name == "step-000005"


def test_no_checkpoint_is_whole(first, monkeypatch):
    checkpoints(first, monkeypatch, whole=None, damaged=10)
    with pytest.raises(JobFailed, match="x.safetensors: not what was written; no checkpoint is whole"):
        run(first, Script([WORK, LOSS]))
    assert (first.recipe.run_folder / "checkpoints" / "step-000010").is_dir(), "it may still be of use to somebody"


def test_giving_up_clears_what_a_full_disk_has_of_an_unfinished_checkpoint(first):
    writing = first.recipe.run_folder / "checkpoints" / "step-000005.writing"
    writing.mkdir(parents=True)
    full = Left(1, How.RAISED, "failed: SaveFailed: step 5 could not be saved: No space left", hopeless=True)
    with pytest.raises(JobFailed, match="No space left.*the same command goes on from the last checkpoint"):
        run(first, Script([WORK, ([full, Left(0, How.RAISED, "failed: cut")], [])]))
    assert not writing.exists()


def test_told_to_end_it_saves_first(first):
    crew = Script([WORK, SAVED])
    with pytest.raises(KeyboardInterrupt):
        run(first, crew, ending=True)
    assert crew.done == ["leave"]
    assert happened(first) == ["started", "told to end", "ended"]


def test_a_request_changes_the_layout(first):
    request = first.recipe.run_folder / REQUEST
    request.write_text('{"experts_parallel": 4}')
    four = ([Left(rank, How.DONE, step=30) for rank in range(4)], [])
    crew = Script([WORK, SAVED], [four])
    run(first, crew)
    sizes = crew.formed[1][0].recipe.parallel
    assert (sizes.ep, sizes.dp) == (4, 4) and crew.done == ["leave"] and not request.exists()


@pytest.mark.parametrize(
    "request_, told",
    [('{"experts_parallel": 3}', "does not divide"), ("nonsense", "Expecting value"), ("3", "no attribute")],
)
def test_a_request_that_cannot_be_met_is_told_and_changes_nothing(first, request_, told):
    (first.recipe.run_folder / REQUEST).write_text(request_)
    crew = Script([WORK, END])
    run(first, crew)
    assert len(crew.formed) == 1
    events = read_events(first.recipe.run_folder)
    why = [event["why"] for event in events if event["what"] == "not resized"]
    assert len(why) == 1 and told in why[0]


def test_ranks_that_somebody_else_has_started_stay_as_many(first):
    (first.recipe.run_folder / REQUEST).write_text('{"experts_parallel": 4}')
    crew = Script([WORK, END])
    crew.starts_workers = False
    run(first, crew)
    (why,) = [event["why"] for event in read_events(first.recipe.run_folder) if event["what"] == "not resized"]
    assert why == "whoever started the workers says how many there are: stop the job, and start it with others"


def test_ranks_that_somebody_else_has_started_are_not_started_anew(first):
    crew = Script([WORK, LOSS])
    crew.starts_workers = False
    with pytest.raises(JobFailed, match="trainer 1"):
        run(first, crew)
    assert len(crew.formed) == 1


def test_a_request_to_stop(first):
    (first.recipe.run_folder / REQUEST).write_text('{"stop": true}')
    crew = Script([WORK, SAVED])
    with pytest.raises(KeyboardInterrupt):
        run(first, crew)
    assert crew.done == ["leave"]
