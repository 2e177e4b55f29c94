"""The engine's thread: requests in, outputs out, errors where the outputs are awaited, and an end."""

from __future__ import annotations

import threading
import time
from threading import Event, Lock
from typing import Any

import pytest
from tiny import tiny_model

from expertmesh.parallel.dispatchers import Dispatched, LocalDispatcher
from expertmesh.parallel.timeline import Turns
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import initialise
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.engine import Engine
from expertmesh.system.serve.loop import EngineLoop
from expertmesh.system.serve.request import Output, Request, Sampling

WAIT = 20  # seconds; nothing here takes one


def engine(turns: Turns | None = None) -> Engine:
    model = Transformer(tiny_model(vocab_size=64))
    initialise(model, 1, 0.3)
    return Engine(model.eval(), [], ServeConfig(max_running=2), "cpu", [LocalDispatcher()], turns or Turns())


def request(name: str, tokens: int = 3) -> Request:
    return Request(name, [1, 2, 3], Sampling(max_tokens=tokens, temperature=0))


def within(seconds: float, call: Any, *args: Any) -> Any:
    """The result of a call that must not hang."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append((call(*args), None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, f"{call} hangs"
    value, error = result[0]
    if error:
        raise error
    return value


def read(loop: EngineLoop, until_finished: set[str]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    left = set(until_finished)
    for batch in loop.outputs():
        for output in batch:
            tokens.setdefault(output.request_id, []).append(output.token_id)
            left -= {output.request_id} if output.finish_reason else set()
        if not left:
            break
    return tokens


def test_answers_are_those_of_the_engine():
    by_hand, expected = engine(), dict[str, list[int]]()
    for name in "abc":
        by_hand.add(request(name, tokens=4))
    while by_hand.has_work:
        for output in by_hand.step():
            expected.setdefault(output.request_id, []).append(output.token_id)

    loop = EngineLoop(engine())
    callers = [threading.Thread(target=loop.submit, args=(request(name, 4),)) for name in "abc"]
    for caller in callers:
        caller.start()
    assert within(WAIT, read, loop, set("abc")) == expected
    loop.submit(request("d"))  # it slept meanwhile
    assert list(within(WAIT, read, loop, {"d"})) == ["d"]
    within(WAIT, loop.close)


def test_cancel():
    turns = Turns()
    loop = EngineLoop(engine(turns))
    with turns.turn(0):  # the step that "a" may have begun waits until all orders are given
        loop.cancel("nobody")
        loop.submit(request("a", tokens=40))
        loop.cancel("a")
        loop.submit(request("b"))
    tokens = within(WAIT, read, loop, {"b"})
    assert len(tokens["b"]) == 3 and len(tokens.get("a", [])) <= 1
    within(WAIT, loop.close)


def test_close_ends_the_outputs():
    loop = EngineLoop(engine())
    loop.submit(request("a"))
    within(WAIT, read, loop, {"a"})
    within(WAIT, loop.close)
    assert within(WAIT, list, loop.outputs()) == []


def test_close_leaves_no_thread():
    """One that ends with the process, and drops tensors then, aborts it."""
    for _ in range(20):
        others = set(threading.enumerate())
        loop = EngineLoop(engine())
        assert len(set(threading.enumerate()) - others) >= 2, "the loop and its lanes"
        loop.close()
        assert set(threading.enumerate()) <= others


def test_close_ends_an_idle_loop_and_a_busy_one():
    within(WAIT, EngineLoop(engine()).close)
    busy = EngineLoop(engine())
    for name in "abcdefgh":
        busy.submit(request(name, tokens=50))
    within(WAIT, busy.close)
    unfinished = within(WAIT, list, busy.outputs())
    assert all(isinstance(output, Output) for batch in unfinished for output in batch)


class Failing:
    """An engine whose third step fails."""

    def __init__(self) -> None:
        self.steps, self.has_work, self.closed = 0, False, False

    def check(self, new: Request) -> None:
        if not new.prompt_token_ids:
            raise ValueError("the prompt has 0 tokens")

    def add(self, new: Request) -> None:
        self.has_work = True

    def step(self) -> list[Output]:
        self.steps += 1
        if self.steps == 3:
            raise RuntimeError("the FFN pool is gone")
        return [Output("a", self.steps)]

    def wake(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def test_a_step_that_raises_surfaces_after_the_outputs_before_it():
    failing = Failing()
    loop = EngineLoop(failing)  # type: ignore[arg-type]
    loop.submit(request("a"))
    seen: list[int] = []

    def consume() -> None:
        for batch in loop.outputs():
            seen.extend(output.token_id for output in batch)

    with pytest.raises(RuntimeError, match="the FFN pool is gone"):
        within(WAIT, consume)
    assert seen == [1, 2]
    within(WAIT, loop.close)
    assert failing.closed


def test_a_request_that_the_engine_refuses_is_refused_at_once():
    loop = EngineLoop(engine())
    with pytest.raises(ValueError, match="the prompt has 0 tokens"):
        loop.submit(Request("a", []))
    loop.submit(request("b"))
    assert list(within(WAIT, read, loop, {"b"})) == ["b"], "and nobody else suffers"
    within(WAIT, loop.close)


def test_a_request_that_comes_while_a_step_waits_is_begun():
    """Two lanes; the first is stuck. A second request must not wait for it."""
    stuck, free = Lock(), Event()

    class Stuck(LocalDispatcher):
        def dispatch(self, *args: Any) -> Dispatched:
            if stuck.acquire(blocking=False):
                with turns.others(0, 0):
                    free.wait(WAIT)
            return super().dispatch(*args)

    turns = Turns()
    model = Transformer(tiny_model(vocab_size=64))
    initialise(model, 1, 0.3)
    loop = EngineLoop(Engine(model.eval(), [], ServeConfig(micro_batch_tokens=1), "cpu", [Stuck(), Stuck()], turns))
    loop.submit(request("a"))
    while not stuck.locked():
        time.sleep(0.001)
    loop.submit(request("b"))
    assert list(within(WAIT, read, loop, {"b"})) == ["b"]
    free.set()
    assert list(within(WAIT, read, loop, {"a"})) == ["a"]
    within(WAIT, loop.close)
