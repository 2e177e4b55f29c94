"""An engine that runs by itself: a thread makes steps while there is work; requests come in and outputs go out."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from expertmesh.parallel.dispatchers import Dispatcher
from expertmesh.parallel.timeline import Busy, Span
from expertmesh.system.serve.engine import Engine, EngineCounts
from expertmesh.system.serve.request import Failure, Output, Request


class EngineLoop:
    """Safe to call from any thread. A step that raises ends the loop, and `outputs` raises the same error.

    `at_end` is called when the loop has ended, one way or the other.
    """

    def __init__(self, engine: Engine, at_end: Callable[[], None] = lambda: None) -> None:
        self._engine, self._at_end = engine, at_end
        self._inbox: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._outbox: queue.Queue[list[Output | Failure] | BaseException | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ValueError where the engine cannot compute it."""
        self._engine.check(request)
        self._order(lambda: self._engine.add(request))

    def cancel(self, request_id: str) -> None:
        self._order(lambda: self._engine.cancel(request_id))

    def redirect(self, dispatchers: Sequence[Dispatcher]) -> None:
        """Have the engine use other dispatchers from each lane's next micro-batch on; returns once all lanes do.

        Raises RuntimeError where the engine ended before.
        """
        turned = threading.Event()
        self._order(lambda: self._engine.redirect(dispatchers, turned.set))
        while not turned.wait(0.1):
            if not self._thread.is_alive():
                raise RuntimeError("the engine ended before it could ask another FFN pool")

    def counts(self) -> EngineCounts:
        """What the engine tells about itself; numbers of one moment may be of two neighbouring steps."""
        return self._engine.counts()

    def loads(self) -> dict[int, list[int]]:
        """For each layer with experts, how many choices each of them served so far; FFN experts come first."""
        return self._engine.runner.loads()

    def spans(self) -> list[Span]:
        """What happened when, where the engine was made to keep it."""
        return self._engine.timeline.spans()

    def busy(self) -> Busy:
        """How long each stage was at work."""
        return self._engine.timeline.busy()

    def outputs(self) -> Iterator[list[Output | Failure]]:
        """The outputs of each step as one list, until `close`. One caller at a time."""
        while (batch := self._outbox.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            yield batch

    def close(self) -> None:
        self._order(None)
        self._thread.join()

    def _order(self, order: Callable[[], None] | None) -> None:
        self._inbox.put(order)
        self._engine.wake()

    def _run(self) -> None:
        try:
            while self._take_orders():
                if self._engine.has_work and (outputs := self._engine.step()):
                    self._outbox.put(outputs)
            self._outbox.put(None)
        except BaseException as error:
            self._outbox.put(error)
        finally:
            self._engine.close()
            self._at_end()

    def _take_orders(self) -> bool:
        """Carry out what callers asked for; wait for it when there is nothing else to do. False: stop."""
        while not self._inbox.empty() or not self._engine.has_work:
            order = self._inbox.get()
            if order is None:
                return False
            order()
        return True
