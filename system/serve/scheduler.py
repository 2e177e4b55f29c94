"""Who computes next, and in which pages: continuous batching with chunked prefill. Plain Python, no tensor.

A request is a `Sequence` of tokens, some of which have keys and values in the cache (`computed`). Whatever is missing
is computed in bites: a prompt in bites of any size, an answer token by token, or with tokens guessed ahead (draft.py)
where these find room. `schedule` makes a micro-batch of bites:

    1  requests that miss one token, oldest first: they are the ones whose reader waits for the next word
    2  requests that miss more, oldest first, as far as the step has tokens left
    3  waiting requests in order of arrival, where all of their prompt finds pages

Several micro-batches may be in flight, each with its own requests. Each gets its share of all tokens that are missing,
so that they stay of one size though requests come and go. Every micro-batch reads the weights of the experts that it
asks, and a small one asks nearly as many as a large one: so there are only as many at once as have enough tokens each,
and what was in flight apart comes together again as the tokens get fewer.

Pages are taken as a bite needs them. When none are left, the youngest request that is in no micro-batch gives up its
own and waits again at its old place; what it had is computed anew, or found again by name if nobody needed the room.
The oldest of those that are in no micro-batch gets its pages before all others, so all of them end.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import NamedTuple

from expertmesh.system.serve.draft import NO_DRAFTS, Drafter
from expertmesh.system.serve.pages import PagePool, name_pages
from expertmesh.system.serve.request import Request


@dataclass(eq=False)
class Sequence:
    """A request in the engine."""

    request: Request
    arrival: int
    seed: int
    token_ids: list[int]  # prompt and answer so far
    longest: int  # how many these may become
    names: list[bytes] = field(default_factory=list)  # of the full pages of token_ids
    computed: int = 0  # how many tokens have keys and values
    pages: list[int] = field(default_factory=list)
    published: int = 0  # how many pages others may find
    reused: int | None = None  # tokens of the prompt found in the cache when it was first admitted
    in_flight: bool = False
    cancelled: bool = False  # while in flight
    borrowed: list[int] = field(default_factory=list)  # pages held until the micro-batch has copied them

    @property
    def missing(self) -> int:
        return len(self.token_ids) - self.computed


class Piece(NamedTuple):
    """Tokens [start, start + length) of a sequence, to be computed now, and so many drafts after them."""

    sequence: Sequence
    start: int
    length: int
    drafts: int = 0

    @property
    def rows(self) -> int:
        return self.length + self.drafts

    @property
    def speaks(self) -> bool:
        """Whether the sequence's next token is drawn after it."""
        return self.start + self.length == len(self.sequence.token_ids)


class Copy(NamedTuple):
    """A page to be copied before anything is computed, because its copy will be written to."""

    source: int
    target: int


class Batch(NamedTuple):
    """A micro-batch; pieces of one row come first."""

    pieces: list[Piece]
    copies: list[Copy]


@dataclass
class Counts:
    """What has happened so far."""

    preemptions: int = 0
    prompt_tokens: int = 0  # of requests that were admitted for the first time
    reused_tokens: int = 0  # of them, found in the cache


class Scheduler:
    """`lanes`: how many micro-batches may be in flight; `step_tokens`: the most that all of them compute together.

    `fewest`: tokens that a micro-batch must have for another to be in flight beside it.
    """

    def __init__(
        self,
        pages: int,
        page_size: int,
        lanes: int,
        max_running: int,
        step_tokens: int,
        prefix_cache: bool,
        drafter: Drafter = NO_DRAFTS,
        fewest: int = 1,
    ) -> None:
        self.pool, self.page_size, self.lanes, self.fewest = PagePool(pages), page_size, lanes, fewest
        self.max_running, self.step_tokens, self.prefix_cache = max_running, step_tokens, prefix_cache
        self.drafter = drafter
        self.waiting: list[Sequence] = []  # by arrival
        self.running: list[Sequence] = []  # by arrival
        self.counts = Counts()
        self._in_flight: list[Batch] = []
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request, seed: int, longest: int) -> None:
        """Queue a request, which alone must fit the pages: `longest` tokens, answer included, at most."""
        sequence = Sequence(request, self._arrivals, seed, request.token_ids, longest)
        self._arrivals += 1
        self.waiting.append(sequence)

    def cancel(self, request_id: str) -> None:
        """Forget a request. Its pages are free at once, or when the micro-batch that writes to them is done."""
        self.waiting = [s for s in self.waiting if s.request.id != request_id]
        for sequence in [s for s in self.running if s.request.id == request_id]:
            if sequence.in_flight:
                sequence.cancelled = True
            else:
                self.release(sequence)

    def schedule(self) -> Batch | None:
        """The next micro-batch, of requests that are in no other; None: nobody can go on before another is done."""
        wanting = [*self.running, *self.waiting[: max(0, self.max_running - len(self.running))]]
        missing = sum(s.missing for s in wanting)
        parts = max(1, min(missing // self.fewest, self.lanes, len(wanting), self.step_tokens))
        left = self.step_tokens - sum(piece.rows for batch in self._in_flight for piece in batch.pieces)
        if len(self._in_flight) >= parts or left <= 0:
            return None
        # A micro-batch is full with its share of all that is missing; its last piece may pass that, up to `most`.
        most = min(self.step_tokens // parts, left)
        room = min(most, -(-missing // parts))
        batch, taken, short = Batch([], []), 0, False
        ready = [s for s in self.running if not s.in_flight]
        if ready:  # the oldest has its pages before anybody else takes some, whatever it misses
            self._grow(ready[0], ready[0].computed + min(ready[0].missing, most), ready[1:])
        for sequence in sorted(ready, key=lambda s: s.missing > 1):
            if taken < room and sequence in self.running:  # not preempted meanwhile
                length = min(sequence.missing, most - taken)
                others = [s for s in ready if s.arrival > sequence.arrival and not s.in_flight]
                if self._grow(sequence, sequence.computed + length, others):
                    drafts = self._drafts(sequence, most - taken - length)
                    self._put(batch, sequence, length, drafts)
                    taken += length + drafts
                else:
                    short = True
        if not short:
            self._admit(batch, room - taken, most - taken)
        if not batch.pieces:
            return None
        batch.pieces.sort(key=lambda piece: piece.rows > 1)
        self._in_flight.append(batch)
        return batch

    def complete(self, batch: Batch, accepted: list[int]) -> None:
        """The micro-batch is computed, and so many drafts of each piece became text, which was appended before.

        Pages that it filled can be found from now on; who was cancelled leaves.
        """
        self._in_flight.remove(batch)
        for (sequence, _, length, _), right in zip(batch.pieces, accepted, strict=True):
            sequence.in_flight = False
            sequence.computed += length + right
            self.pool.give_back(sequence.borrowed)
            sequence.borrowed = []
            if self.prefix_cache:
                full = sequence.computed // self.page_size
                for index in range(sequence.published, full):
                    self.pool.publish(sequence.pages[index], sequence.names[index])
                sequence.published = full
            if sequence.cancelled:
                self.release(sequence)

    def append(self, sequence: Sequence, token_id: int) -> None:
        """A token was drawn; its keys and values are still missing."""
        sequence.token_ids.append(token_id)
        self._name(sequence)

    def release(self, sequence: Sequence) -> None:
        """A running sequence is over."""
        self.running.remove(sequence)
        self.pool.give_back(sequence.pages)
        sequence.pages = []

    def _put(self, batch: Batch, sequence: Sequence, length: int, drafts: int = 0) -> None:
        sequence.in_flight = True
        batch.pieces.append(Piece(sequence, sequence.computed, length, drafts))

    def _drafts(self, sequence: Sequence, room: int) -> int:
        """How many drafts go with an answer's token. Nobody gives pages up for them."""
        if sequence.missing > 1:
            return 0
        text = sequence.token_ids  # a token more than drafts will be drawn after it
        drafts = self.drafter.length(text, max(0, min(room, sequence.longest - len(text) - 1)))
        if drafts and not self._grow(sequence, len(text) + drafts, []):
            drafts = min(drafts, len(sequence.pages) * self.page_size - len(text))
        return drafts

    def _grow(self, sequence: Sequence, tokens: int, victims: list[Sequence]) -> bool:
        """Have pages for so many tokens, if need be those of `victims`, the last of them first."""
        needed = -(-tokens // self.page_size) - len(sequence.pages)
        while needed > 0:
            pages = self.pool.take(needed)
            if pages is not None:
                sequence.pages += pages
                return True
            left = [s for s in victims if s in self.running]
            if not left:
                return False
            self._preempt(left[-1])
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.release(sequence)
        sequence.computed = sequence.published = 0
        bisect.insort(self.waiting, sequence, key=lambda s: s.arrival)
        self.counts.preemptions += 1

    def _admit(self, batch: Batch, room: int, most: int) -> None:
        """Let waiting requests in, in order of arrival, as long as tokens, places and pages last.

        `room`: tokens until the micro-batch is full; `most`: tokens that it may have at all.
        """
        for sequence in list(self.waiting):
            if room <= 0 or len(self.running) >= self.max_running:
                return
            self._name(sequence)
            found = self._found(sequence)
            if self._is_coming(sequence, len(found)):
                continue  # somebody computes its next page right now: it will find it there
            size, tokens = self.page_size, len(sequence.token_ids)
            # One token at least must be computed, or nothing would say what comes next. It is written to a page that
            # others read, so to a copy of it.
            copied = len(found) * size == tokens
            if copied and not self._fits(found, tokens, 1):
                found, copied = found[:-1], False
            if not self._fits(found, tokens, int(copied)):
                return
            self.waiting.remove(sequence)
            self.pool.hold(found)
            sequence.pages, sequence.computed = found, min(len(found) * size, tokens - 1)
            sequence.published = sequence.computed // size
            if copied:
                (own,) = self.pool.take(1) or [-1]
                batch.copies.append(Copy(found[-1], own))
                sequence.borrowed, sequence.pages = found[-1:], [*found[:-1], own]
            length = min(sequence.missing, most)
            bisect.insort(self.running, sequence, key=lambda s: s.arrival)
            grown = self._grow(sequence, sequence.computed + length, [])
            assert grown, "pages for all of it were free"
            if sequence.reused is None:
                sequence.reused = sequence.computed
                self.counts.prompt_tokens += tokens
                self.counts.reused_tokens += sequence.computed
            self._put(batch, sequence, length)
            room, most = room - length, most - length

    def _found(self, sequence: Sequence) -> list[int]:
        """Pages of its beginning that are in the cache. What is told about a prompt is told while it is computed."""
        if not self.prefix_cache or sequence.request.sampling.prompt_logprobs is not None:
            return []
        return self.pool.find(sequence.names)

    def _fits(self, found: list[int], tokens: int, copies: int) -> bool:
        """Whether a sequence that has found some pages gets all others, and each running one could still have one."""
        needed = -(-tokens // self.page_size) - len(found) + copies
        return needed + self.pool.idle_among(found) + len(self.running) <= self.pool.free

    def _is_coming(self, sequence: Sequence, found: int) -> bool:
        """Whether the first page that it has not found is part of a prompt that is being computed."""
        if not self.prefix_cache or found == len(sequence.names):
            return False
        name = sequence.names[found]
        return any(name in s.names[s.published :] for s in self.running if s.missing >= self.page_size)

    def _name(self, sequence: Sequence) -> None:
        if self.prefix_cache:
            name_pages(sequence.token_ids, self.page_size, sequence.names, len(sequence.token_ids))
