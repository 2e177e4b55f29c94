"""Who was busy when, in split serving: the compute unit that micro-batches share, the wire, the FFN workers.

An attention worker keeps the whole of it. An FFN worker says with each answer how long the rows lay and how long they
were computed, so a round trip falls into wire, wait and work, and no two clocks are compared:

    attention   ██████░░░░░░██████        work of one micro-batch; in the gaps others have their turn, or nobody does
    wire              ▒▒      ▒▒          what is left of the round trip, half of it before and half after
    ffn                 ·███              lay there, computed

A stage's bubble is the share of time without work while micro-batches were in flight.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

KEPT = 200_000  # spans of a trace, the newest: some seconds of a small model, 30 MB of JSON


class Span(NamedTuple):
    """Something took place on a track, nanoseconds since the epoch."""

    track: str  # "attention", "ffn 0", "wire 0", ...
    micro_batch: int
    layer: int  # -1 where it has none
    start: int
    end: int


class Busy(NamedTuple):
    """Seconds since the engine began."""

    in_flight: float  # with at least one micro-batch in flight
    of_track: dict[str, float]  # summed over micro-batches

    def bubble(self, track: str) -> float:
        """Share of the time in flight in which nothing was done on a track whose spans never overlap; 0 to 1."""
        return max(0.0, 1 - self.of_track.get(track, 0.0) / self.in_flight) if self.in_flight else 0.0


def stages(workers: Sequence[Busy]) -> dict[str, dict[str, float]]:
    """Seconds of work and bubble of every stage of attention workers 0, 1, ... and of the FFN workers they asked.

    An FFN worker's work is what all attention workers were told of it, and its bubble is of the longest time in flight.
    Wire and wait have no bubble: they overlap with themselves.
    """
    found: dict[str, dict[str, float]] = {}
    longest = max((busy.in_flight for busy in workers), default=0.0)
    tracks = sorted({track for busy in workers for track in busy.of_track} - {"attention"})
    for worker, busy in enumerate(workers):
        found[f"attention {worker}"] = {
            "seconds": busy.of_track.get("attention", 0.0),
            "bubble": busy.bubble("attention"),
        }
    for track in tracks:
        together = Busy(longest, {track: sum(busy.of_track.get(track, 0.0) for busy in workers)})
        found[track] = {"seconds": together.of_track[track]}
        if track.startswith("ffn"):
            found[track]["bubble"] = together.bubble(track)
    return found


class Timeline:
    """Thread-safe. Sums are always kept, single spans only with `keep`."""

    def __init__(self, keep: bool = False) -> None:
        self._lock = Lock()
        self._spans: deque[Span] | None = deque(maxlen=KEPT) if keep else None
        self._sums: defaultdict[str, int] = defaultdict(int)
        self._flying, self._since, self._in_flight = 0, 0, 0

    def add(self, track: str, micro_batch: int, layer: int, start: int, end: int) -> None:
        with self._lock:
            self._sums[track] += end - start
            if self._spans is not None:
                self._spans.append(Span(track, micro_batch, layer, start, end))

    @contextmanager
    def flight(self) -> Iterator[None]:
        """A micro-batch is in flight meanwhile."""
        with self._lock:
            if not self._flying:
                self._since = now()
            self._flying += 1
        try:
            yield
        finally:
            with self._lock:
                self._flying -= 1
                if not self._flying:
                    self._in_flight += now() - self._since

    def busy(self) -> Busy:
        with self._lock:
            flying = self._in_flight + (now() - self._since if self._flying else 0)
            return Busy(flying / 1e9, {track: sum_ / 1e9 for track, sum_ in self._sums.items()})

    def spans(self) -> list[Span]:
        with self._lock:
            return list(self._spans or ())


class Turns:
    """The compute unit that the micro-batches of one worker share: whoever has the turn computes."""

    def __init__(self, timeline: Timeline | None = None) -> None:
        self.timeline = timeline or Timeline()
        self._lock = Lock()
        self._began = 0

    @contextmanager
    def turn(self, micro_batch: int) -> Iterator[None]:
        """Wait for the turn and have it meanwhile."""
        self._take()
        try:
            yield
        finally:
            self._give(micro_batch, -1)

    @contextmanager
    def others(self, micro_batch: int, layer: int) -> Iterator[None]:
        """Within a turn: let others have theirs meanwhile."""
        self._give(micro_batch, layer)
        try:
            yield
        finally:
            self._take()

    def _take(self) -> None:
        self._lock.acquire()
        self._began = now()

    def _give(self, micro_batch: int, layer: int) -> None:
        self.timeline.add("attention", micro_batch, layer, self._began, now())
        self._lock.release()


def now() -> int:
    """Nanoseconds since the epoch by a clock that is never set back while the process runs."""
    return _EPOCH + time.monotonic_ns()


_EPOCH = time.time_ns() - time.monotonic_ns()


def write_trace(path: Path, spans_of_worker: Sequence[Sequence[Span]]) -> None:
    """Write what attention workers 0, 1, ... saw as a Chrome trace (JSON of the Trace Event Format, times in us).

    Open it in Perfetto or chrome://tracing. The file appears whole or not at all.
    """
    events: list[dict[str, Any]] = []
    tracks: dict[str, int] = {}
    first = min((span.start for spans in spans_of_worker for span in spans), default=0)
    for worker, spans in enumerate(spans_of_worker):
        for track, micro_batch, layer, start, end in spans:
            where = f"attention {worker}" if track == "attention" else track
            pid = tracks.setdefault(where, len(tracks))
            name = f"layer {layer}" if layer >= 0 else "head"
            row = 16 * worker + micro_batch
            times = {"ts": (start - first) / 1e3, "dur": (end - start) / 1e3}
            events.append({"name": name, "ph": "X", "pid": pid, "tid": row, **times, "cat": track})
    for where, pid in tracks.items():
        events.append({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": where}})
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "w") as file:
        json.dump({"traceEvents": events, "displayTimeUnit": "ns"}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
