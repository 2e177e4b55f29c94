"""From a micro-batch to the tokens that come next: the model's forward and the draw.

Who computes and in which pages was decided (scheduler.py); nothing here outlives the micro-batch but the cache.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import NamedTuple

import torch

from expertmesh.parallel.dispatchers import Dispatcher
from expertmesh.parallel.timeline import Turns
from expertmesh.system.model.context import Context, Decisions
from expertmesh.system.model.skip_ffn import FFNSkip
from expertmesh.system.model.transformer import ModelOutput, Transformer
from expertmesh.system.serve.config import Skipping
from expertmesh.system.serve.constraint import Constraints
from expertmesh.system.serve.draft import NO_DRAFTS, Drafter
from expertmesh.system.serve.kv_cache import KVCache, PagedAttend, Span, plan
from expertmesh.system.serve.request import Logprobs
from expertmesh.system.serve.sampler import Drawn, Place, sample, told_prompt
from expertmesh.system.serve.scheduler import Batch, Piece, Sequence


class Result(NamedTuple):
    """What came of a micro-batch."""

    drawn: list[list[Drawn | Exception]]
    """Of every piece: the tokens that come next, none where it does not speak; at their end, why none can be drawn."""
    told: list[list[Logprobs]]  # of every piece: of the prompt's tokens after each of its own, where asked for


class Runner:
    """A micro-batch has a turn of `turns` while it computes; its dispatcher lets others have theirs while it waits."""

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        eos_ids: Collection[int],
        device: str,
        turns: Turns,
        drafter: Drafter = NO_DRAFTS,
        constraints: Constraints | None = None,
        skipping: Skipping | None = None,
    ) -> None:
        self.model, self.cache, self.eos_ids = model, cache, frozenset(eos_ids)
        self.skipping = skipping
        self.drafter, self.constraints = drafter, constraints
        self.device, self.turns = device, turns
        config = model.config
        self._loads = {  # the last of each: choices of tokens that went past its FFN half
            i: torch.zeros(config.moe_of(i).num_experts + 1, dtype=torch.float64, device=device)
            for i in config.moe_layers
        }

    @torch.inference_mode()
    def run(self, batch: Batch, dispatcher: Dispatcher, micro_batch: int) -> Result:
        pieces = batch.pieces
        with self.turns.timeline.flight(), self.turns.turn(micro_batch):
            for source, target in batch.copies:
                self.cache.copy(source, target)
            drafts = self._draft(pieces, dispatcher)
            tokens = [
                token
                for (s, start, length, _), draft in zip(pieces, drafts, strict=True)
                for token in [*s.token_ids[start : start + length], *draft]
            ]
            spans = [Span(piece.sequence.pages, piece.start, piece.rows) for piece in pieces]
            hidden_TD, decisions = self._forward(tokens, spans, dispatcher, skip=self._skip(pieces))
            self._count(decisions)
            hidden = list(hidden_TD.split([piece.rows for piece in pieces]))
            return Result(self._drawn(pieces, hidden, drafts), self._told(pieces, hidden))

    def loads(self) -> dict[int, list[int]]:
        """For each layer with experts, how many choices each of them served so far; FFN experts come first."""
        return {layer: load_N[:-1].long().tolist() for layer, load_N in self._loads.items()}

    def _skip(self, pieces: list[Piece]) -> FFNSkip | None:
        """Which tokens may go past FFN halves: decided by their place in the text, however it comes to be computed."""
        if self.skipping is None:
            return None
        may = [
            piece.start + row >= len(piece.sequence.request.prompt_token_ids) + self.skipping.after
            for piece in pieces
            for row in range(piece.rows)
        ]
        return FFNSkip(self.skipping.rule, torch.tensor(may, device=self.device))

    def _forward(
        self,
        tokens: list[int],
        spans: list[Span],
        dispatcher: Dispatcher,
        width: float = 1.0,
        skip: FFNSkip | None = None,
    ) -> ModelOutput:
        """The model over the new tokens of some sequences, in order."""
        positions = [span.start + i for span in spans for i in range(span.length)]
        attend = PagedAttend(self.cache, plan(self.cache, spans))
        context = Context(torch.tensor(positions, device=self.device), attend, dispatcher, width=width, skip=skip)
        return self.model(torch.tensor(tokens, device=self.device), context)

    def _draft(self, pieces: list[Piece], dispatcher: Dispatcher) -> list[list[int]]:
        """The tokens guessed for each piece."""

        def step(chosen: list[int], drafts: list[list[int]], width: float) -> list[int]:
            guessed = [(pieces[i].sequence, drafts[i]) for i in chosen]
            lasts = [(draft or s.token_ids)[-1] for s, draft in guessed]
            spans = [Span(s.pages, len(s.token_ids) - 1 + len(draft), 1) for s, draft in guessed]
            hidden_SD, _ = self._forward(lasts, spans, dispatcher, width)
            places = [self._place(s, draft) for s, draft in guessed]
            drawn = sample(self.model.lm_head(hidden_SD), places)
            # Where none can be drawn, any guess will do: the draw that it is compared with fails, too.
            return [0 if isinstance(one, Exception) else one.token_id for one in drawn]

        texts = [piece.sequence.token_ids for piece in pieces]
        return self.drafter.draft(texts, [piece.drafts for piece in pieces], step)

    def _drawn(
        self, pieces: list[Piece], hidden: list[torch.Tensor], drafts: list[list[int]]
    ) -> list[list[Drawn | Exception]]:
        """What comes next of each piece: a draw after its last token, and after each draft that was drawn itself."""
        speaking = [
            (piece.sequence, rows_TD[piece.length - 1 :], draft)
            for piece, rows_TD, draft in zip(pieces, hidden, drafts, strict=True)
            if piece.speaks
        ]
        if not speaking:
            return [[] for _ in pieces]
        logits_SV = self.model.lm_head(torch.cat([rows_TD for _, rows_TD, _ in speaking]))
        places = [self._place(s, draft[:right]) for s, _, draft in speaking for right in range(len(draft) + 1)]
        said = iter(sample(logits_SV, places))
        return [
            accept([next(said) for _ in range(len(draft) + 1)], draft) if piece.speaks else []
            for piece, draft in zip(pieces, drafts, strict=True)
        ]

    def _count(self, decisions: list[Decisions]) -> None:
        for layer, load_N in self._loads.items():
            routing = decisions[layer].experts
            if routing is not None:
                chosen = routing.experts_TK.flatten()
                load_N.index_add_(0, chosen, torch.ones_like(chosen, dtype=load_N.dtype))

    def _place(self, sequence: Sequence, draft: list[int]) -> Place:
        """Where the token after its text and `draft` is drawn."""
        request = sequence.request
        ends = ends_of(request.sampling.stop_token_ids, self.eos_ids, request.sampling.ignore_eos)
        text, prompt = [*sequence.token_ids, *draft] if draft else sequence.token_ids, len(request.prompt_token_ids)
        allowed = None
        if (schema := request.sampling.json_schema) is not None:
            assert self.constraints is not None
            answer = sequence.token_ids[prompt:]
            allowed = partial(self.constraints.allowed, request.id, schema, answer, draft)
        return Place(request.sampling, sequence.seed, text, prompt, ends, allowed)

    def _told(self, pieces: list[Piece], hidden: list[torch.Tensor]) -> list[list[Logprobs]]:
        """Logprobs of prompts that asked for them; a whole row of logits for each of their tokens."""
        told: list[list[Logprobs]] = []
        for (s, start, length, _), rows_TD in zip(pieces, hidden, strict=True):
            prompt, top = s.request.prompt_token_ids, s.request.sampling.prompt_logprobs
            after = [] if top is None else prompt[start + 1 : start + length + 1]
            logits_TV = self.model.lm_head(rows_TD[: len(after)]) if after else None
            told.append([] if logits_TV is None else told_prompt(logits_TV, after, top or 0))
        return told


def accept(drawn: list[Drawn | Exception], draft: list[int]) -> list[Drawn | Exception]:
    """What was drawn after the text, and after each draft as long as those before it were drawn, too."""
    right = 0
    while right < len(draft) and isinstance(one := drawn[right], Drawn) and one.token_id == draft[right]:
        right += 1
    return drawn[: right + 1]


def ends_of(stop_token_ids: frozenset[int], eos_ids: frozenset[int], ignore_eos: bool) -> frozenset[int]:
    """The tokens that end an answer."""
    return stop_token_ids if ignore_eos else stop_token_ids | eos_ids
