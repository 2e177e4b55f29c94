"""One face for all engines: requests go to the least busy one, its outputs come back to whoever asked.

A request outlives its engine: what was said is kept here, and another engine says the rest.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, Protocol

from expertmesh.parallel.timeline import Busy, stages
from expertmesh.system.serve.engine import EngineCounts
from expertmesh.system.serve.loop import EngineLoop
from expertmesh.system.serve.request import Output, Request

logger = logging.getLogger(__name__)

MOVES = 2  # of one request: if more workers failed with it, it may be the reason


class _WorkerLost(Exception):
    """The worker of a request is gone."""


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

    def outputs(self) -> AsyncIterator[list[Output]]:
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

    async def outputs(self) -> AsyncIterator[list[Output]]:
        batches = self._loop.outputs()
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            yield batch


class Client:
    """An `EngineClient` over several workers. Use it as an async context manager within one event loop."""

    def __init__(
        self,
        workers: Sequence[EngineWorker],
        context_length: int,
        revive: Callable[[int, Exception], Awaitable[None]] | None = None,
    ) -> None:
        """`revive` starts worker number so much again, or raises; None: nobody can."""
        self.context_length, self._revive = context_length, revive
        self._workers = workers
        self._open: list[dict[str, asyncio.Queue[Output | Exception]]] = [{} for _ in workers]
        self._failed: dict[int, Exception] = {}
        self._readers: list[asyncio.Task[None]] = []
        self._coming: dict[int, asyncio.Task[None]] = {}  # workers that are being started again
        # What workers told last, and what those that are gone had told, or sums over all would fall.
        self._last: dict[str, dict[int, Any]] = {"busy": {}, "counts": {}, "loads": {}}
        self._past: dict[str, list[Any]] = {"counts": [], "loads": []}

    async def __aenter__(self) -> Client:
        self._readers = [asyncio.create_task(self._read(index)) for index in range(len(self._workers))]  # of each
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in (*self._coming.values(), *self._readers):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    @property
    def down(self) -> str | None:
        """Why no worker answers any more; None where one does, or will soon."""
        if self._coming or len(self._failed) < len(self._workers):
            return None
        return str(next(iter(self._failed.values())))

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """Yield the tokens of `request`; closing early cancels it.

        When its worker fails, another goes on where it was: it computes the text so far again, and then says what the
        first would have said. Raises RuntimeError where none is left, or where MOVES of them failed with it.
        """
        if request.sampling.seed is None:  # drawn here, so that all workers draw alike
            request = replace(request, sampling=replace(request.sampling, seed=secrets.randbits(62)))
        said: list[int] = []
        for move in range(MOVES + 1):
            while not self.alive and self._coming:
                await asyncio.wait(self._coming.values(), return_when=asyncio.FIRST_COMPLETED)
            if self.down is not None:
                raise RuntimeError(f"no engine is left: {self.down}")
            index = min(self.alive, key=lambda i: len(self._open[i]))
            try:
                async with aclosing(self._on(index, request.resumed(said))) as outputs:
                    async for output in outputs:
                        said.append(output.token_id)
                        yield output
                return
            except _WorkerLost as lost:
                if move == MOVES:
                    raise RuntimeError(f"{MOVES + 1} workers failed with this request: {lost}") from lost

    async def _on(self, index: int, request: Request) -> AsyncGenerator[Output, None]:
        """What one worker says. Raises _WorkerLost."""
        queue: asyncio.Queue[Output | Exception] = asyncio.Queue()
        self._open[index][request.id] = queue
        finished = False
        try:
            reader = self._readers[index]
            try:
                await self._workers[index].submit(request)
            except ConnectionError as error:
                if self._readers[index] is not reader:  # it is back already
                    raise _WorkerLost(str(error)) from error
                self.lose(index, error)
            while not finished:
                output = await queue.get()
                if isinstance(output, Exception):
                    raise _WorkerLost(str(output)) from output
                finished = output.finish_reason is not None
                yield output
        finally:
            del self._open[index][request.id]
            if not finished and index not in self._failed:
                with suppress(ConnectionError):  # it has just died: nothing is left to be cancelled
                    await self._workers[index].cancel(request.id)

    @property
    def alive(self) -> list[int]:
        """The workers that are asked."""
        return [index for index in range(len(self._workers)) if index not in self._failed]

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

    async def _tell(self, what: str) -> list[Any]:
        """Of each worker that is asked. One that has died and was not missed yet tells what it told last."""
        for index in self.alive:
            with suppress(Exception):
                self._last[what][index] = await getattr(self._workers[index], what)()
        return list(self._last[what].values())

    async def _read(self, index: int) -> None:
        """Hand every output of one worker to its request, until the worker ends."""
        try:
            async for batch in self._workers[index].outputs():
                for output in batch:
                    if queue := self._open[index].get(output.request_id):
                        queue.put_nowait(output)
            raise RuntimeError("it ended")
        except Exception as error:
            self.lose(index, error)

    async def _bring_back(self, index: int, error: Exception) -> None:
        assert self._revive is not None
        self._readers[index].cancel()  # what a worker that was given up still says is of no interest
        try:
            await self._revive(index, error)
        except Exception as reason:
            logger.error("worker %d does not come back: %s", index, reason)
        else:
            del self._failed[index]
            self._readers[index] = asyncio.create_task(self._read(index))
            logger.warning("worker %d is back", index)
        finally:
            del self._coming[index]

    def lose(self, index: int, error: Exception) -> None:
        """A worker is gone, or as good as gone: it is asked no more, and its requests are told."""
        if index not in self._failed:
            self._failed[index] = error
            for what, last in self._last.items():
                told = last.pop(index, None)
                if told is not None and what in self._past:
                    self._past[what].append(told)
            logger.error("worker %d is gone: %s", index, error)
            if self._revive is not None:
                self._coming[index] = asyncio.create_task(self._bring_back(index, error))
        for queue in self._open[index].values():
            queue.put_nowait(error)
