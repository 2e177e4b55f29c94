"""Heartbeats reach the coordinator's store; a worker that is stopped falls silent."""

from __future__ import annotations

import multiprocessing
import time

from expertmesh.launch import heartbeat
from expertmesh.launch.heartbeat import Pulse, read_beats
from expertmesh.launch.recovery import Beat
from expertmesh.launch.rendezvous import Rendezvous, join
from expertmesh.parallel.whereabouts import Place, inside


def test_the_first_step_is_told_at_once(monkeypatch):
    """A job that is told to end before it knows of a step saves nothing."""
    monkeypatch.setattr(heartbeat, "EVERY_S", 60)
    meeting = Rendezvous("127.0.0.1")
    pulse = Pulse(join(meeting.host, meeting.port), 0, 0)
    pulse.advance(4)
    deadline = time.monotonic() + 20
    while [beat.step for beat in read_beats(meeting.store, 0, 1)] != [4]:
        assert time.monotonic() < deadline, "it is told with the next beat"
        time.sleep(0.01)
    pulse.close()


def test_beats_say_how_far_a_worker_is(monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.02)
    meeting = Rendezvous("127.0.0.1")
    assert list(read_beats(meeting.store, 0, 2)) == [], "nobody has come"
    pulse = Pulse(join(meeting.host, meeting.port), 0, 1)
    pulse.advance(7)
    pulse.advance()
    deadline = time.monotonic() + 20
    with inside("layer 1 dispatch"):
        while not (beats := list(read_beats(meeting.store, 0, 2))) or not beats[0].place.inside:
            assert time.monotonic() < deadline, beats
            time.sleep(0.01)
    (beat,) = beats
    assert beat == Beat(1, beat.number, 2, 7, Place("layer 1 dispatch", True))
    pulse.close()
    (last,) = read_beats(meeting.store, 0, 2)
    time.sleep(0.1)
    assert list(read_beats(meeting.store, 0, 2)) == [last], "it beats on"
    assert list(read_beats(meeting.store, 1, 2)) == [], "another epoch is another life"


def beat_for_ever(port: int) -> None:
    Pulse(join("127.0.0.1", port), 0, 0)
    time.sleep(600)


def test_a_worker_ends_with_its_coordinator(monkeypatch):
    """Else it would write on in the folder of a run that somebody else has taken up."""
    meeting = Rendezvous("127.0.0.1")
    worker = multiprocessing.get_context("spawn").Process(target=beat_for_ever, args=(meeting.port,), daemon=True)
    worker.start()
    deadline = time.monotonic() + 60
    while not list(read_beats(meeting.store, 0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    del meeting
    worker.join(20)
    assert worker.exitcode == 1
