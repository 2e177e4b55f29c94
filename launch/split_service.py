"""A model served by two pools of workers, which can change their size while it answers.

    attention   one more: it starts, asks the present FFN pool, and the client asks it, too
                one less: the client asks it no more, others go on with its requests, it ends
    ffn         1  a pool of the new size comes up beside the present one, under the next number
                2  all attention workers link up with it (`prepare`); if one cannot, the new pool ends and nothing was
                3  each attention worker changes over, between two micro-batches of each lane
                4  nobody asks the old pool any more: it ends

There has to be room for both FFN pools meanwhile. What is said does not depend on who computes it, so no text changes.
An attention worker that is lost meanwhile comes back asking whichever pool is the present one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from expertmesh.launch.client import Client
from expertmesh.launch.pools import Pools
from expertmesh.launch.ray_cluster import Pool, WorkerFailed, gpus_for
from expertmesh.launch.rendezvous import Rendezvous
from expertmesh.launch.roles import AttentionRole, FFNRole
from expertmesh.launch.survival import Restarts, give_up_silent, keep_up, tell_end
from expertmesh.parallel.link import Seat, has_come
from expertmesh.parallel.timeline import Busy, write_trace
from expertmesh.system.model.checkpoint import Checkpoint
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.engine import EngineCounts
from expertmesh.system.serve.request import Output, Request
from expertmesh.system.serve.workers import FFNPool


class Scaled(NamedTuple):
    """What a service is after a change."""

    attention: int
    ffn: int
    longest_pause_s: float
    """Of any request that was open meanwhile: seconds that it waited for its next token."""


@dataclass(eq=False)
class _Answering:
    """An FFN pool that is at work, or comes up."""

    pool: FFNPool
    workers: Pool
    call: tuple[Any, ...]  # what each is asked, for good
    calls: list[Any]
    watch: asyncio.Task[None] | None = None  # starts those again that die

    def end(self) -> None:
        if self.watch is not None:
            self.watch.cancel()
        self.workers.stop()


class SplitService:
    """Both pools, on the cluster that this process is on. `close` ends the watching; the cluster ends the workers."""

    def __init__(self, host: str, checkpoint: Checkpoint, config: ServeConfig, trace: bool) -> None:
        self._checkpoint, self._config, self._trace = checkpoint, config, trace
        self._store = Rendezvous(host)
        self._restarts = Restarts(config.restarts)
        self._changing = asyncio.Lock()

    async def start(self, pools: Pools, context_length: int) -> None:
        """Bring up both pools, each while the other does. Raises WorkerFailed where one cannot be."""
        self._gpus = gpus_for(sum(pools))
        self._ffn = await self._begin_ffn(FFNPool(pools.ffn), pools.attention)
        self._attention = self._place("attention", AttentionRole, pools.attention)
        linking = self._attention.start("start", self._checkpoint, self._config, self._ffn.pool, self._trace)
        while not await asyncio.to_thread(self._attention.finished, linking, 0.2):
            self._ffn.workers.finished(self._ffn.calls, 0)  # one that cannot load would be waited for in vain
        self._keep_up(self._ffn)
        workers = [_Worker(self._attention, rank) for rank in range(pools.attention)]
        self.client = Client(workers, context_length, self._revive)
        self._silence = asyncio.create_task(give_up_silent(self.client, self._config.exchange_timeout_s))
        self._silence.add_done_callback(tell_end)

    def close(self) -> None:
        self._silence.cancel()
        if self._ffn.watch is not None:
            self._ffn.watch.cancel()

    async def write_trace(self, path: Path) -> None:
        write_trace(path, [await self._attention.ask(rank, "spans") for rank in self.client.alive])

    @property
    def pools(self) -> Pools:
        return Pools(len(self.client.workers), self._ffn.pool.workers)

    async def scale(self, wanted: Pools) -> Scaled:
        """Give the pools other sizes while requests are answered; one change at a time.

        Raises WorkerFailed where there is no place for the workers, or they do not come up: then the FFN pool is the
        one from before.
        """
        async with self._changing:
            with self.client.watch_pauses() as pauses:
                await self._shrink_attention(wanted.attention)
                if wanted.ffn != self._ffn.pool.workers:
                    await self._change_ffn(FFNPool(wanted.ffn, self._ffn.pool.number + 1))
                await self._grow_attention(wanted.attention)
                return Scaled(*self.pools, round(pauses.longest, 3))

    async def _shrink_attention(self, count: int) -> None:
        for rank in self.client.workers[count:]:
            await self.client.remove(rank)
            self._attention.end(rank)

    async def _grow_attention(self, count: int) -> None:
        more = count - len(self.client.workers)
        if more <= 0:
            return
        ranks = await asyncio.to_thread(self._attention.grow, more)
        try:
            await asyncio.gather(*(self._start_attention(rank) for rank in ranks))
        except BaseException:
            for rank in ranks:
                self._attention.end(rank)
            raise
        for rank in ranks:
            number = self.client.add(_Worker(self._attention, rank))
            assert number == rank, "neither is ever used again"

    async def _change_ffn(self, pool: FFNPool) -> None:
        new = await self._begin_ffn(pool, len(self.client.workers))
        try:
            while not all(has_come(self._store.store, Seat(ffn, pool.number)) for ffn in range(pool.workers)):
                await asyncio.to_thread(new.workers.finished, new.calls, 0.1)  # raises where one has failed
            self._keep_up(new)
            for rank in self.client.alive:
                try:
                    await self._attention.ask(rank, "prepare", pool)
                except WorkerFailed as failure:
                    if not failure.died:  # one that died comes back
                        raise
        except BaseException:
            new.end()
            raise
        old, self._ffn = self._ffn, new  # from here on whoever starts asks the new one
        for rank in self.client.alive:
            try:
                await self._attention.ask(rank, "change_over", pool)
            except WorkerFailed as failure:
                self.client.lose(rank, failure)
        await self.client.settled()
        old.end()

    async def _begin_ffn(self, pool: FFNPool, attention_workers: int) -> _Answering:
        workers = await asyncio.to_thread(self._place, "ffn", FFNRole, pool.workers)
        call = ("run", self._checkpoint, self._config, pool, attention_workers)
        return _Answering(pool, workers, call, workers.start(*call))

    def _keep_up(self, ffn: _Answering) -> None:
        seats = ffn.workers, ffn.pool.number, ffn.calls
        ffn.watch = asyncio.create_task(keep_up(*seats, ffn.call, self._restarts, self._store.store))
        ffn.watch.add_done_callback(tell_end)

    async def _revive(self, rank: int, error: Exception) -> None:
        self._restarts.spend(str(error))
        self._attention.replace(rank)
        await self._start_attention(rank)

    async def _start_attention(self, rank: int) -> None:
        """Start an attention worker, and have it ask whichever pool is the present one by then."""
        asks = self._ffn.pool
        await self._attention.ask(rank, "start", self._checkpoint, self._config, asks, self._trace)
        while asks != self._ffn.pool:
            asks = self._ffn.pool
            await self._attention.ask(rank, "change_over", asks)

    def _place(self, name: str, role: type, workers: int) -> Pool:
        return Pool(name, role, workers, 1, self._store.host, self._store.port, gpus=self._gpus)


class _Worker:
    """One attention worker of the pool. Requests and whole steps of outputs cross Ray; tensors never do."""

    def __init__(self, pool: Pool, rank: int) -> None:
        self._pool, self._rank = pool, rank

    async def submit(self, request: Request) -> None:
        await self._order("submit", request)

    async def cancel(self, request_id: str) -> None:
        await self._order("cancel", request_id)

    async def busy(self) -> Busy:
        return await self._pool.ask(self._rank, "busy")

    async def counts(self) -> EngineCounts:
        return await self._pool.ask(self._rank, "counts")

    async def loads(self) -> dict[int, list[int]]:
        return await self._pool.ask(self._rank, "loads")

    def outputs(self) -> AsyncIterator[list[Output]]:
        return self._pool.stream(self._rank, "outputs")

    async def _order(self, what: str, argument: object) -> None:
        try:
            await self._pool.ask(self._rank, what, argument)
        except WorkerFailed as failure:
            if failure.died:
                raise ConnectionError(str(failure)) from failure
            raise
