"""A training job from its first epoch to its last: what `recovery` decides is done here, and it is told what happens.

No decision is made in this file, and it knows nothing of launchers but what a `Crew` says of itself.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from expertmesh.launch.asked_to_end import asked_to_end
from expertmesh.launch.chaos import ChaosConfig
from expertmesh.launch.crew import Crew
from expertmesh.launch.event_log import EventLog
from expertmesh.launch.launchers import crew_of, place_told
from expertmesh.launch.layouts import scaled, smaller_layouts
from expertmesh.launch.recipe import check_together
from expertmesh.launch.recovery import (
    Action,
    AskToLeave,
    Dump,
    Event,
    Finish,
    Form,
    GiveUp,
    Interrupt,
    Kill,
    Note,
    Refill,
    Resize,
    Tick,
    advance,
    begin,
)
from expertmesh.launch.roles import Epoch
from expertmesh.launch.run_folder import REQUEST
from expertmesh.launch.started_ranks import FirstRank
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.train.snapshot import clear_unfinished, last_whole, read_state, set_aside
from expertmesh.system.train.trainer import Record

WATCH_EVERY_S = 0.25


class JobFailed(RuntimeError):
    """What a job could not survive; one line."""


def supervise(first: Epoch, watch: Callable[[Record], None], first_rank: FirstRank | None = None) -> None:
    """Run a job with the workers of the launcher that its recipe names; see `Job.run` and `crew_of`."""
    recipe = first.recipe
    log = EventLog(recipe.run_folder)
    watch({"kind": "waiting", "for": place_told(recipe)})
    with (
        asked_to_end() as ending,
        crew_of(recipe, first_rank, lambda why: _end_at_once(log, why)) as crew,
    ):
        Job(first, crew, log, watch).run(ending)


def _end_at_once(log: EventLog, why: str) -> None:
    """End a process whose calls of Ray will not return; its workers see that it is gone (heartbeat.py)."""
    log.write({"what": "gave up", "why": why})
    print(f"expertmesh: {why}; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
    os._exit(1)


class Job:
    """One job and its crew."""

    def __init__(self, first: Epoch, crew: Crew, log: EventLog, watch: Callable[[Record], None]) -> None:
        recipe = first.recipe
        self._last, self._crew, self._log, self._watch = first, crew, log, watch
        self._run_folder = recipe.run_folder
        smaller = smaller_layouts(recipe.parallel, lambda sizes: self._allowed(sizes) is None)
        fault = recipe.fault
        if not crew.starts_workers:
            fault = fault.model_copy(update={"policy": "end"})
        self._state = begin(fault, recipe.train.steps, recipe.parallel, smaller, time.monotonic())
        self._told: list[Record] = []  # what happened since an epoch was formed; the next one's log opens with it
        self._opened = False  # the present epoch's log, with what it is to open with
        self._stopped_at: float | None = None  # when the last failure was noticed, until a step is made again
        self._outcome: Finish | GiveUp | None = None

    def run(self, ending: threading.Event) -> None:
        """Train to the end. Raises JobFailed, and KeyboardInterrupt when `ending` was set and all is saved."""
        self._log.write({"what": "started", "epoch": 0, "parallel": self._state.sizes.model_dump(mode="json")})
        self._form(self._last, (), ())
        while self._outcome is None:
            told_to_end = ending.is_set()  # before the beats: a step that was seen from outside is known then
            for left in self._crew.wait(WATCH_EVERY_S):
                self._happens(left)
            for beat in self._crew.beats():
                self._happens(beat)
            self._happens(self._crew.spares())
            self._show(self._crew.records())
            self._happens(Tick())
            if told_to_end:
                self._happens(Interrupt())
            elif (request := self._request()) is not None:
                self._happens(request)
            self._tell_where_it_stands()
        self._end(self._outcome)

    def _end(self, outcome: Finish | GiveUp) -> None:
        if isinstance(outcome, GiveUp):
            clear_unfinished(self._run_folder)
            self._log.write({"what": "gave up", "epoch": self._state.epoch, "why": outcome.why})
            logs = self._run_folder / "logs"
            raise JobFailed(f"{outcome.why}; logs in {logs}; the same command goes on from the last checkpoint")
        if not self._state.ending or outcome.complete:
            self._show(self._crew.records(last=True))
        self._log.write({"what": "finished" if outcome.complete else "ended", "epoch": self._state.epoch})
        if not outcome.complete:
            raise KeyboardInterrupt

    def _happens(self, event: Event) -> None:
        self._state, actions = advance(self._state, event, time.monotonic())
        for action in actions:
            self._do(action)

    def _do(self, action: Action) -> None:
        match action:
            case Note(record):
                if record["what"] == "failed":
                    self._stopped_at = self._stopped_at or time.monotonic()
                    self._change_recipe(chaos=self._last.recipe.chaos.survived(record["rank"]))
                self._note(record)
            case Dump(ranks):
                self._crew.dump(ranks)
            case Kill(ranks):
                self._crew.kill(ranks)
            case AskToLeave():
                self._crew.ask_to_leave()
            case Form():
                self._next_epoch(action)
            case Refill():
                self._crew.refill()
            case Finish() | GiveUp():
                self._outcome = action

    def _note(self, record: dict[str, Any]) -> None:
        self._log.write(record)
        event = {"kind": "event", **record}
        self._told.append(event)
        self._watch(event)

    def _show(self, records: list[Record]) -> None:
        self._opened |= bool(records)
        for record in records:
            if record["kind"] == "event" and "epoch" not in record:  # else it is one that an epoch's log opened with
                self._log.write({"epoch": self._state.epoch, **{k: v for k, v in record.items() if k != "kind"}})
            if record["kind"] == "step" and self._stopped_at is not None:
                seconds = round(time.monotonic() - self._stopped_at, 2)
                self._log.write(
                    {"what": "training again", "epoch": self._state.epoch, "step": record["step"], "seconds": seconds}
                )
                self._stopped_at = None
            self._watch(record)

    def _next_epoch(self, form: Form) -> None:
        """Form it from the newest checkpoint that is whole; where the run has none, from where the job began."""
        whole, damaged = last_whole(self._run_folder)
        for told in damaged.values():
            self._note({"what": "damaged checkpoint", "epoch": form.epoch, "why": told})
        if whole is not None:
            set_aside(self._run_folder, damaged, whole)
        elif damaged:
            self._outcome = GiveUp(f"{next(iter(damaged.values()))}; no checkpoint is whole")
            return
        step = read_state(whole).step if whole else 0
        sizes = form.sizes.model_dump(mode="json")
        who = {"kept": list(form.keep), "spares": list(form.spares)}
        self._note({"what": "re-formed", "epoch": form.epoch, "step": step, "parallel": sizes, **who})
        self._change_recipe(parallel=form.sizes)
        self._last = self._last._replace(
            number=form.epoch,
            resume_from=whole or self._last.resume_from,
            opening=self._told if self._opened else [*self._last.opening, *self._told],
            skip=form.skip,
        )
        self._form(self._last, form.keep, form.spares)
        self._told, self._opened = [], False

    def _change_recipe(self, **sections: Any) -> None:
        self._last = self._last._replace(recipe=self._last.recipe.model_copy(update=sections))

    def _form(self, epoch: Epoch, keep: tuple[int, ...], spares: tuple[int, ...]) -> None:
        self._tell_where_it_stands()
        try:
            self._crew.form(epoch, keep, spares)
        except RuntimeError as error:  # no place for them; no decision can make one
            self._outcome = GiveUp(str(error))

    def _tell_where_it_stands(self) -> None:
        before = self._log.waits_for
        self._log.show(self._state)
        if (waits := self._log.waits_for) not in (None, before):
            self._watch({"kind": "waiting", "for": waits})

    def _request(self) -> Event | None:
        """What somebody asked for with a file in the run's folder; a size that the job cannot have is told."""
        path = self._run_folder / REQUEST
        try:
            content = path.read_text()
        except FileNotFoundError:
            return None
        path.unlink(missing_ok=True)
        try:
            request = json.loads(content)
            if request.get("stop"):
                return Interrupt()
            sizes = scaled(self._state.sizes, int(request["experts_parallel"]))
            problem = self._allowed(sizes)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = " ".join(str(error).split())
        if problem is not None:
            self._note({"what": "not resized", "epoch": self._state.epoch, "why": problem})
            return None
        return Resize(sizes)

    def _allowed(self, sizes: ParallelSizes) -> str | None:
        """Why the job cannot have this layout; None: it can. A drill on a worker of another is no reason."""
        changed = self._last.recipe.model_copy(update={"parallel": sizes, "chaos": ChaosConfig()})
        if not self._crew.starts_workers:
            return "whoever started the workers says how many there are: stop the job, and start it with others"
        try:
            check_together(changed, self._last.model)
        except ValueError as error:
            return str(error)
        return None
