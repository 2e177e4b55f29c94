"""A model served by two pools of workers, which can change while it answers.

    attention   one more: it starts, asks the present FFN pool, and the client asks it, too
                one less: the client asks it no more, others go on with its requests, it ends
    ffn         1  the next pool is put together, under its own number: processes at work take up a share of its
                   experts beside the one that they have; more are started if need be
                2  all attention workers link up with it (`prepare`); if one cannot, it is retired and nothing was
                3  each attention worker changes over, between two micro-batches of each lane
                4  the pool before is retired: its shares are dropped, processes that are too many end

So a process has to hold two shares for a moment. What is said does not depend on who computes it: no text changes. An
attention worker that is lost meanwhile comes back asking whichever pool is the present one. An FFN process that is lost
before step 3 ends the change, and the service goes on as before. Experts change places in the same way, with a pool of
the same processes (system/serve/placing.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from expertmesh.launch.client import Client
from expertmesh.launch.pools import Pools
from expertmesh.launch.ray_cluster import Pool, gpus_for
from expertmesh.launch.rendezvous import Rendezvous
from expertmesh.launch.roles import AttentionRole, FFNRole
from expertmesh.launch.survival import WATCH_S, Duty, Restarts, give_up_silent, keep_up, placed, tell_end
from expertmesh.launch.worker_failed import WorkerFailed
from expertmesh.parallel.link import Seat, has_come
from expertmesh.parallel.timeline import Busy, write_trace
from expertmesh.system.model.checkpoint import Checkpoint
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.engine import EngineCounts
from expertmesh.system.serve.placing import PAYS, Loads, Placements, busiest, place
from expertmesh.system.serve.request import Failure, Output, Request
from expertmesh.system.serve.workers import FFNPool

logger = logging.getLogger(__name__)

COME_S = 600.0  # for FFN workers to load their experts


class Scaled(NamedTuple):
    """What a service is after a change."""

    attention: int
    ffn: int
    longest_pause_s: float
    """Of any request that was open meanwhile: seconds that it waited for its next token."""


class SplitService:
    """Both pools, on the cluster that this process is on. `close` ends the watching; the cluster ends the workers."""

    def __init__(self, host: str, checkpoint: Checkpoint, config: ServeConfig, trace: bool) -> None:
        self._checkpoint, self._config, self._trace = checkpoint, config, trace
        self._store = Rendezvous(host)
        self._restarts = Restarts(config.restarts)
        self._changing = asyncio.Lock()
        self._at_work: list[Pool] = []
        self._watching: list[asyncio.Task[None]] = []
        self._number = 0  # of the newest FFN pool

    async def start(self, pools: Pools, context_length: int) -> None:
        """Bring up both pools, each while the other does. Raises WorkerFailed where one cannot be."""
        place, gpus = (self._store.host, self._store.port), gpus_for(sum(pools))
        self._ffn, self.pool = Pool("ffn", FFNRole, pools.ffn, 1, *place, gpus=gpus), FFNPool(pools.ffn)
        self._at_work.append(self._ffn)
        self._ffn_ranks = list(range(pools.ffn))  # of the processes at work; what was ended leaves gaps
        self._duties = self._assign(self.pool, pools.attention)
        self._attention = Pool("attention", AttentionRole, pools.attention, 1, *place, gpus=gpus)
        self._at_work.append(self._attention)
        linking = self._attention.start("start", self._checkpoint, self._config, self.pool, self._trace)
        while not await asyncio.to_thread(self._attention.finished, linking, 0.2):
            self._raise_failure(self._duties)  # one that cannot load would be waited for in vain
        workers = [_Worker(self._attention, rank) for rank in range(pools.attention)]
        self.client = Client(workers, context_length, self._revive)
        watches = [
            keep_up(self._ffn, self._duties, self._restarts, self._store.store),
            give_up_silent(self.client, self._config.exchange_timeout_s),
        ]
        if self._config.rebalance_s is not None:
            watches.append(self._keep_even(self._config.rebalance_s))
        for watch in watches:
            self._watching.append(asyncio.create_task(watch))
            self._watching[-1].add_done_callback(tell_end)

    def close(self) -> None:
        """Watch the workers no more, and wait for none to start; the rest can be asked as before."""
        for task in self._watching:
            task.cancel()
        for pool in self._at_work:
            pool.wait_no_more()

    async def write_trace(self, path: Path) -> None:
        write_trace(path, [await self._attention.ask(rank, "spans") for rank in self.client.alive])

    @property
    def pools(self) -> Pools:
        return Pools(len(self.client.workers), self.pool.workers)

    async def scale(self, wanted: Pools) -> Scaled:
        """Give the pools other sizes while requests are answered; one change at a time.

        Raises WorkerFailed where there is no place for the workers, or they do not come up: then the FFN pool is the
        one from before.
        """
        async with self._changing:
            with self.client.watch_pauses() as pauses:
                await self._shrink_attention(wanted.attention)
                if wanted.ffn != self.pool.workers:
                    await self._change_ffn(wanted.ffn, await self._placements(wanted.ffn))
                await self._grow_attention(wanted.attention)
                return Scaled(*self.pools, round(pauses.longest, 3))

    async def _shrink_attention(self, count: int) -> None:
        for rank in self.client.gone:
            await self._end_attention(rank)
        for rank in self.client.workers[count:]:
            await self._end_attention(rank)

    async def _end_attention(self, rank: int) -> None:
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

    async def rebalance(self, before: Loads) -> Loads:
        """Place experts anew where that pays, by what they had to do since `before`. Returns what they did so far."""
        async with self._changing:
            now, workers, present = await self._loads(), self.pool.workers, self.pool.placements
            recent = {layer: _since(load_E, before.get(layer)) for layer, load_E in now.items()}
            after = {**present, **place(recent, workers, self._config.expert_copies)}
            load, would_be = busiest(recent, workers, present), busiest(recent, workers, after)
            told = f"the busiest FFN worker has {load:.2f} times the mean load, {would_be:.2f} with experts elsewhere"
            if would_be > load * (1 - PAYS):
                logger.info("%s: not worth moving them", told)
            else:
                logger.warning("%s: they move", told)
                await self._change_ffn(workers, after)
            return now

    async def _keep_even(self, seconds: float) -> None:
        loads = await self._loads()
        while True:
            await asyncio.sleep(seconds)
            try:
                loads = await self.rebalance(loads)
            except WorkerFailed as failure:
                logger.error("experts stay where they are: %s", failure)

    async def _placements(self, workers: int) -> Placements:
        """For another number of workers, by all that was measured; contiguous shares where nobody asked for more."""
        if not self._config.expert_copies and self._config.rebalance_s is None:
            return {}
        return place(await self._loads(), workers, self._config.expert_copies)

    async def _loads(self) -> Loads:
        """Rows of each FFN expert so far."""
        model = self._checkpoint.config
        return {
            layer: load_N[: model.moe_of(layer).ffn_experts] for layer, load_N in (await self.client.loads()).items()
        }

    async def _change_ffn(self, workers: int, placements: Placements) -> None:
        self._number += 1  # one that came to nothing keeps its number
        pool = FFNPool(workers, self._number, placements)
        before, duties = list(self._ffn_ranks), list(self._duties)
        if (more := pool.workers - len(before)) > 0:
            self._ffn_ranks += await asyncio.to_thread(self._ffn.grow, more)
        coming = self._assign(pool, len(self.client.workers))
        try:
            until = time.monotonic() + COME_S
            while not all(has_come(self._store.store, duty.seat) for duty in coming):
                self._raise_failure(coming)
                if time.monotonic() > until:
                    raise WorkerFailed(f"the FFN workers had not loaded their experts after {COME_S:g} s")
                await asyncio.sleep(WATCH_S)
            self._duties += coming
            for rank in self.client.alive:
                try:
                    await self._attention.ask(rank, "prepare", pool)
                except WorkerFailed as failure:
                    if not failure.died:  # one that died comes back
                        raise
        except BaseException:
            await self._retire(coming, before)
            raise
        self.pool = pool  # from here on whoever starts asks this one
        for rank in self.client.alive:
            try:
                await self._attention.ask(rank, "change_over", pool)
            except WorkerFailed as failure:
                self.client.lose(rank, failure)
        await self.client.settled()
        await self._retire(duties, [duty.rank for duty in coming])

    async def _retire(self, duties: list[Duty], ranks: list[int]) -> None:
        """Nobody asks those any more. Of the processes `ranks` stay."""
        self._duties[:] = [duty for duty in self._duties if duty not in duties]
        for duty in duties:
            if duty.rank in ranks:
                with suppress(WorkerFailed):
                    await self._ffn.ask(duty.rank, "retire", duty.seat.pool)
        for rank in self._ffn_ranks:
            if rank not in ranks:
                self._ffn.end(rank)
        self._ffn_ranks = list(ranks)

    def _assign(self, pool: FFNPool, attention_workers: int) -> list[Duty]:
        """Have processes be the workers of a pool, the first of those at work."""

        def begin(rank: int, ffn: int) -> Any:
            return self._ffn.call(rank, "run", self._checkpoint, self._config, ffn, pool, attention_workers)

        ranks = self._ffn_ranks[: pool.workers]
        return [Duty(rank, Seat(ffn, pool.number), partial(begin, rank, ffn)) for ffn, rank in enumerate(ranks)]

    def _raise_failure(self, duties: list[Duty]) -> None:
        for duty in duties:
            self._ffn.answer(duty.rank, duty.call, 0)

    async def _revive(self, rank: int, error: Exception) -> None:
        self._restarts.spend(str(error))
        self._attention.replace(rank)
        await placed(self._attention, [rank])
        await self._start_attention(rank)

    async def _start_attention(self, rank: int) -> None:
        """Start an attention worker, and have it ask whichever pool is the present one by then."""
        asks = self.pool
        await self._attention.ask(rank, "start", self._checkpoint, self._config, asks, self._trace)
        while asks != self.pool:
            asks = self.pool
            await self._attention.ask(rank, "change_over", asks)


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

    def outputs(self) -> AsyncIterator[list[Output | Failure]]:
        return self._pool.stream(self._rank, "outputs")

    async def _order(self, what: str, argument: object) -> None:
        try:
            await self._pool.ask(self._rank, what, argument)
        except WorkerFailed as failure:
            if failure.died:
                raise ConnectionError(str(failure)) from failure
            raise


def _since(load_E: Sequence[int], before_E: Sequence[int] | None) -> list[int]:
    """A worker that died takes what it did last with it: never less than nothing."""
    return [max(0, count - old) for count, old in zip(load_E, before_E or [0] * len(load_E), strict=True)]
