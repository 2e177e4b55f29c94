"""Sums, bubbles and the trace file say what took place."""

from __future__ import annotations

import json
import threading
import time

import pytest

from expertmesh.parallel.timeline import Busy, Span, Timeline, Turns, now, stages, write_trace

MS = 1_000_000


def test_sums_and_spans():
    timeline = Timeline(keep=True)
    timeline.add("ffn 0", 0, 3, 5 * MS, 7 * MS)
    timeline.add("ffn 0", 1, 3, 6 * MS, 9 * MS)
    assert timeline.busy().of_track == {"ffn 0": 0.005}
    assert timeline.spans() == [Span("ffn 0", 0, 3, 5 * MS, 7 * MS), Span("ffn 0", 1, 3, 6 * MS, 9 * MS)]
    sums_only = Timeline()
    sums_only.add("ffn 0", 0, 3, 5 * MS, 7 * MS)
    assert sums_only.spans() == [] and sums_only.busy().of_track == {"ffn 0": 0.002}


BUBBLES = [
    (Busy(10.0, {"attention": 4.0}), 0.6, "idle most of the time"),
    (Busy(10.0, {"attention": 10.0}), 0.0, "never idle"),
    (Busy(10.0, {}), 1.0, "nothing done"),
    (Busy(0.0, {}), 0.0, "nothing in flight yet"),
    (Busy(10.0, {"attention": 10.1}), 0.0, "clocks that do not quite agree"),
]


@pytest.mark.parametrize("busy, bubble, reason", BUBBLES, ids=[reason for *_, reason in BUBBLES])
def test_bubble(busy, bubble, reason):
    assert busy.bubble("attention") == pytest.approx(bubble)


def test_time_in_flight_counts_once():
    """Two micro-batches, one within the other; then nothing; then one that is still in flight."""
    timeline, began = Timeline(), now()
    with timeline.flight():
        with timeline.flight():
            time.sleep(0.01)
    flown = timeline.busy().in_flight
    assert 0.01 <= flown <= (now() - began) / 1e9
    time.sleep(0.01)
    assert timeline.busy().in_flight == flown
    with timeline.flight():
        time.sleep(0.002)
        assert timeline.busy().in_flight >= flown + 0.002


def test_one_has_the_turn():
    """Three threads that let others have theirs in between: no two spans overlap, and none is lost."""
    turns = Turns(Timeline(keep=True))
    inside: list[int] = []

    def work(micro_batch: int) -> None:
        for layer in range(20):
            with turns.turn(micro_batch):
                inside.append(micro_batch)
                assert len(inside) == 1
                inside.remove(micro_batch)
                with turns.others(micro_batch, layer):
                    time.sleep(0.0005)
                inside.append(micro_batch)
                assert len(inside) == 1
                inside.remove(micro_batch)

    threads = [threading.Thread(target=work, args=(m,)) for m in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spans = turns.timeline.spans()
    assert len(spans) == 3 * 20 * 2
    assert all(a.end <= b.start for a, b in zip(spans, spans[1:], strict=False))


def test_trace(tmp_path):
    first = [Span("attention", 0, 1, 10 * MS, 12 * MS), Span("ffn 0", 2, 1, 12 * MS, 13 * MS)]
    second = [Span("attention", 1, -1, 11 * MS, 11 * MS + 500)]
    write_trace(tmp_path / "trace.json", [first, second])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    spans = [(names[e["pid"]], e["name"], e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert spans == [
        ("attention 0", "layer 1", 0, 0.0, 2000.0),
        ("ffn 0", "layer 1", 2, 2000.0, 1000.0),
        ("attention 1", "head", 17, 1000.0, 0.5),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    write_trace(tmp_path / "none.json", [])
    assert json.loads((tmp_path / "none.json").read_text())["traceEvents"] == []


def test_stages_of_all_workers():
    two = [
        Busy(10.0, {"attention": 5.0, "ffn 0": 2.0, "wire 0": 9.0}),
        Busy(8.0, {"attention": 8.0, "ffn 0": 3.0, "ffn 1": 1.0}),
    ]
    assert stages(two) == {
        "attention 0": {"seconds": 5.0, "bubble": 0.5},
        "attention 1": {"seconds": 8.0, "bubble": 0.0},
        "ffn 0": {"seconds": 5.0, "bubble": 0.5},
        "ffn 1": {"seconds": 1.0, "bubble": 0.9},
        "wire 0": {"seconds": 9.0},
    }
    assert stages([Busy(0.0, {})]) == {"attention 0": {"seconds": 0.0, "bubble": 0.0}}
