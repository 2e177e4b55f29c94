"""A request outlives its engine: another says the rest, and nobody who listens can tell."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

import pytest

from expertmesh.launch.client import Client, Pauses
from expertmesh.parallel.timeline import Busy
from expertmesh.system.serve.engine import EngineCounts
from expertmesh.system.serve.request import Failure, Output, Request, RequestFailed, Sampling


class Worker:
    """Says how long the text is, as a token; is gone after `lasts` tokens. Remembers what it was asked."""

    def __init__(self, lasts: int = 1000, dead_to_orders: bool = False) -> None:
        self.lasts, self.dead_to_orders = lasts, dead_to_orders
        self.asked: list[Request] = []
        self.cancelled: list[str] = []
        self.inbox: asyncio.Queue[Request] = asyncio.Queue()

    async def submit(self, request: Request) -> None:
        if self.dead_to_orders:
            raise ConnectionError("nobody is there")
        self.asked.append(request)
        self.inbox.put_nowait(request)

    async def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        if self.dead_to_orders:
            raise ConnectionError("nobody is there")

    async def busy(self) -> Busy:
        return Busy(1.0, {"attention": 0.5})

    async def counts(self) -> EngineCounts:
        return EngineCounts(*range(len(EngineCounts._fields)))

    async def loads(self) -> dict[int, list[int]]:
        return {0: [1, 2]}

    async def outputs(self) -> AsyncIterator[list[Output]]:
        while True:
            request = await self.inbox.get()
            for length in range(len(request.token_ids), len(request.prompt_token_ids) + request.sampling.max_tokens):
                if not self.lasts:
                    raise RuntimeError("killed")
                self.lasts -= 1
                last = length + 1 == len(request.prompt_token_ids) + request.sampling.max_tokens
                yield [Output(request.id, length, "length" if last else None)]
                await asyncio.sleep(0)


REQUEST = Request("x", [5, 6], Sampling(max_tokens=6, prompt_logprobs=1))
WHOLE = [2, 3, 4, 5, 6, 7]


def said(
    workers: list[Worker],
    request: Request = REQUEST,
    revive: Callable[[int, Exception], Awaitable[None]] | None = None,
) -> list[int]:
    async def ask() -> list[int]:
        async with Client(list(workers), 64, revive) as client:
            return [output.token_id async for output in client.generate(request)]

    return asyncio.run(asyncio.wait_for(ask(), 10))


@pytest.mark.parametrize("lasts", range(7))
def test_another_worker_goes_on_where_the_first_was(lasts):
    first, second = Worker(lasts), Worker()
    assert said([first, second]) == WHOLE
    (asked,) = first.asked
    assert asked.sampling.seed is not None, "or the second would draw another text"
    if lasts == 6:
        assert not second.asked
        return
    (again,) = second.asked
    assert again.said_token_ids == tuple(WHOLE[:lasts]) and again.prompt_token_ids == REQUEST.prompt_token_ids
    assert again.sampling.seed == asked.sampling.seed
    assert again.sampling.prompt_logprobs == (None if lasts else 1), "told with the first token, and once"


def test_a_worker_that_is_gone_before_it_is_asked():
    assert said([Worker(dead_to_orders=True), Worker()]) == WHOLE


def test_two_moves_and_no_more():
    assert said([Worker(1), Worker(1), Worker()]) == WHOLE
    with pytest.raises(RuntimeError, match="3 workers failed with this request: killed"):
        said([Worker(1), Worker(1), Worker(1), Worker()])


def test_nobody_is_left():
    with pytest.raises(RuntimeError, match="no engine is left: killed"):
        said([Worker(2), Worker(1)])


def test_totals_stay_when_a_worker_goes():
    async def ask() -> None:
        async with Client([Worker(0), Worker()], 64) as client:
            assert len(await client.counts()) == 2 and client.down is None
            assert await client.loads() == {0: [2, 4]} and set(await client.stages()) == {"attention 0", "attention 1"}
            assert [output.token_id async for output in client.generate(REQUEST)] == WHOLE
            living, gone = await client.counts()
            assert (gone.generated_tokens, gone.sent_bytes) == (living.generated_tokens, living.sent_bytes)
            assert living.running == 0 and living.waiting and not (gone.waiting or gone.pages or gone.in_flight)
            assert await client.loads() == {0: [2, 4]} and set(await client.stages()) == {"attention 0"}
            assert client.down is None

    asyncio.run(ask())


@pytest.mark.parametrize("told_before", [True, False])
def test_a_worker_that_died_unseen_spoils_no_figures(told_before):
    workers = [Worker(), Worker()]

    async def dead() -> dict[int, list[int]]:
        raise ConnectionError("nobody is there")

    async def ask() -> None:
        async with Client(list(workers), 64) as client:
            if told_before:
                await client.loads()
            workers[0].loads = dead
            assert await client.loads() == {0: [2, 4] if told_before else [1, 2]}

    asyncio.run(ask())


def test_a_worker_that_is_started_again_is_waited_for():
    """Of two workers both are gone; the first to come back goes on."""
    workers, revived = [Worker(2), Worker(1)], []

    async def revive(index: int, error: Exception) -> None:
        revived.append((index, str(error)))
        await asyncio.sleep(0.05 if index else 0.02)
        workers[index].lasts = 1000

    assert said(workers, revive=revive) == WHOLE
    assert revived == [(0, "killed"), (1, "killed")]
    assert [len(worker.asked) for worker in workers] == [2, 1]


def test_a_worker_that_does_not_come_back():
    async def revive(index: int, error: Exception) -> None:
        raise RuntimeError("no place for it")

    with pytest.raises(RuntimeError, match="no engine is left: killed"):
        said([Worker(2)], revive=revive)


def test_leaving_cancels_even_if_the_worker_is_gone():
    worker = Worker()

    async def ask() -> None:
        async with Client([worker], 64) as client, aclosing(client.generate(REQUEST)) as outputs:
            async for _ in outputs:
                worker.dead_to_orders = True
                break

    asyncio.run(ask())
    assert worker.cancelled == ["x"]


def test_a_silent_worker_that_is_given_up_says_nothing_more():
    """It is stopped, not dead: what it says when it goes on is nobody's, and its end is not that of the next one."""
    silent, other = Worker(2), Worker()
    goes_on = asyncio.Event()

    async def revive(index: int, error: Exception) -> None:
        assert str(error) == "silent"
        goes_on.set()

    async def ask() -> None:
        async with Client([silent, other], 64, revive) as client:
            texts = []
            async for output in client.generate(REQUEST):
                texts.append(output.token_id)
                if len(texts) == 2:
                    client.lose(0, RuntimeError("silent"))
            assert texts == WHOLE and goes_on.is_set()
            assert client.alive == [0, 1]

    asyncio.run(asyncio.wait_for(ask(), 10))
    assert len(other.asked) == 1


def test_a_request_moves_on_from_a_worker_that_is_asked_no_more():
    """Four times: nobody failed. What a worker has told stays in the sums, and its number is not given again."""
    workers = [Worker() for _ in range(5)]

    async def ask() -> None:
        async with Client(workers[:1], 64) as client:
            texts: list[int] = []
            async for output in client.generate(REQUEST):
                texts.append(output.token_id)
                if len(texts) <= 4:
                    added = client.add(workers[len(texts)])
                    assert added == len(texts) and client.workers == [added - 1, added]
                    await client.remove(added - 1)
                    assert client.alive == [added]
            assert texts == WHOLE
            assert len(await client.counts()) == 5 and await client.loads() == {0: [5, 10]}
            assert client.down is None and client.gone == []
            client.lose(4, RuntimeError("killed"))
            assert client.gone == [4]
            await client.remove(4)
            assert client.down == "it has no worker"

    asyncio.run(asyncio.wait_for(ask(), 10))
    assert [worker.cancelled for worker in workers[:4]] == [["x"]] * 4
    assert [request.said_token_ids for worker in workers for request in worker.asked] == [
        tuple(WHOLE[:said]) for said in range(5)
    ]


def test_the_longest_pause_is_of_those_who_speak_and_of_those_who_wait():
    class Mute(Worker):
        async def submit(self, request: Request) -> None:
            pass

    async def ask() -> None:
        async with Client([Mute()], 64) as client:
            waiting = asyncio.create_task(anext(aiter(client.generate(REQUEST))))
            await asyncio.sleep(0.05)
            with client.watch_pauses() as pauses:
                await asyncio.sleep(0.05)
                assert 0.1 <= pauses.longest < 5, "it waits since before anybody watched"
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            with client.watch_pauses() as pauses:
                assert pauses.longest == 0

    asyncio.run(ask())
    pauses = Pauses()
    with pauses.of("a") as spoke:
        time.sleep(0.05)
        spoke()  # nobody watches
        pauses.begin()
        spoke()
        assert pauses.longest < 0.05
        time.sleep(0.05)
        spoke()
    assert pauses.longest >= 0.05


def test_a_request_that_fails_alone_is_tried_nowhere_else():
    class Refusing(Worker):
        async def outputs(self) -> AsyncIterator[list[Output | Failure]]:
            yield [Output("x", 2), Failure("x", "of its own making")]
            await asyncio.sleep(60)

    workers = [Refusing(), Worker()]
    with pytest.raises(RequestFailed, match="^of its own making$"):
        said(workers)
    assert not workers[0].cancelled and not workers[1].asked
