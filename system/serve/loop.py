"""An engine that runs by itself: a thread makes steps while there is work; requests come in and outputs go out."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

from expertmesh.system.serve.engine import Engine
from expertmesh.system.serve.request import Output, Request


class EngineLoop:
    """Safe to call from any thread. A step that raises ends the loop, and `outputs` raises the same error."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._outbox: queue.Queue[list[Output] | BaseException | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request that the engine will accept (its length was checked at the door)."""
        self._inbox.put(lambda: self._engine.add(request))

    def cancel(self, request_id: str) -> None:
        self._inbox.put(lambda: self._engine.cancel(request_id))

    def outputs(self) -> Iterator[list[Output]]:
        """The outputs of each step as one list, until `close`. One caller at a time."""
        while (batch := self._outbox.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            yield batch

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_orders():
                if self._engine.has_work:
                    self._outbox.put(self._engine.step())
            self._outbox.put(None)
        except BaseException as error:
            self._outbox.put(error)

    def _take_orders(self) -> bool:
        """Carry out what callers asked for; wait for it when there is nothing else to do. False: stop."""
        while not self._inbox.empty() or not self._engine.has_work:
            order = self._inbox.get()
            if order is None:
                return False
            order()
        return True
