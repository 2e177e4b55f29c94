"""The attention side of serving, and all of it when serving joined: requests in, tokens out.

How a token flows:

    1  `add` puts a request into the scheduler's queue                                   scheduler.py
    2  `step` gives each lane without work a micro-batch: bites of requests with pages   scheduler.py
    3  a lane's thread runs the model over it; attention reads and writes the pages      runner.py, kv_cache.py
    4  in a MoE layer the lane's dispatcher keeps the rows here (joined), or sends them to the FFN workers and lets
       the next lane compute until they are back                                         parallel/link_dispatcher.py
    5  the runner draws the next token of every request whose last token was computed    sampler.py
       (more than one, where tokens that were guessed ahead turn out to be right)        draft.py
    6  `step` takes the first micro-batch that is done: pages that it filled can be found by others, tokens are told
       to the caller, requests that are over give their pages back, and the others are ready for the next micro-batch

There is no barrier between steps: while one lane draws its tokens, the others are somewhere in their layers. So an
FFN pool is changed for another lane by lane (`redirect`): a micro-batch ends where it began, the next one asks the new
pool.
"""

from __future__ import annotations

import logging
import queue
import secrets
from collections.abc import Callable, Collection, Sequence
from threading import Thread
from typing import NamedTuple

from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.dispatchers import Dispatcher
from expertmesh.parallel.timeline import Turns
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.constraint import Constraints
from expertmesh.system.serve.draft import NO_DRAFTS, Drafter
from expertmesh.system.serve.kv_cache import KVCache, pages_for
from expertmesh.system.serve.placing import ROWS_WORTH_READING
from expertmesh.system.serve.request import Failure, FinishReason, Logprobs, Output, Request
from expertmesh.system.serve.runner import Result, Runner, ends_of
from expertmesh.system.serve.sampler import Drawn
from expertmesh.system.serve.scheduler import Batch, Scheduler
from expertmesh.system.serve.scheduler import Sequence as Running

logger = logging.getLogger(__name__)


class EngineCounts(NamedTuple):
    """What an engine can tell about itself, for metrics."""

    running: int
    waiting: int
    pages: int
    pages_used: int
    in_flight: int  # micro-batches
    preemptions: int
    prompt_tokens: int
    reused_tokens: int  # of the prompts, found in the cache
    generated_tokens: int
    sent_bytes: int  # to the FFN pool and back
    saved_bytes: int  # that zero-computation experts did not send
    drafted_tokens: int  # guessed ahead
    accepted_tokens: int  # of them, those that became text

    def of_the_past(self) -> EngineCounts:
        """Of an engine that is gone: what it has done stays done, and nothing is under way."""
        return self._replace(running=0, waiting=0, pages=0, pages_used=0, in_flight=0)


class _Lane:
    """A thread and a dispatcher for one micro-batch in flight."""

    def __init__(self, runner: Runner, dispatcher: Dispatcher, done: queue.SimpleQueue, index: int) -> None:
        self._runner, self.dispatcher, self._done, self._index = runner, dispatcher, done, index
        self._inbox: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self.batch: Batch | None = None
        self._thread = Thread(target=self._work, name=f"micro-batch-{index}", daemon=True)
        self._thread.start()

    def start(self, batch: Batch) -> None:
        self.batch = batch
        self._inbox.put(batch)

    def close(self) -> None:
        self._inbox.put(None)

    def join(self) -> None:
        """Wait for the end: a thread that drops the last hold on a tensor while the process ends aborts it."""
        self._thread.join()

    def _work(self) -> None:
        while (batch := self._inbox.get()) is not None:
            try:
                self._done.put((self, self._runner.run(batch, self.dispatcher, self._index)))
            except BaseException as error:
                self._done.put((self, error))


class Engine:
    """Generates for many requests at once. Not thread-safe but for `wake`: one thread calls `add`, `cancel`, `step`.

    `dispatchers`: one for each micro-batch in flight. `turns`: the compute unit that they share. `traffic`:
    what they send is counted there.
    """

    def __init__(
        self,
        model: Transformer,
        eos_ids: Collection[int],
        config: ServeConfig,
        device: str,
        dispatchers: Sequence[Dispatcher],
        turns: Turns,
        traffic: Traffic | None = None,
        drafter: Drafter = NO_DRAFTS,
        constraints: Constraints | None = None,
    ) -> None:
        self.eos_ids, self.context_length = frozenset(eos_ids), model.config.context_length
        size, dtype = config.page_size, model.embed_tokens.weight.dtype
        tokens = config.cache_tokens or config.max_running * -(-self.context_length // size) * size
        pages = pages_for(model.config, size, tokens, device, dtype)
        self.cache = KVCache(model.config, pages, size, device, dtype)
        self.scheduler = Scheduler(
            *(pages, size, len(dispatchers), config.max_running, config.step_tokens, config.prefix_cache, drafter),
            config.micro_batch_tokens or worth_a_micro_batch(model.config),
        )
        self._room = min(self.context_length, pages * size)
        self._done: queue.SimpleQueue[tuple[_Lane, Result | BaseException] | None] = queue.SimpleQueue()
        self.runner = runner = Runner(
            *(model, self.cache, eos_ids, device, turns, drafter, constraints, config.skipping(model.config))
        )
        self._constraints = constraints
        self.timeline = turns.timeline
        self._lanes = [_Lane(runner, dispatcher, self._done, i) for i, dispatcher in enumerate(dispatchers)]
        self._redirected: tuple[dict[_Lane, Dispatcher], Callable[[], None]] | None = None
        self._traffic = traffic or Traffic()
        self._told: dict[str, list[Logprobs]] = {}
        self._generated = self._drafted = self._accepted = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def check(self, request: Request) -> None:
        """Raise ValueError where the request can never be computed: one line that says why."""
        length = len(request.token_ids)
        if request.sampling.json_schema is not None:
            if self._constraints is None:
                raise ValueError("this engine knows no tokenizer that a schema could be held to")
            self._constraints.check(request.sampling.json_schema)
        if not 0 < length < self._room:
            raise ValueError(f"the prompt has {length} tokens; it must have at least 1 and at most {self._room - 1}")

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError as `check` does."""
        self.check(request)
        sampling = request.sampling
        seed = secrets.randbits(62) if sampling.seed is None else sampling.seed
        self.scheduler.add(request, seed, min(self._room, len(request.prompt_token_ids) + sampling.max_tokens))

    def cancel(self, request_id: str) -> None:
        """Forget a request: nothing more is said for it. Unknown ids are ignored: it may just have ended."""
        self.scheduler.cancel(request_id)
        self._forget(request_id)

    def step(self) -> list[Output | Failure]:
        """Have every lane at work, wait until one is done, and return what it said: possibly nothing.

        Returns at once where nobody has anything to do, and early when `wake` was called.
        """
        for lane in self._lanes:
            if lane.batch is None and (batch := self.scheduler.schedule()):
                lane.start(batch)
        if all(lane.batch is None for lane in self._lanes):
            assert not self.has_work, "requests that nobody computes"
            return []
        event = self._done.get()
        if event is None:
            return []
        lane, result = event
        batch, lane.batch = lane.batch, None
        assert batch is not None
        self._turn_idle_lanes()
        if isinstance(result, BaseException):
            raise result
        return self._advance(batch, result)

    def redirect(self, dispatchers: Sequence[Dispatcher], then: Callable[[], None]) -> None:
        """Have each lane use its own of `dispatchers` from its next micro-batch on; `then` is called once all do."""
        self._redirected = dict(zip(self._lanes, dispatchers, strict=True)), then
        self._turn_idle_lanes()

    def wake(self) -> None:
        """Have a `step` that waits return: there is something new to do. Safe to call from any thread."""
        self._done.put(None)

    def close(self) -> None:
        """Wait for what is in flight and end the lanes."""
        for lane in self._lanes:
            lane.close()
        for lane in self._lanes:
            lane.join()

    def counts(self) -> EngineCounts:
        scheduler = self.scheduler
        return EngineCounts(
            len(scheduler.running),
            len(scheduler.waiting),
            scheduler.pool.count,
            scheduler.pool.count - scheduler.pool.free,
            sum(lane.batch is not None for lane in self._lanes),
            scheduler.counts.preemptions,
            scheduler.counts.prompt_tokens,
            scheduler.counts.reused_tokens,
            self._generated,
            self._traffic.sent,
            self._traffic.saved,
            self._drafted,
            self._accepted,
        )

    def _turn_idle_lanes(self) -> None:
        if self._redirected is None:
            return
        left, then = self._redirected
        for lane in [lane for lane in left if lane.batch is None]:
            lane.dispatcher = left.pop(lane)
        if not left:
            self._redirected = None
            then()

    def _advance(self, batch: Batch, result: Result) -> list[Output | Failure]:
        for (running, start, _, _), told in zip(batch.pieces, result.told, strict=True):
            if told and not running.cancelled:
                self._told.setdefault(running.request.id, [])[start : start + len(told)] = told
        said = [
            [] if piece.sequence.cancelled else self._say(piece.sequence, drawn)
            for piece, drawn in zip(batch.pieces, result.drawn, strict=True)
        ]
        accepted = [max(len(outputs) - 1, 0) for outputs in said]
        self._drafted += sum(piece.drafts for piece in batch.pieces)
        self._accepted += sum(accepted)
        self.scheduler.complete(batch, accepted)
        for piece, outputs in zip(batch.pieces, said, strict=True):
            if outputs and outputs[-1].is_last:
                self.scheduler.release(piece.sequence)
                self._forget(piece.sequence.request.id)
            elif piece.sequence.cancelled:
                self._forget(piece.sequence.request.id)  # again: its lane may have kept something since
        return [output for outputs in said for output in outputs]

    def _forget(self, request_id: str) -> None:
        self._told.pop(request_id, None)
        if self._constraints is not None:
            self._constraints.forget(request_id)

    def _say(self, running: Running, drawn: list[Drawn | Exception]) -> list[Output | Failure]:
        """Append what was drawn, up to where the text ends."""
        outputs: list[Output | Failure] = []
        for one in drawn:
            outputs.append(self._fail(running, one) if isinstance(one, Exception) else self._say_one(running, one))
            if outputs[-1].is_last:
                break
        return outputs

    def _fail(self, running: Running, error: Exception) -> Failure:
        logger.error("request %s fails, all others go on", running.request.id, exc_info=error)
        return Failure(running.request.id, f"{type(error).__name__}: {' '.join(str(error).split())}")

    def _say_one(self, running: Running, drawn: Drawn) -> Output:
        request = running.request
        self.scheduler.append(running, drawn.token_id)
        self._generated += 1
        answer = len(running.token_ids) - len(request.prompt_token_ids)
        told = None
        if answer == 1 and request.sampling.prompt_logprobs is not None:
            told = tuple(self._told.pop(request.id, []))
        reason = self._finish_reason(running, drawn.token_id)
        reused = running.reused or 0 if answer == 1 else 0
        return Output(request.id, drawn.token_id, reason, drawn.logprobs, told, reused)

    def _finish_reason(self, running: Running, token_id: int) -> FinishReason | None:
        sampling = running.request.sampling
        ends = ends_of(sampling.stop_token_ids, self.eos_ids, sampling.ignore_eos)
        if token_id in ends:
            return "stop"
        return "length" if len(running.token_ids) == running.longest else None


def worth_a_micro_batch(model: ModelConfig) -> int:
    """Tokens that give each FFN expert `ROWS_WORTH_READING` rows, in the layer where they are spread thinnest."""
    layers = [model.moe_of(layer) for layer in model.moe_layers]
    return max((-(-ROWS_WORTH_READING * moe.ffn_experts // moe.top_k) for moe in layers), default=1)
