"""Which tokens may come next in a text that must be JSON of a schema.

A grammar of the schema walks along the answer (llguidance); what it could take next is a mask over the vocabulary, and
the sampler draws from what is left (sampler.py, step 0). At the end of the JSON only end-of-text is left. The grammar
stands where the answer ends; tokens guessed ahead are walked by a copy of it.

Between members stands what Python's json.dumps puts there, ", " and ": ", and no other space: a model that is unsure
would go on with spaces for ever.

Legend: V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import llguidance
import numpy as np
import torch

from expertmesh.system.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

LIMITS = llguidance.LLParserLimits(max_items_in_row=100_000)  # 2,000 by default: an object of 450 optional members
SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Constraints:
    """Of the requests of one engine. `allowed` is called by one thread at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._walked: dict[str, tuple[int, llguidance.LLMatcher]] = {}  # by request: tokens of its answer, and where

    def check(self, schema: str) -> None:
        """Raises ValueError, one line, where no text can be held to the schema, or not by this library."""
        if problem := llguidance.LLMatcher.validate_grammar(
            _grammar(schema), _vocabulary(self._tokenizer), limits=LIMITS
        ):
            raise ValueError(" ".join(problem.split())[:300])

    def allowed(
        self, request_id: str, schema: str, answer: Sequence[int], draft: Sequence[int] = ()
    ) -> torch.Tensor | None:
        """bool [V]: what may follow; None where the draft itself may not, so that what follows it does not matter.

        Where the grammar grows beyond LIMITS, the answer ends: nobody else's does.
        """
        walked, matcher = self._walked.get(request_id) or (0, self._start(schema))
        try:
            matcher.consume_tokens(list(answer[walked:]))
            self._walked[request_id] = len(answer), matcher
            if draft:
                matcher = matcher.deep_copy()
                if matcher.try_consume_tokens(list(draft)) < len(draft):
                    return None
            mask = matcher.compute_bitmask()
        except ValueError as error:
            logger.error("request %s ends: it cannot be held to its schema: %.100s", request_id, error)
            ends_V = torch.zeros(self._tokenizer.vocab_size, dtype=torch.bool)
            ends_V[sorted(self._tokenizer.eos_ids)] = True
            return ends_V
        bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
        return torch.from_numpy(bits[: self._tokenizer.vocab_size].astype(bool))

    def forget(self, request_id: str) -> None:
        """The request is over."""
        self._walked.pop(request_id, None)

    def _start(self, schema: str) -> llguidance.LLMatcher:
        return llguidance.LLMatcher(_vocabulary(self._tokenizer), _grammar(schema), log_level=0, limits=LIMITS)


@lru_cache(maxsize=8)
def _vocabulary(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    """A large one takes a second to make."""
    return llguidance.LLTokenizer(
        tokenizer.to_json(), n_vocab=tokenizer.vocab_size, eos_token=sorted(tokenizer.eos_ids)
    )


def _grammar(schema: str) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=SPACING)
