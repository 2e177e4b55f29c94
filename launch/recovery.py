"""What a training job does when something happens to it: a pure function, which can be tested without a process.

    (state, event) -> (state, actions)        `advance`

    running ── a member died, raised, or hangs ──► settling ── all have left, or SETTLE_S passed ──► Form, or GiveUp
       │                                              ▲
       ├── asked to leave: AskToLeave, all save at the end of a step and return ── of another size ──► Form
       └── all returned at the last step ──► Finish

An epoch is one life of the process group: from Form until its members have left. Every epoch begins at the last whole
checkpoint, or where the job began when there is none yet. So what is trained is the same, bit for bit, as if nothing
had happened, as long as the layout stays.

Spares are processes that have all imported and wait. A lost member's rank goes to one, where there is one, and what was
taken or lost is started anew once training goes on, so that it slows no member down. The loss of a spare is no failure.

Who is guilty: the member whose process is gone; else one that fell silent and has not left; else one whose error says
that trying again is no use; else the one that raised first. Peers of a lost member fail within 0.05 s (seen on one
machine) with an error of the connection: a symptom. Of a job that makes no progress at all, whoever holds the others up
(see hang.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from expertmesh.launch.hang import Seen, odd_ones, where_all_are
from expertmesh.parallel.recipe_section import RecipeSection
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.parallel.whereabouts import Place

SETTLE_S = 3.0  # from a failure until those who still hang on a peer are not waited for
SILENT_S = 3.0  # without a heartbeat, of which there is one a second
UNHEARD_S = 120.0  # until the first heartbeat, which comes before the imports: only a process must have started
START_S = 600.0  # until the first step begins: a cold process imports torch, and a large model is loaded
IMPORTS_S = 30.0  # without a heartbeat while it starts: imports hold it up, on a busy machine for many seconds
BUDGET_S = 3600.0  # the time in which failures are counted
REFILL_S = 10.0  # from one start of spares to the next: one that dies as it starts would keep cores busy for ever


class FaultConfig(RecipeSection):
    """What a job does about failures."""

    policy: Literal["replace", "shrink", "restart", "end"] = Field(
        "replace",
        description="of a lost worker: replace it, and keep the others' processes; shrink to those left; restart all; "
        "end the job",
    )
    budget: int = Field(3, ge=0, description="failures within an hour that are survived; 0: none")
    stall_s: float = Field(300.0, gt=0, description="seconds without any progress after which the job is said to hang")
    not_finite: Literal["stop", "skip"] = Field(
        "stop", description="of a NaN or infinite loss: stop, or go back and leave that batch out"
    )
    grace_s: float = Field(60.0, ge=0, description="seconds to save in, when the job is told to end")
    spares: int = Field(0, ge=0, description="more processes, each ready to take the rank of a lost worker at once")

    @model_validator(mode="after")
    def _somebody_takes_them(self) -> FaultConfig:
        if self.spares and self.policy != "replace":
            raise ValueError(f"spares={self.spares}: policy={self.policy} takes none; take policy=replace, or spares=0")
        return self


class Phase(StrEnum):
    RUNNING = "running"
    SETTLING = "settling"
    OVER = "over"


class How(StrEnum):
    """The ways in which a member leaves an epoch."""

    DONE = "done"
    RAISED = "raised"
    DIED = "died"


@dataclass(frozen=True)
class Member:
    """One worker in the present epoch, as the coordinator knows it. Times are the coordinator's."""

    beat_at: float  # when the last heartbeat was seen, or the epoch was formed
    beat: int = 0  # its number; 0: none yet
    progress: int = 0  # what it has done: steps begun, validations, saves
    step: int = 0  # the step that it is at
    place: Place = Place()  # and where it is in it
    left: How | None = None
    left_at: float = 0.0
    hopeless: bool = False
    why: str = ""


class Spares(NamedTuple):
    """How many there are; as an event: they were looked at."""

    ready: int = 0
    starting: int = 0
    lost: int = 0  # dead, or members by now; to be started anew


# What happens.


class Beat(NamedTuple):
    """A heartbeat was read; the same number as before says that none has come since."""

    rank: int
    number: int
    progress: int
    step: int
    place: Place = Place()


class Left(NamedTuple):
    """A member is no longer at work."""

    rank: int
    how: How
    why: str = ""
    step: int = 0  # DONE: the last one that was made
    not_finite: int | None = None  # RAISED for this: the step whose loss was not finite
    hopeless: bool = False  # RAISED: trying again cannot help


class Tick(NamedTuple):
    """Time has passed."""


class Resize(NamedTuple):
    """The job is to go on with another layout."""

    sizes: ParallelSizes


class Interrupt(NamedTuple):
    """The job is to save and end."""


Event = Beat | Left | Tick | Resize | Interrupt | Spares


# What is to be done about it.


class Note(NamedTuple):
    """A line of events.jsonl."""

    record: dict[str, Any]


class Dump(NamedTuple):
    """Have members write where each of their threads is, if they still can."""

    ranks: tuple[int, ...]


class Kill(NamedTuple):
    ranks: tuple[int, ...]


class AskToLeave(NamedTuple):
    """Have all members save and return at the end of the step that they are at."""


class Form(NamedTuple):
    """Begin the next epoch from the last whole checkpoint."""

    epoch: int
    sizes: ParallelSizes
    keep: tuple[int, ...]  # ranks whose processes may go on; the others are new ones
    skip: frozenset[int]
    spares: tuple[int, ...] = ()  # ranks, of those others, that spares take


class Refill(NamedTuple):
    """Start lost spares anew."""


class Finish(NamedTuple):
    """All is done, or saved. `complete`: the last step was made."""

    complete: bool


class GiveUp(NamedTuple):
    why: str


Action = Note | Dump | Kill | AskToLeave | Form | Refill | Finish | GiveUp


@dataclass(frozen=True)
class JobState:
    """All that the coordinator knows."""

    config: FaultConfig
    steps: int
    sizes: ParallelSizes
    smaller: tuple[ParallelSizes, ...]  # layouts that a job may shrink to, largest first
    members: tuple[Member, ...]
    epoch: int = 0
    phase: Phase = Phase.RUNNING
    since: float = 0.0  # of this phase
    progress_at: float = 0.0  # when any member last did something
    leave_for: ParallelSizes | None = None  # asked to leave, to go on so
    ending: bool = False  # asked to leave for good
    failures: tuple[float, ...] = ()  # when, within the last BUDGET_S
    last_failure: tuple[str, int] = ("", -1)  # why, and the furthest step that was at work then
    not_finite: int | None = None
    skip: frozenset[int] = frozenset()
    spares: Spares = Spares()
    refilled_at: float = float("-inf")

    @property
    def step(self) -> int:
        """The furthest step that a member is at."""
        return max(member.step for member in self.members)


def begin(
    config: FaultConfig, steps: int, sizes: ParallelSizes, smaller: tuple[ParallelSizes, ...], now: float
) -> JobState:
    """A job whose first epoch is being formed."""
    return JobState(config, steps, sizes, smaller, _new_members(sizes, now), since=now, progress_at=now)


def _new_members(sizes: ParallelSizes, now: float) -> tuple[Member, ...]:
    return tuple(Member(beat_at=now) for _ in range(sizes.world_size))


def advance(state: JobState, event: Event, now: float) -> tuple[JobState, list[Action]]:
    """What `event` makes of `state`, and what is to be done. `now`: seconds, of any clock that only goes forward."""
    if state.phase == Phase.OVER:
        return state, []
    match event:
        case Beat():
            return _beat(state, event, now), []
        case Left():
            return _left(state, event, now)
        case Tick():
            return _settle(state, now) if state.phase == Phase.SETTLING else _look_for_a_hang(state, now)
        case Spares():
            return _look_at_spares(state, event, now)
        case Resize(sizes):
            if state.ending or sizes == state.sizes:
                return state, []
            note = Note({"what": "resizing", "epoch": state.epoch, "step": state.step, "parallel": sizes.model_dump()})
            return replace(state, leave_for=sizes), [note, AskToLeave()]
        case Interrupt():
            if state.ending:
                return state, []
            note = Note({"what": "told to end", "epoch": state.epoch, "step": state.step})
            if state.phase == Phase.SETTLING or not state.step:  # nothing that is not saved can still be saved
                return replace(state, ending=True, phase=Phase.OVER), [note, Finish(complete=False)]
            return replace(state, ending=True, leave_for=None, since=now), [note, AskToLeave()]


def _beat(state: JobState, beat: Beat, now: float) -> JobState:
    member = state.members[beat.rank]
    if beat.number == member.beat:
        return state
    advanced = beat.progress > member.progress or not member.beat
    member = replace(member, beat=beat.number, beat_at=now, progress=beat.progress, step=beat.step, place=beat.place)
    state = replace(state, members=_with(state.members, beat.rank, member))
    return replace(state, progress_at=now) if advanced else state


def _left(state: JobState, event: Left, now: float) -> tuple[JobState, list[Action]]:
    member = state.members[event.rank]
    if member.left:
        return state, []
    step = event.step or member.step
    member = replace(member, left=event.how, left_at=now, hopeless=event.hopeless, why=event.why, step=step)
    members = _with(state.members, event.rank, member)
    state = replace(state, members=members)
    if event.how == How.DONE:
        return _all_done(state, now) if all(m.left == How.DONE for m in members) else (state, [])
    if event.not_finite is not None:
        state = replace(state, not_finite=event.not_finite)
    if state.phase == Phase.RUNNING:
        state = replace(state, phase=Phase.SETTLING, since=now)
    return _settle(state, now)


def _all_done(state: JobState, now: float) -> tuple[JobState, list[Action]]:
    complete = state.step >= state.steps
    if complete or state.ending or state.leave_for is None:
        return replace(state, phase=Phase.OVER), [Finish(complete)]
    return _form(state, state.leave_for, (), now)


def _look_for_a_hang(state: JobState, now: float) -> tuple[JobState, list[Action]]:
    if state.ending and now - state.since > state.config.grace_s:
        note = Note({"what": "not saved", "epoch": state.epoch, "why": f"not done in grace_s={state.config.grace_s:g}"})
        return replace(state, phase=Phase.OVER), [note, Finish(complete=False)]
    at_work = {rank: member for rank, member in enumerate(state.members) if not member.left}
    stall_s = state.config.stall_s
    # A job that starts has longer, but not a worker that was heard of and is no more, or never was.
    limits = [max(stall_s, IMPORTS_S if member.beat else UNHEARD_S) for member in at_work.values()]
    silences = [now - member.beat_at for member in at_work.values()]
    passed = [limit for limit, silence in zip(limits, silences, strict=True) if silence > limit]
    limit = stall_s if state.step else min(passed, default=max(stall_s, START_S))
    if now - state.progress_at <= limit:
        return state, []
    seen = {
        rank: Seen(member.step, member.place, member.progress, silent=now - member.beat_at > SILENT_S)
        for rank, member in at_work.items()
    }
    guilty = tuple(odd_ones(seen))
    members = state.members
    for rank in guilty:
        why = f"hangs: no {'heartbeat' if seen[rank].silent else 'progress'}, and none of the job for {limit:g} s"
        members = _with(members, rank, replace(members[rank], left=How.DIED, left_at=now, why=why))
    told = {"what": "hangs", "epoch": state.epoch, "step": state.step, "why": where_all_are(seen, guilty)}
    state = replace(state, members=members, phase=Phase.SETTLING, since=now)
    everybody = tuple(sorted(at_work))
    return state, [Note(told), Dump(everybody), Kill(guilty)]


def _look_at_spares(state: JobState, seen: Spares, now: float) -> tuple[JobState, list[Action]]:
    actions: list[Action] = []
    if died := max(seen.lost - state.spares.lost, 0):
        actions.append(Note({"what": "spares lost", "epoch": state.epoch, "step": state.step, "count": died}))
    state = replace(state, spares=seen)
    training = state.phase == Phase.RUNNING and state.step
    if seen.lost and training and now - state.refilled_at >= REFILL_S:
        return replace(state, refilled_at=now), [*actions, Refill()]
    return state, actions


def _settle(state: JobState, now: float) -> tuple[JobState, list[Action]]:
    """Once all have left, or had time to: decide. Who still waits for a lost peer is ended."""
    waiting = tuple(rank for rank, member in enumerate(state.members) if not member.left)
    if waiting and now - state.since < SETTLE_S:
        return state, []
    actions: list[Action] = [Kill(waiting)] if waiting else []
    dead = [rank for rank, member in enumerate(state.members) if member.left == How.DIED]
    raised = [rank for rank, member in enumerate(state.members) if member.left == How.RAISED]
    silent = [rank for rank in waiting if now - state.members[rank].beat_at > SILENT_S]
    suspects = dead or silent or raised
    guilty = min(suspects, key=lambda rank: (not state.members[rank].hopeless, state.members[rank].left_at))
    why = f"trainer {guilty} {state.members[guilty].why or 'died or hangs: it has fallen silent'}"
    failed = {"what": "failed", "epoch": state.epoch, "step": state.step, "rank": guilty, "why": why}
    actions.append(Note(failed))
    state, reason = _judge(state, why, state.members[guilty].hopeless, now)
    if reason is not None:
        return replace(state, phase=Phase.OVER), [*actions, GiveUp(reason)]
    if state.ending:  # the last checkpoint is what the job goes on from, when it is started again
        not_saved = Note({"what": "not saved", "epoch": state.epoch, "why": why})
        return replace(state, phase=Phase.OVER), [*actions, not_saved, Finish(complete=False)]
    sizes = state.leave_for or state.sizes
    if state.config.policy == "shrink" and dead:
        left = state.sizes.world_size - len(dead)
        fitting = [smaller for smaller in state.smaller if smaller.world_size <= left]
        if not fitting:
            return replace(state, phase=Phase.OVER), [*actions, GiveUp(f"{why}; no layout fits {left} workers")]
        sizes = fitting[0]
    if state.config.policy != "replace" or sizes != state.sizes:
        state, formed = _form(state, sizes, (), now)
        return state, [*actions, *formed]
    lost = [rank for rank in range(sizes.world_size) if rank not in raised]
    ready, starting, gone = state.spares
    taken = tuple(lost[: ready + starting])
    at_once = min(len(taken), ready)
    spares = Spares(ready - at_once, starting - (len(taken) - at_once), gone + len(taken))
    state, formed = _form(replace(state, spares=spares), sizes, tuple(raised), now, taken)
    return state, [*actions, *formed]


def _judge(state: JobState, why: str, hopeless: bool, now: float) -> tuple[JobState, str | None]:
    """Count a failure; returns why the job cannot go on, None if it can."""
    if state.config.policy == "end":
        return state, why
    recent = (*(at for at in state.failures if now - at < BUDGET_S), now)
    here, before = (why, state.step), state.last_failure
    step = state.not_finite
    if step is not None:
        if state.config.not_finite == "stop":
            return state, why
        state = replace(state, skip=state.skip | {step})
    state = replace(state, failures=recent, last_failure=here, not_finite=None)
    if hopeless:
        return state, why
    if step is None and here == before and state.epoch:
        return state, f"{why}, for the second time at step {state.step}"
    if len(recent) > state.config.budget:
        return state, f"{why}; that is failure {len(recent)} within an hour, fault.budget={state.config.budget}"
    return state, None


def _form(
    state: JobState, sizes: ParallelSizes, keep: tuple[int, ...], now: float, spares: tuple[int, ...] = ()
) -> tuple[JobState, list[Action]]:
    epoch = state.epoch + 1
    state = replace(
        state,
        sizes=sizes,
        members=_new_members(sizes, now),
        epoch=epoch,
        phase=Phase.RUNNING,
        since=now,
        progress_at=now,
        leave_for=None,
    )
    return state, [Form(epoch, sizes, keep, state.skip, spares)]


def _with(members: tuple[Member, ...], rank: int, member: Member) -> tuple[Member, ...]:
    return (*members[:rank], member, *members[rank + 1 :])


def waiting_for(state: JobState) -> str | None:
    """What the job waits for, in words for a person; None while it trains."""
    if state.phase == Phase.OVER:
        return None
    if state.phase == Phase.SETTLING:
        here = [str(rank) for rank, member in enumerate(state.members) if not member.left]
        return f"trainer {', '.join(here)} to notice the loss of a peer" if here else None
    silent = [str(rank) for rank, member in enumerate(state.members) if not member.beat]
    if silent:
        return f"trainer {', '.join(silent)} to start"
    if state.ending or state.leave_for:
        return "all workers to end their step and save"
    return "the model to be built and loaded" if state.step == 0 else None
