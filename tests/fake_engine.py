"""An engine with a script instead of a model, and a tokenizer with one token per byte, for tests of the text side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from expertmesh.system.serve.engine import EngineCounts
from expertmesh.system.serve.request import Logprobs, Output, Request, TokenLogprob
from expertmesh.system.tokenizer import Tokenizer

END = 0  # the end-of-text token of byte_tokenizer


def byte_tokenizer() -> Tokenizer:
    """Every character beyond ASCII takes several tokens, every stop string as many as it has bytes."""
    return Tokenizer.train(iter([]), 261)


def likelihood(token_id: int, top: int) -> Logprobs:
    """Tokens 70, 71, ... are the likeliest everywhere."""
    return Logprobs(TokenLogprob(token_id, -token_id / 100), tuple(TokenLogprob(70 + i, -float(i)) for i in range(top)))


class FakeEngine:
    """Says what `script` returns for a request (token ids); remembers what it was asked and what is still running."""

    context_length = 64
    down: str | None = None

    def __init__(self, script: Callable[[Request], list[int]]) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.running: set[str] = set()
        self.pause = 0.0  # seconds before each token
        self.failure: BaseException | None = None  # raised when the script is used up

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        self.requests.append(request)
        self.running.add(request.id)
        try:
            for count, token_id in enumerate(self.script(request), start=1):
                await asyncio.sleep(self.pause)
                asked, prompt = request.sampling, request.prompt_token_ids
                told = None if asked.logprobs is None else likelihood(token_id, asked.logprobs)
                of_prompt = None
                if count == 1 and asked.prompt_logprobs is not None:
                    of_prompt = tuple(likelihood(one, asked.prompt_logprobs) for one in prompt[1:])
                if token_id == END and not request.sampling.ignore_eos:
                    yield Output(request.id, token_id, "stop", told, of_prompt)
                    return
                length = count == request.sampling.max_tokens
                yield Output(request.id, token_id, "length" if length else None, told, of_prompt)
                if length:
                    return
            if self.failure is not None:
                raise self.failure
        finally:
            self.running.discard(request.id)

    async def counts(self) -> list[EngineCounts]:
        """Of two workers; every figure is its place, and twice that."""
        places = range(1, len(EngineCounts._fields) + 1)
        return [EngineCounts(*places), EngineCounts(*(2 * place for place in places))]

    async def loads(self) -> dict[int, list[int]]:
        return {1: [5, 7], 3: [0, 12]}

    async def stages(self) -> dict[str, dict[str, float]]:
        return {"attention 0": {"seconds": 1.5, "bubble": 0.25}, "wire 0": {"seconds": 0.5}}
