"""From a micro-batch to the tokens that come next: the model's forward and the draw.

Who computes and in which pages was decided (scheduler.py); nothing here outlives the micro-batch but the cache.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch

from expertmesh.parallel.dispatchers import Dispatcher
from expertmesh.parallel.timeline import Turns
from expertmesh.system.model.context import Context, Decisions
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.serve.kv_cache import KVCache, PagedAttend, Span, plan
from expertmesh.system.serve.request import Logprobs
from expertmesh.system.serve.sampler import Drawn, Place, sample, told_prompt
from expertmesh.system.serve.scheduler import Batch, Piece


class Result(NamedTuple):
    """What came of a micro-batch."""

    drawn: list[Drawn]  # of the pieces that speak, in order
    told: list[list[Logprobs]]  # of every piece: of the prompt's tokens after each of its own, where asked for


class Runner:
    """A micro-batch has a turn of `turns` while it computes; its dispatcher lets others have theirs while it waits."""

    def __init__(self, model: Transformer, cache: KVCache, eos_ids: Collection[int], device: str, turns: Turns) -> None:
        self.model, self.cache, self.eos_ids = model, cache, frozenset(eos_ids)
        self.device, self.turns = device, turns
        config = model.config
        self._loads = {
            i: torch.zeros(config.moe_of(i).num_experts, dtype=torch.float64, device=device) for i in config.moe_layers
        }

    @torch.inference_mode()
    def run(self, batch: Batch, dispatcher: Dispatcher, micro_batch: int) -> Result:
        pieces = batch.pieces
        tokens = [token for s, start, length in pieces for token in s.token_ids[start : start + length]]
        positions = [position for _, start, length in pieces for position in range(start, start + length)]
        with self.turns.timeline.flight(), self.turns.turn(micro_batch):
            for source, target in batch.copies:
                self.cache.copy(source, target)
            spans = [Span(s.pages, start, length) for s, start, length in pieces]
            attend = PagedAttend(self.cache, plan(self.cache, spans))
            context = Context(torch.tensor(positions, device=self.device), attend, dispatcher)
            hidden_TD, decisions = self.model(torch.tensor(tokens, device=self.device), context)
            self._count(decisions)
            speaking = [piece for piece in pieces if piece.speaks]
            told = self._told(pieces, hidden_TD)
            if not speaking:
                return Result([], told)
            lasts = torch.tensor([piece.length for piece in pieces]).cumsum(0) - 1
            rows = [row for piece, row in zip(pieces, lasts.tolist(), strict=True) if piece.speaks]
            logits_SV = self.model.lm_head(hidden_TD[torch.tensor(rows, device=self.device)])
            return Result(sample(logits_SV, [self._place(piece) for piece in speaking]), told)

    def loads(self) -> dict[int, list[int]]:
        """For each layer with experts, how many choices each of them served so far; FFN experts come first."""
        return {layer: load_N.long().tolist() for layer, load_N in self._loads.items()}

    def _count(self, decisions: list[Decisions]) -> None:
        for layer, load_N in self._loads.items():
            routing = decisions[layer].experts
            if routing is not None:
                chosen = routing.experts_TK.flatten()
                load_N.index_add_(0, chosen, torch.ones_like(chosen, dtype=load_N.dtype))

    def _place(self, piece: Piece) -> Place:
        sequence = piece.sequence
        request = sequence.request
        ends = ends_of(request.sampling.stop_token_ids, self.eos_ids, request.sampling.ignore_eos)
        return Place(request.sampling, sequence.seed, sequence.token_ids, len(request.prompt_token_ids), ends)

    def _told(self, pieces: list[Piece], hidden_TD: torch.Tensor) -> list[list[Logprobs]]:
        """Logprobs of prompts that asked for them; a whole row of logits for each of their tokens."""
        told: list[list[Logprobs]] = []
        for (s, start, length), rows_TD in zip(
            pieces, hidden_TD.split([piece.length for piece in pieces]), strict=True
        ):
            prompt, top = s.request.prompt_token_ids, s.request.sampling.prompt_logprobs
            after = [] if top is None else prompt[start + 1 : start + length + 1]
            logits_TV = self.model.lm_head(rows_TD[: len(after)]) if after else None
            told.append([] if logits_TV is None else told_prompt(logits_TV, after, top or 0))
        return told


def ends_of(stop_token_ids: frozenset[int], eos_ids: frozenset[int], ignore_eos: bool) -> frozenset[int]:
    """The tokens that end an answer."""
    return stop_token_ids if ignore_eos else stop_token_ids | eos_ids
