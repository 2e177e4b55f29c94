"""Continuous batching: every step takes one bite of every running request, prompts and single tokens alike.

The engine is the attention side of serving, and all of it when serving joined: which dispatcher the micro-batches hold
decides whether the experts are in this process (`LocalDispatcher`) or in the FFN pool (`LinkDispatcher`).
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock

import torch

from expertmesh.parallel.dispatchers import Dispatcher
from expertmesh.system.model.context import Context
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.serve.kv_cache import CacheAttend, KVCache, Span
from expertmesh.system.serve.request import Output, Request
from expertmesh.system.serve.sampler import sample


@dataclass
class _Running:
    """A request that has a cache slot."""

    request: Request
    slot: int
    seed: int
    token_ids: list[int]  # prompt and answer so far
    cached: int = field(default=0)  # how many of them have keys and values


class Engine:
    """Generates for many requests at once. Not thread-safe: one thread calls `add`, `cancel` and `step`.

    `micro_batches` holds a dispatcher for each micro-batch of a step. Where there are several, their forwards run in
    threads of their own, each holding `compute` but while its dispatcher waits for the FFN pool.
    """

    def __init__(
        self,
        model: Transformer,
        eos_ids: Collection[int],
        micro_batches: Sequence[Dispatcher],
        compute: Lock,
        slots: int,
        device: str,
    ) -> None:
        self.model, self.eos_ids, self.device = model, frozenset(eos_ids), device
        self.micro_batches, self.compute = micro_batches, compute
        self.cache = KVCache(model.config, slots, device, model.embed_tokens.weight.dtype)
        self._free_slots = list(range(slots))
        self._waiting: deque[Request] = deque()
        self._running: list[_Running] = []
        self._threads = ThreadPoolExecutor(len(micro_batches), thread_name_prefix="micro-batch")

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError when the prompt is empty or leaves no room in the context."""
        length, room = len(request.prompt_token_ids), self.model.config.context_length
        if not 0 < length < room:
            raise ValueError(f"the prompt has {length} tokens; it must have at least 1 and at most {room - 1}")
        self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Forget a request; its slot is free at once. Unknown ids are ignored: it may just have ended."""
        self._waiting = deque(r for r in self._waiting if r.id != request_id)
        for running in [r for r in self._running if r.request.id == request_id]:
            self._release(running)

    def step(self) -> list[Output]:
        """Compute one token for every running request; admit waiting ones while slots are free."""
        while self._waiting and self._free_slots:
            request = self._waiting.popleft()
            seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(62)
            self._running.append(_Running(request, self._free_slots.pop(), seed, list(request.prompt_token_ids)))
        parts = _split(self._running, len(self.micro_batches))
        # The last dispatchers stay idle where a step has fewer requests than micro-batches.
        logits = list(self._threads.map(self._forward, parts, self.micro_batches))
        return [
            self._advance(running, logits_V)
            for part, logits_BV in zip(parts, logits, strict=True)
            for running, logits_V in zip(part, logits_BV, strict=True)
        ]

    @torch.inference_mode()
    def _forward(self, part: list[_Running], dispatcher: Dispatcher) -> torch.Tensor:
        """logits_BV after the last token of each request."""
        spans = [Span(r.slot, r.cached, len(r.token_ids) - r.cached) for r in part]
        tokens = [token for r in part for token in r.token_ids[r.cached :]]
        positions = [position for span in spans for position in range(span.start, span.start + span.length)]
        lengths_B = torch.tensor([span.length for span in spans], device=self.device)
        with self.compute:
            context = Context(torch.tensor(positions, device=self.device), CacheAttend(self.cache, spans), dispatcher)
            hidden_TD, _ = self.model(torch.tensor(tokens, device=self.device), context)
            return self.model.lm_head(hidden_TD[lengths_B.cumsum(0) - 1])

    def _advance(self, running: _Running, logits_V: torch.Tensor) -> Output:
        request, sampling = running.request, running.request.sampling
        running.cached = len(running.token_ids)
        token_id = sample(logits_V, sampling, running.seed, running.cached)
        running.token_ids.append(token_id)
        answer = len(running.token_ids) - len(request.prompt_token_ids)
        if token_id in self.eos_ids and not sampling.ignore_eos:
            self._release(running)
            return Output(request.id, token_id, "stop")
        if answer == sampling.max_tokens or len(running.token_ids) == self.model.config.context_length:
            self._release(running)
            return Output(request.id, token_id, "length")
        return Output(request.id, token_id)

    def _release(self, running: _Running) -> None:
        self._running.remove(running)
        self._free_slots.append(running.slot)


def _split(running: list[_Running], parts: int) -> list[list[_Running]]:
    """Cut a step into at most `parts` micro-batches of about equal tokens, in order; none of them is empty."""
    total = sum(len(r.token_ids) - r.cached for r in running)
    cuts: list[list[_Running]] = [[] for _ in range(parts)]
    done = 0
    for r in running:
        cuts[done * parts // total].append(r)
        done += len(r.token_ids) - r.cached
    return [cut for cut in cuts if cut]
