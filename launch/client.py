"""One face for all engines: requests go to the least busy one, its outputs come back to whoever asked.

A request outlives its engine: what was said is kept here, and another engine says the rest.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from typing import Any, Protocol

from expertmesh.parallel.timeline import Busy, stages
from expertmesh.system.serve.engine import EngineCounts
from expertmesh.system.serve.loop import EngineLoop
from expertmesh.system.serve.request import Failure, Output, Request, RequestFailed

logger = logging.getLogger(__name__)

MOVES = 2  # of one request: if more workers failed with it, it may be the reason


class _WorkerLost(Exception):
    """The worker of a request is gone."""


class _Moved(Exception):
    """The worker of a request is asked no more, which is nobody's fault."""


class EngineWorker(Protocol):
    """An engine somewhere: in this process, or an attention worker of a pool. ConnectionError says that it is gone."""

    async def submit(self, request: Request) -> None: ...

    async def cancel(self, request_id: str) -> None: ...

    async def busy(self) -> Busy:
        """How long each of its stages was at work."""
        ...

    async def counts(self) -> EngineCounts:
        """What it tells about its requests and its cache."""
        ...

    async def loads(self) -> dict[int, list[int]]:
        """For each layer with experts, how many choices each of them served so far; FFN experts come first."""
        ...

    def outputs(self) -> AsyncIterator[list[Output | Failure]]:
        """One list for each step of the engine."""
        ...


class LocalWorker:
    """An engine loop of this process."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop

    async def submit(self, request: Request) -> None:
        self._loop.submit(request)

    async def cancel(self, request_id: str) -> None:
        self._loop.cancel(request_id)

    async def busy(self) -> Busy:
        return self._loop.busy()

    async def counts(self) -> EngineCounts:
        return self._loop.counts()

    async def loads(self) -> dict[int, list[int]]:
        return self._loop.loads()

    async def outputs(self) -> AsyncIterator[list[Output | Failure]]:
        batches = self._loop.outputs()
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            yield batch


class _Member:
    """A worker, whoever is at work in its place, and what is asked of it."""

    def __init__(self, worker: EngineWorker) -> None:
        self.worker = worker
        self.open: dict[str, asyncio.Queue[Output | Failure | Exception]] = {}
        self.reader: asyncio.Task[None] | None = None
        self.failed: Exception | None = None
        self.coming: asyncio.Task[None] | None = None  # while it is started again
        self.told: dict[str, Any] = {}  # what it told last


class Client:
    """An `EngineClient` over several workers, which may come and go. An async context manager within one event loop."""

    def __init__(
        self,
        workers: Sequence[EngineWorker],
        context_length: int,
        revive: Callable[[int, Exception], Awaitable[None]] | None = None,
    ) -> None:
        """`revive` starts worker number so much again, or raises; None: nobody can."""
        self.context_length, self._revive = context_length, revive
        self._members = {number: _Member(worker) for number, worker in enumerate(workers)}
        self._numbers = len(workers)  # given so far
        # What those had told that are gone, or sums over all would fall.
        self._past: dict[str, list[Any]] = {"counts": [], "loads": []}
        self._pauses = Pauses()

    async def __aenter__(self) -> Client:
        for number in self._members:
            self._listen(number)
        return self

    async def __aexit__(self, *error: object) -> None:
        for member in self._members.values():
            for task in (member.coming, member.reader):
                if task is not None:
                    await _ended(task)

    @property
    def workers(self) -> list[int]:
        """All that there are, also those that are being started again, in the order in which they came."""
        return list(self._members)

    @property
    def alive(self) -> list[int]:
        """The workers that are asked."""
        return [number for number, member in self._members.items() if member.failed is None]

    @property
    def gone(self) -> list[int]:
        """Those that failed and do not come back."""
        return [n for n, member in self._members.items() if member.failed is not None and member.coming is None]

    @property
    def down(self) -> str | None:
        """Why no worker answers any more; None where one does, or will soon."""
        if self._coming or self.alive:
            return None
        return str(next((member.failed for member in self._members.values()), "it has no worker"))

    def add(self, worker: EngineWorker) -> int:
        """Ask one more worker; its number was no other's before."""
        number, self._numbers = self._numbers, self._numbers + 1
        self._members[number] = _Member(worker)
        self._listen(number)
        return number

    async def remove(self, number: int) -> None:
        """Ask a worker no more: others go on with its requests, and whoever listens cannot tell."""
        member = self._members[number]
        if member.failed is None:
            with suppress(Exception):
                for what in self._past:
                    member.told[what] = await getattr(member.worker, what)()
        self._keep_what_was_told(self._members.pop(number))
        for task in (member.coming, member.reader):
            if task is not None:
                await _ended(task)
        for request_id, queue in list(member.open.items()):
            queue.put_nowait(_Moved())
            with suppress(ConnectionError):
                await member.worker.cancel(request_id)

    async def settled(self) -> None:
        """Wait until nobody is being started again."""
        while self._coming:
            await asyncio.wait(self._coming)

    @contextmanager
    def watch_pauses(self) -> Iterator[Pauses]:
        """How long requests had to wait for their next token meanwhile."""
        self._pauses.begin()
        try:
            yield self._pauses
        finally:
            self._pauses.end()

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """Yield the tokens of `request`; closing early cancels it.

        When its worker fails, another goes on where it was: it computes the text so far again, and then says what the
        first would have said. Raises RuntimeError where none is left, or where MOVES of them failed with it, and
        RequestFailed where its worker says so.
        """
        if request.sampling.seed is None:  # drawn here, so that all workers draw alike
            request = replace(request, sampling=replace(request.sampling, seed=secrets.randbits(62)))
        said: list[int] = []
        failed = 0
        with self._pauses.of(request.id) as spoke:
            while True:
                while not self.alive and self._coming:
                    await asyncio.wait(self._coming, return_when=asyncio.FIRST_COMPLETED)
                if self.down is not None:
                    raise RuntimeError(f"no engine is left: {self.down}")
                number = min(self.alive, key=lambda number: len(self._members[number].open))
                try:
                    async with aclosing(self._on(number, request.resumed(said))) as outputs:
                        async for output in outputs:
                            said.append(output.token_id)
                            spoke()
                            yield output
                    return
                except _Moved:
                    pass
                except _WorkerLost as lost:
                    failed += 1
                    if failed > MOVES:
                        raise RuntimeError(f"{failed} workers failed with this request: {lost}") from lost

    async def _on(self, number: int, request: Request) -> AsyncGenerator[Output, None]:
        """What one worker says. Raises _WorkerLost, or _Moved where it is asked no more."""
        queue: asyncio.Queue[Output | Failure | Exception] = asyncio.Queue()
        member = self._members[number]
        member.open[request.id] = queue
        finished = False
        try:
            reader = member.reader
            try:
                await member.worker.submit(request)
            except ConnectionError as error:
                if member.reader is not reader:  # it is back already
                    raise _WorkerLost(str(error)) from error
                self.lose(number, error)
            while not finished:
                output = await queue.get()
                if isinstance(output, _Moved):
                    raise output
                if isinstance(output, Exception):
                    raise _WorkerLost(str(output)) from output
                finished = output.is_last
                if isinstance(output, Failure):
                    raise RequestFailed(output.why)
                yield output
        finally:
            del member.open[request.id]
            if not finished and member.failed is None and number in self._members:
                with suppress(ConnectionError):  # it has just died: nothing is left to be cancelled
                    await member.worker.cancel(request.id)

    async def stages(self) -> dict[str, dict[str, float]]:
        """Seconds of work and bubble of every stage (see `timeline.stages`)."""
        return stages(await self._tell("busy"))

    async def counts(self) -> list[EngineCounts]:
        """What each worker tells about its requests and its cache; after them, what those counted that are gone."""
        return [*await self._tell("counts"), *(counts.of_the_past() for counts in self._past["counts"])]

    async def loads(self) -> dict[int, list[int]]:
        """What experts served on all workers together, those that are gone among them."""
        each = [*await self._tell("loads"), *self._past["loads"]]
        if not each:
            return {}
        return {
            layer: [sum(counts) for counts in zip(*(loads[layer] for loads in each), strict=True)] for layer in each[0]
        }

    async def answers(self, number: int) -> None:
        """Return once a worker has told its counts, which are kept; raises what it raises."""
        member = self._members[number]
        member.told["counts"] = await member.worker.counts()

    @property
    def _coming(self) -> list[asyncio.Task[None]]:
        return [member.coming for member in self._members.values() if member.coming is not None]

    async def _tell(self, what: str) -> list[Any]:
        """Of each worker that is asked. One that has died and was not missed yet tells what it told last."""
        for number in self.alive:
            member = self._members[number]
            with suppress(Exception):
                member.told[what] = await getattr(member.worker, what)()
        return [member.told[what] for member in self._members.values() if what in member.told]

    def _listen(self, number: int) -> None:
        self._members[number].reader = asyncio.create_task(self._read(number))

    async def _read(self, number: int) -> None:
        """Hand every output of one worker to its request, until the worker ends."""
        member = self._members[number]
        try:
            async for batch in member.worker.outputs():
                for output in batch:
                    if queue := member.open.get(output.request_id):
                        queue.put_nowait(output)
            raise RuntimeError("it ended")
        except Exception as error:
            self.lose(number, error)

    async def _bring_back(self, number: int, error: Exception) -> None:
        assert self._revive is not None
        member = self._members[number]
        assert member.reader is not None
        member.reader.cancel()  # what a worker that was given up still says is of no interest
        try:
            await self._revive(number, error)
        except Exception as reason:
            logger.error("worker %d does not come back: %s", number, reason)
        else:
            member.failed = None
            self._listen(number)
            logger.warning("worker %d is back", number)
        finally:
            member.coming = None

    def lose(self, number: int, error: Exception) -> None:
        """A worker is gone, or as good as gone: it is asked no more, and its requests are told."""
        member = self._members.get(number)
        if member is None:
            return
        if member.failed is None:
            member.failed = error
            self._keep_what_was_told(member)
            logger.error("worker %d is gone: %s", number, error)
            if self._revive is not None:
                member.coming = asyncio.create_task(self._bring_back(number, error))
        for queue in member.open.values():
            queue.put_nowait(error)

    def _keep_what_was_told(self, member: _Member) -> None:
        for what, past in self._past.items():
            if what in member.told:
                past.append(member.told[what])
        member.told.clear()


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


class Pauses:
    """How long requests wait for their next token, while somebody watches."""

    def __init__(self) -> None:
        self._spoke: dict[str, float] = {}  # of each request: when it came, or had its last token
        self._watched = False
        self._longest = 0.0

    def begin(self) -> None:
        self._watched, self._longest = True, 0.0

    def end(self) -> None:
        self._watched = False

    @property
    def longest(self) -> float:
        """Seconds; who still waits is counted."""
        now = time.monotonic()
        return max([self._longest, *(now - at for at in self._spoke.values())])

    @contextmanager
    def of(self, request_id: str) -> Iterator[Callable[[], None]]:
        """While a request is open; what this yields is called at each of its tokens."""
        self._spoke[request_id] = time.monotonic()

        def spoke() -> None:
            now = time.monotonic()
            if self._watched:
                self._longest = max(self._longest, now - self._spoke[request_id])
            self._spoke[request_id] = now

        try:
            yield spoke
        finally:
            del self._spoke[request_id]
