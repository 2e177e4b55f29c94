"""Signs of life: Ray tells of processes that end, but of none that hangs. Each worker says once a second how far it is.

They go to the store at which the workers met (launch/rendezvous.py), which the coordinator holds: no call has to reach
the worker, so one that is stopped or busy simply falls silent.

    beat/EPOCH/RANK = [NUMBER, PROGRESS, STEP, [COLLECTIVE, INSIDE]]    beats so far, things done so far, the step that
                                                                        it is at, and where it is in it
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator

import torch.distributed as dist

from expertmesh.launch.recovery import Beat
from expertmesh.parallel.whereabouts import HERE, Place

EVERY_S = 1.0


def _key(epoch: int, rank: int) -> str:
    return f"beat/{epoch}/{rank}"


class Pulse:
    """A worker's heartbeat, from a thread of its own, until it is closed.

    A coordinator that is gone is not waited for: its run may be somebody else's by now, who must be the only one to
    write there. So the process ends at once.

    `store` must be a connection of its own: one that another thread waits on is held by it.
    """

    def __init__(self, store: dist.Store, epoch: int, rank: int) -> None:
        self._store, self._key = store, _key(epoch, rank)
        self._number = self._progress = self._step = 0
        HERE.place = Place()
        self._due, self._closed = threading.Event(), False
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def advance(self, step: int | None = None) -> None:
        """Something was done, such as to begin `step`."""
        self._progress += 1
        if step is not None:
            began, self._step = not self._step, step
            if began:  # told at once: from now on there is something to be saved
                self._due.set()

    def _beat(self) -> None:
        while True:
            self._number += 1
            try:
                self._store.set(self._key, json.dumps([self._number, self._progress, self._step, HERE.place]))
            except RuntimeError:
                os._exit(1)
            self._due.wait(EVERY_S)
            self._due.clear()
            if self._closed:
                return

    def close(self) -> None:
        """No more beats."""
        self._closed = True
        self._due.set()
        self._thread.join()


def read_beats(store: dist.Store, epoch: int, world: int) -> Iterator[Beat]:
    """The last heartbeat of each worker of `epoch` that has sent one."""
    for rank in range(world):
        key = _key(epoch, rank)
        if store.check([key]):
            number, progress, step, place = json.loads(store.get(key))
            yield Beat(rank, number, progress, step, Place(*place))
