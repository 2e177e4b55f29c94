"""What a job does about each thing that can happen to it: rows of events in, actions and what was noted out."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest

from expertmesh.launch.recovery import (
    BUDGET_S,
    IMPORTS_S,
    REFILL_S,
    SETTLE_S,
    START_S,
    UNHEARD_S,
    Action,
    AskToLeave,
    Beat,
    Dump,
    Event,
    FaultConfig,
    Finish,
    Form,
    GiveUp,
    How,
    Interrupt,
    JobState,
    Kill,
    Left,
    Note,
    Phase,
    Refill,
    Resize,
    Spares,
    Tick,
    advance,
    begin,
    waiting_for,
)
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.parallel.whereabouts import Place

TWO, ONE, FOUR = ParallelSizes(dp=2, ep=2), ParallelSizes(dp=1), ParallelSizes(dp=4, ep=4)
CUT = "failed: RuntimeError: Connection reset by peer"
NONE = frozenset[int]()


def job(at_step: int = 5, **config: object) -> JobState:
    """Two workers at a step, at time 0."""
    state = begin(FaultConfig(**{"stall_s": 10.0, **config}), 20, TWO, (ONE,), 0.0)
    for rank in range(2):
        state, _ = advance(state, Beat(rank, 1, at_step, at_step), 0.0)
    return state


def play(state: JobState, *events: tuple[float, Event]) -> tuple[JobState, list[Action], list[dict]]:
    """The state after all events, what was to be done, and what was noted."""
    done: list[Action] = []
    for now, event in events:
        state, actions = advance(state, event, now)
        done += actions
    return state, [a for a in done if not isinstance(a, Note)], [a.record for a in done if isinstance(a, Note)]


class Case(NamedTuple):
    reason: str
    config: dict
    events: list[tuple[float, Event]]
    actions: list[Action]
    noted: list[str]  # the "why" of what was noted as failed


DIED, REFUSED = Left(1, How.DIED, "died"), Left(0, How.RAISED, CUT)
NAN = [Left(rank, How.RAISED, "failed: step 5", not_finite=5) for rank in range(2)]
WARM = (0, Spares(ready=1))
CASES = [
    Case(
        "one dies, and a spare takes its rank",
        {"spares": 1},
        [WARM, (1, DIED), (1.1, REFUSED)],
        [Form(1, TWO, (0,), NONE, spares=(1,))],
        ["trainer 1 died"],
    ),
    Case(
        "a spare that is still starting is further than a new process",
        {"spares": 1},
        [(0, Spares(starting=1)), (1, DIED), (1.1, REFUSED)],
        [Form(1, TWO, (0,), NONE, spares=(1,))],
        ["trainer 1 died"],
    ),
    Case(
        "the spare is gone as well",
        {"spares": 1},
        [(0, Spares(lost=1)), (1, DIED), (1.1, REFUSED)],
        [Refill(), Form(1, TWO, (0,), NONE)],
        ["trainer 1 died"],
    ),
    Case(
        "all die, and there are spares for some",
        {"spares": 1},
        [WARM, (1, DIED), (1.1, Left(0, How.DIED, "died"))],
        [Form(1, TWO, (), NONE, spares=(0,))],
        ["trainer 1 died"],
    ),
    Case(
        "of another size no spare takes a rank",
        {"spares": 1},
        [WARM, (1, Resize(FOUR)), (2, DIED), (2.1, REFUSED)],
        [AskToLeave(), Form(1, FOUR, (), NONE)],
        ["trainer 1 died"],
    ),
    Case(
        "one dies, its peer loses the connection: the peer's process is kept",
        {},
        [(1, DIED), (1.1, REFUSED)],
        [Form(1, TWO, (0,), NONE)],
        ["trainer 1 died"],
    ),
    Case(
        "the symptom is told before the death: the dead one is named",
        {},
        [(1, REFUSED), (1.1, DIED)],
        [Form(1, TWO, (0,), NONE)],
        ["trainer 1 died"],
    ),
    Case(
        "restart keeps no process",
        {"policy": "restart"},
        [(1, DIED), (1.1, REFUSED)],
        [Form(1, TWO, (), NONE)],
        ["trainer 1 died"],
    ),
    Case(
        "shrink goes on with those left",
        {"policy": "shrink"},
        [(1, DIED), (1.1, REFUSED)],
        [Form(1, ONE, (), NONE)],
        ["trainer 1 died"],
    ),
    Case(
        "shrink, and nobody was lost: an error is no reason for fewer workers",
        {"policy": "shrink"},
        [(1, REFUSED), (1.1, Left(1, How.RAISED, CUT))],
        [Form(1, TWO, (), NONE)],
        [f"trainer 0 {CUT}"],
    ),
    Case(
        "shrink, and nobody is left",
        {"policy": "shrink"},
        [(1, DIED), (1.1, Left(0, How.DIED, "died"))],
        [GiveUp("trainer 1 died; no layout fits 0 workers")],
        ["trainer 1 died"],
    ),
    Case(
        "a peer that still waits is ended after a while",
        {},
        [(1, DIED), (2, Tick()), (1 + SETTLE_S, Tick())],
        [Kill((0,)), Form(1, TWO, (), NONE)],
        ["trainer 1 died"],
    ),
    Case(
        "the job ends with whoever is lost",
        {"policy": "end"},
        [(1, DIED), (1.1, REFUSED)],
        [GiveUp("trainer 1 died")],
        ["trainer 1 died"],
    ),
    Case(
        "of what a peer raised, one that fell silent is guilty: nobody may tell of its death",
        {},
        [(1, REFUSED), (1 + SETTLE_S, Tick())],
        [Kill((1,)), Form(1, TWO, (0,), NONE)],
        ["trainer 1 died or hangs: it has fallen silent"],
    ),
    Case(
        "no budget",
        {"budget": 0},
        [(1, DIED), (1.1, REFUSED)],
        [GiveUp("trainer 1 died; that is failure 1 within an hour, fault.budget=0")],
        ["trainer 1 died"],
    ),
    Case(
        "wrong input, found by one of them: no use in trying again, and it is named though its peer was first",
        {},
        [(1, REFUSED), (1.1, Left(1, How.RAISED, "failed: no such file", hopeless=True))],
        [GiveUp("trainer 1 failed: no such file")],
        ["trainer 1 failed: no such file"],
    ),
    Case(
        "not finite: stop",
        {},
        [(1, NAN[0]), (1, NAN[1])],
        [GiveUp("trainer 0 failed: step 5")],
        ["trainer 0 failed: step 5"],
    ),
    Case(
        "not finite: leave the batch out; nobody is lost",
        {"not_finite": "skip"},
        [(1, NAN[0]), (1, NAN[1])],
        [Form(1, TWO, (0, 1), frozenset({5}))],
        ["trainer 0 failed: step 5"],
    ),
    Case(
        "one falls silent while its peer waits for it",
        {},
        [
            (9, Beat(0, 9, 5, 5)),
            (9, Beat(1, 1, 5, 5)),
            (10.5, Tick()),
            (15.6, Left(1, How.DIED, "killed")),
            (15.7, REFUSED),
        ],
        [Dump((0, 1)), Kill((1,)), Form(1, TWO, (0,), NONE)],
        ["trainer 1 hangs: no heartbeat, and none of the job for 10 s"],
    ),
    Case(
        "both beat, one has done less",
        {},
        [(1, Beat(0, 2, 6, 6)), (11, Beat(0, 9, 6, 6)), (11, Beat(1, 9, 5, 5)), (11.5, Tick()), (11.6, REFUSED)],
        [Dump((0, 1)), Kill((1,)), Form(1, TWO, (0,), NONE)],
        ["trainer 1 hangs: no progress, and none of the job for 10 s"],
    ),
    Case(
        "nobody can be told from the others: all are replaced",
        {},
        [(10, Beat(0, 9, 5, 5)), (10, Beat(1, 9, 5, 5)), (10.5, Tick())],
        [Dump((0, 1)), Kill((0, 1))],
        [],
    ),
    Case("slow, but not that slow", {}, [(9.9, Tick())], [], []),
    Case(
        "a heartbeat that was read before counts once",
        {},
        [(9, Beat(0, 1, 5, 5)), (9, Beat(1, 1, 5, 5)), (10.5, Tick())],
        [Dump((0, 1)), Kill((0, 1))],
        [],
    ),
    Case(
        "both made the last step",
        {},
        [(1, Left(0, How.DONE, step=20)), (1, Left(1, How.DONE, step=20))],
        [Finish(True)],
        [],
    ),
    Case("one has made the last step", {}, [(1, Left(0, How.DONE, step=20))], [], []),
    Case(
        "told to end: all save",
        {},
        [(1, Interrupt()), (1.2, Interrupt()), (2, Left(0, How.DONE, step=5)), (2, Left(1, How.DONE, step=5))],
        [AskToLeave(), Finish(False)],
        [],
    ),
    Case(
        "told to end, and saving takes too long",
        {"grace_s": 3},
        [(1, Interrupt()), (4.5, Tick())],
        [AskToLeave(), Finish(False)],
        [],
    ),
    Case(
        "told to end while a failure settles: nothing can be saved",
        {},
        [(1, DIED), (1.1, Interrupt())],
        [Finish(False)],
        [],
    ),
    Case(
        "told to end, and the last step was just being made",
        {},
        [(1, Interrupt()), (2, Left(0, How.DONE, step=20)), (2, Left(1, How.DONE, step=20))],
        [AskToLeave(), Finish(True)],
        [],
    ),
    Case(
        "of another size: all save, and others go on",
        {},
        [(1, Resize(FOUR)), (2, Left(0, How.DONE, step=6)), (2, Left(1, How.DONE, step=6))],
        [AskToLeave(), Form(1, FOUR, (), NONE)],
        [],
    ),
    Case("of the size that it has", {}, [(1, Resize(TWO))], [], []),
    Case(
        "a worker dies while all save to be of another size: they are, from the checkpoint before",
        {},
        [(1, Resize(FOUR)), (2, DIED), (2.1, REFUSED)],
        [AskToLeave(), Form(1, FOUR, (), NONE)],
        ["trainer 1 died"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_what_is_done(case):
    _, actions, noted = play(job(**case.config), *case.events)
    assert actions == case.actions
    assert [record["why"] for record in noted if record["what"] == "failed"] == case.noted


def test_a_hang_is_told_with_where_each_is():
    beats = [Beat(0, 9, 5, 5, Place("layer 1 dispatch", True)), Beat(1, 9, 5, 5, Place("layer 0 combine"))]
    state, actions, noted = play(job(), *((10.0, beat) for beat in beats), (10.5, Tick()))
    assert actions == [Dump((0, 1)), Kill((1,))] and state.phase == Phase.SETTLING
    why = (
        "rank 1 hung in step 5, outside of any collective, after layer 0 combine; "
        "rank 0 waited in step 5, in layer 1 dispatch"
    )
    assert noted == [{"what": "hangs", "epoch": 0, "step": 5, "why": why}]


def test_failures_of_the_last_hour_count():
    def fail(state: JobState, at: float) -> tuple[JobState, list[Action]]:
        state, actions, _ = play(state, (at, DIED), (at, REFUSED))
        if state.phase == Phase.RUNNING:
            step = 5 + state.epoch
            state, _, _ = play(state, (at, Beat(0, 1, step, step)), (at, Beat(1, 1, step, step)))
        return state, actions

    state = job(budget=2)
    for at in (10, 20, 10 + BUDGET_S, 21 + BUDGET_S):
        state, (action,) = fail(state, at)
        assert isinstance(action, Form)
    _, (action,) = fail(state, 22 + BUDGET_S)
    assert action == GiveUp("trainer 1 died; that is failure 3 within an hour, fault.budget=2")


def test_the_same_failure_at_the_same_step_is_not_tried_a_third_time():
    state, _, _ = play(job(budget=9), (1, DIED), (1, REFUSED))
    state, actions, _ = play(state, (2, Beat(0, 1, 5, 5)), (3, DIED), (3, REFUSED))
    assert actions == [GiveUp("trainer 1 died, for the second time at step 5")]


def test_a_lost_spare_is_replaced_and_costs_nothing():
    state, actions, noted = play(job(spares=2, budget=0), (1, Spares(ready=2)), (2, Spares(ready=1, lost=1)))
    assert actions == [Refill()] and not state.failures and state.phase == Phase.RUNNING
    assert noted == [{"what": "spares lost", "epoch": 0, "step": 5, "count": 1}]


def test_a_spare_that_dies_as_it_starts_is_not_started_all_the_time():
    starts = [(0.25 * n, Spares(lost=1) if n % 2 else Spares(starting=1)) for n in range(1, 100)]
    _, actions, _ = play(job(spares=1), *starts)
    assert actions == [Refill()] * (1 + int(24.5 // REFILL_S))


def test_the_place_of_a_taken_spare_is_filled_once_training_goes_on():
    state, _, _ = play(job(spares=1), WARM, (1, DIED), (1.1, REFUSED))
    assert state.spares == Spares(lost=1)
    state, actions, noted = play(state, (1.2, Spares(lost=1)), (1.3, Beat(0, 1, 0, 0)), (1.4, Spares(lost=1)))
    assert not actions and not noted, "members come first, and nobody was lost"
    _, actions, noted = play(state, (2, Beat(0, 2, 1, 4)), (2.1, Spares(lost=1)))
    assert actions == [Refill()] and not noted


@pytest.mark.parametrize("policy", ["shrink", "restart"])
def test_spares_that_nobody_would_take(policy):
    with pytest.raises(ValueError, match=f"spares=1: policy={policy} takes none; take policy=replace, or spares=0"):
        FaultConfig(policy=policy, spares=1)


def test_each_step_that_is_not_finite_is_left_out():
    state, _, _ = play(job(not_finite="skip", budget=9), (1, NAN[0]), (1, NAN[1]))
    again = [(2, Left(rank, How.RAISED, "failed: step 6", not_finite=6)) for rank in range(2)]
    _, actions, _ = play(state, *again)
    assert actions == [Form(2, TWO, (0, 1), frozenset({5, 6}))]


def test_a_job_that_is_starting_has_longer():
    state = begin(FaultConfig(stall_s=1), 20, TWO, (), 0.0)
    seconds = range(1, 2 + int(START_S))
    beats = [(second, Beat(rank, second, 0, 0)) for second in seconds for rank in range(2)]
    state, actions, _ = play(state, *beats, (0.9 + START_S, Tick()))
    assert not actions
    _, actions, _ = play(state, (1.1 + START_S, Tick()))
    assert actions == [Dump((0, 1)), Kill((0, 1))], "nobody can be told from the others"


@pytest.mark.parametrize("stall_s, noticed", [(5, UNHEARD_S), (200, 200)])
def test_a_worker_that_is_never_heard_of_does_not_have_as_long(stall_s, noticed):
    """Stopped before its first heartbeat: the others would wait for it until a timeout of theirs."""
    beats = [(second, Beat(0, second, 0, 0)) for second in range(1, int(noticed) + 2)]
    state = begin(FaultConfig(stall_s=stall_s), 20, TWO, (), 0.0)
    state, actions, _ = play(state, *beats, (noticed + 0.9, Tick()))
    assert not actions
    _, actions, _ = play(state, (noticed + 1.1, Tick()))
    assert actions == [Dump((0, 1)), Kill((1,))]


@pytest.mark.parametrize("stall_s, noticed", [(5, IMPORTS_S), (50, 50)])
def test_a_worker_that_stops_while_it_starts_does_not_have_longer(stall_s, noticed):
    beats = [(second, Beat(1, second, 0, 0)) for second in range(1, int(noticed) + 2)]
    state = begin(FaultConfig(stall_s=stall_s), 20, TWO, (), 0.0)
    _, actions, _ = play(state, *beats, (noticed + 1.5, Tick()))
    assert not actions, "one that was never heard of may still be on its way"
    state, actions, noted = play(state, (1, Beat(0, 1, 0, 0)), *beats[:-1], (noticed + 0.9, Tick()))
    assert not actions and not noted
    _, actions, _ = play(state, beats[-1], (noticed + 1.1, Tick()))
    assert actions == [Dump((0, 1)), Kill((0,))]


def test_a_job_that_is_told_to_end_and_then_loses_a_worker_ends():
    _, actions, noted = play(job(), (1, Interrupt()), (1.2, DIED), (1.3, REFUSED))
    assert actions == [AskToLeave(), Finish(complete=False)]
    assert [record["what"] for record in noted] == ["told to end", "failed", "not saved"]


def test_a_job_shrinks_as_little_as_may_be():
    three = ParallelSizes(dp=3)
    state = begin(FaultConfig(policy="shrink"), 20, FOUR, (three, ONE), 0.0)
    events = [(1.0, Left(3, How.DIED, "died")), *((1.1, Left(rank, How.RAISED, CUT)) for rank in range(3))]
    _, actions, _ = play(state, *events)
    assert actions == [Form(1, three, (), NONE)]


def test_after_the_end_nothing_happens():
    over = replace(job(), phase=Phase.OVER)
    for event in (DIED, Tick(), Interrupt(), Resize(FOUR)):
        assert advance(over, event, 99.0) == (over, [])


WAITS = [
    ([], "trainer 0, 1 to start", "no heartbeat yet"),
    ([(1, Beat(1, 1, 0, 0))], "trainer 0 to start", "one heartbeat"),
    ([(1, Beat(1, 1, 0, 0)), (1, Beat(0, 1, 0, 0))], "the model to be built and loaded", "no step yet"),
    ([(1, Beat(1, 1, 1, 1)), (1, Beat(0, 1, 1, 1))], None, "it trains"),
    (
        [(1, Beat(1, 1, 1, 1)), (1, Beat(0, 1, 1, 1)), (1, Interrupt())],
        "all workers to end their step and save",
        "ends",
    ),
    ([(1, DIED)], "trainer 0 to notice the loss of a peer", "settles"),
]


@pytest.mark.parametrize("events, told, reason", WAITS, ids=[reason for *_, reason in WAITS])
def test_what_is_waited_for(events, told, reason):
    state, _, _ = play(begin(FaultConfig(), 20, TWO, (), 0.0), *events)
    assert waiting_for(state) == told
