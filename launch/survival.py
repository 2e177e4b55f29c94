"""Workers of a service that die or fall silent are started again, as often as `serve.restarts` allows.

an FFN worker           its process is gone, or attention workers say in the store that it is silent: `keep_up`
                        starts the next one in its seat; links find it by themselves (parallel/link.py)
an attention worker     its outputs break off (client.py), or it says nothing when asked: `give_up_silent`; the
                        client has it started again, and its requests go on meanwhile with another
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from expertmesh.launch.client import Client
from expertmesh.launch.ray_cluster import Pool
from expertmesh.launch.worker_failed import WorkerFailed
from expertmesh.parallel.link import Seat, silent_address

logger = logging.getLogger(__name__)

WATCH_S = 0.2  # between two looks at the workers


class Restarts:
    """How many workers of a service may be started again, all pools together."""

    def __init__(self, most: int) -> None:
        self._left = most

    def spend(self, why: str) -> None:
        """Raises RuntimeError where none is left."""
        if not self._left:
            raise RuntimeError(f"{why}; serve.restarts is used up")
        self._left -= 1
        logger.warning("%s; started again, %d more times at most", why, self._left)


def tell_end(task: asyncio.Task[None]) -> None:
    """Nobody waits for those who watch: that they failed must not go unseen."""
    if task.cancelled() or task.cancelling():  # told to end: a call that fails then, its worker gone, is no news
        return
    if (error := task.exception()) is not None:
        logger.error("workers are watched no more: %s", error, exc_info=error)


async def give_up_silent(client: Client, seconds: float) -> None:
    """An attention worker that does not even say its figures for so long is treated as dead: another goes on for it."""
    while True:
        await asyncio.sleep(WATCH_S)
        for rank in client.alive:
            try:
                await asyncio.wait_for(client.answers(rank), seconds)
            except TimeoutError:
                client.lose(rank, RuntimeError(f"attention {rank} did not answer for {seconds:g} s"))
            except (RuntimeError, LookupError):
                pass  # it died, and whoever reads its outputs knows; or it is asked no more


@dataclass(eq=False)
class Duty:
    """What a process is asked for good: to be an FFN worker of some pool."""

    rank: int  # of the process
    seat: Seat
    begin: Callable[[], Any]
    """Ask it; returns the call."""

    def __post_init__(self) -> None:
        self.call = self.begin()


async def keep_up(pool: Pool, duties: list[Duty], restarts: Restarts, store: dist.Store) -> None:
    """Have a new process for each that died or is silent in one of its `duties`, until the budget is used up.

    It takes over all of them. Whoever waits for answers finds it by itself (link.py). `duties` may change meanwhile.
    """
    given_up: set[bytes] = set()  # by all micro-batches, one after the other, and until the next one has come

    def lost(duty: Duty) -> str | None:
        if (address := silent_address(store, duty.seat)) and address not in given_up:
            given_up.add(address)
            return f"{pool.name} {duty.rank} does not answer"
        try:
            pool.answer(duty.rank, duty.call, 0)
        except WorkerFailed as failure:
            return str(failure)
        return None

    while True:
        await asyncio.sleep(WATCH_S)
        replaced = set[int]()
        for duty in list(duties):
            if duty.rank in replaced:
                continue
            if why := lost(duty):
                try:
                    restarts.spend(why)
                except RuntimeError as spent:
                    logger.error("%s", spent)
                    return
                pool.replace(duty.rank)
                replaced.add(duty.rank)
            elif pool.wait([duty.call], 0):
                duty.call = duty.begin()  # it is there, but all attention workers were gone for a moment
        if replaced:
            await placed(pool, replaced)
        for duty in duties:
            if duty.rank in replaced:
                duty.call = duty.begin()


async def placed(pool: Pool, ranks: Collection[int]) -> None:
    """Wait until new workers have started, on other nodes than those that are lost; what has no room waits for some."""
    try:
        await asyncio.to_thread(pool.await_started, sorted(ranks))
    except WorkerFailed as failure:
        logger.error("%s", failure)
