"""What a caller asks of the engine and what the engine answers: token ids in, token ids out, no text."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature 0 is greedy. top_k 0 means all tokens. The same seed gives the same text.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class Request:
    """One continuation to generate."""

    id: str
    prompt_token_ids: list[int]
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=16))


@dataclass(frozen=True)
class Output:
    """One token of one request; finish_reason is set on the last one.

    "stop": token_id is the end-of-text token (not part of the text). "length": max_tokens or the context is used up.
    """

    request_id: str
    token_id: int
    finish_reason: FinishReason | None = None


class EngineClient(Protocol):
    """The engine as the door sees it, whether it runs in this process or in pools of workers."""

    context_length: int

    def generate(self, request: Request) -> AsyncIterator[Output]:
        """Yield the tokens of `request` as they come; closing the iterator early cancels the request."""
        ...
