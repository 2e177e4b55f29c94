"""What a caller asks of the engine and what the engine answers: token ids in, token ids out, no text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:  # the engine is made of more than its requests
    from expertmesh.system.serve.engine import EngineCounts

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when to stop; names and defaults as OpenAI's API and vLLM have them.

    What each does to the numbers is in sampler.py. The same seed gives the same text, in any company.
    """

    max_tokens: int
    temperature: float = 1.0  # 0 takes the likeliest token
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int | None = None
    ignore_eos: bool = False
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_token_ids: frozenset[int] = frozenset()  # end the answer as the end-of-text token does
    min_tokens: int = 0  # before so many nothing ends the answer
    logprobs: int | None = None  # tells the token's log-probability, and those of so many likeliest ones
    json_schema: str | None = None  # the answer is JSON of this schema, itself JSON
    prompt_logprobs: int | None = None  # the same for every token of the prompt but the first


@dataclass(frozen=True)
class Request:
    """One continuation to generate."""

    id: str
    prompt_token_ids: list[int]
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=16))
    said_token_ids: tuple[int, ...] = ()  # of the answer, by a worker that is gone: they are not said again

    @property
    def token_ids(self) -> list[int]:
        """All that is known of its text."""
        return [*self.prompt_token_ids, *self.said_token_ids]

    def resumed(self, said_token_ids: Sequence[int]) -> Request:
        """The rest of it, where the first tokens of the answer are known. With a seed it is what it would have been."""
        if not said_token_ids:
            return self
        sampling = replace(self.sampling, prompt_logprobs=None)  # they came with the first token
        return replace(self, sampling=sampling, said_token_ids=tuple(said_token_ids))


class TokenLogprob(NamedTuple):
    token_id: int
    logprob: float  # natural logarithm, of the model's own distribution: before temperature, bias and penalties


class Logprobs(NamedTuple):
    """Of one place in a text."""

    token: TokenLogprob  # that stands there
    top: tuple[TokenLogprob, ...]  # the likeliest ones there, as many as were asked for


@dataclass(frozen=True)
class Output:
    """One token of one request; finish_reason is set on the last one.

    "stop": token_id is the end-of-text token or one of stop_token_ids (not part of the text). "length": max_tokens or
    the context is used up.
    """

    request_id: str
    token_id: int
    finish_reason: FinishReason | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: tuple[Logprobs, ...] | None = None  # with the first token, where they were asked for
    reused_tokens: int = 0  # with the first token: how many of the prompt's were in the cache already

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None


class RequestFailed(RuntimeError):
    """A request cannot be answered, and no other engine could: all others go on."""


@dataclass(frozen=True)
class Failure:
    """The end of a request that could not be answered."""

    request_id: str
    why: str

    @property
    def is_last(self) -> bool:
        return True


class EngineClient(Protocol):
    """The engine as the door sees it, whether it runs in this process or in pools of workers."""

    context_length: int

    @property
    def down(self) -> str | None:
        """Why nothing answers any more; None where something does."""
        ...

    def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """Yield the tokens of `request` as they come; closing the iterator early cancels the request.

        Raises RequestFailed where it alone cannot be answered, another RuntimeError where nothing answers any more.
        """
        ...

    async def counts(self) -> list[EngineCounts]:
        """What each worker tells about its requests and its cache."""
        ...

    async def loads(self) -> dict[int, list[int]]:
        """For each layer with experts, how many choices each of them served so far; FFN experts come first."""
        ...

    async def stages(self) -> dict[str, dict[str, float]]:
        """Seconds of work of every stage, and its bubble where it has one."""
        ...
