"""One API request as text: prompts in, pieces of text out, the same for completions and chat, streamed or not.

    prompt ids --> one engine Request per choice --> tokens --> TextStream --> StopStrings --> Piece, Piece, ...

Choices run side by side, and their pieces come in the order the engine makes them. Leaving early (the caller closes
the iterator, a stop string appears, a sibling fails) closes the engine's iterators, which cancels its requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass

from expertmesh.launch.openai_answer import Said, Spelled
from expertmesh.launch.openai_api import MOST_ANSWERS, ApiError, GenerationBody
from expertmesh.system.serve.constraint import Constraints
from expertmesh.system.serve.request import EngineClient, FinishReason, Logprobs, Request, RequestFailed
from expertmesh.system.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# An engine that is broken may never let go of a request; an answer must not wait for that.
CLEANUP_SECONDS = 5.0


@dataclass(frozen=True)
class Piece:
    """Some text of choice `index`, or, with finish_reason and without text, its end.

    `said`: the tokens since the piece before, where log-probabilities were asked for.
    """

    index: int
    text: str
    finish_reason: FinishReason | None = None
    said: tuple[Said, ...] = ()


class StopStrings:
    """Cuts a growing text before the first stop string, wherever the borders of its pieces fall.

    The stop string that is complete first wins; of two that end together, the longer. `hit` says one was found.
    """

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False

    def push(self, text: str, may_stop: bool = True) -> str:
        """Add text; return what can no longer be part of a stop string. One complete where none may be is text."""
        if self.hit:
            return ""
        text = self._held + text
        starts = [(text.find(stop), stop) for stop in self._stops] if may_stop else []
        ends = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if ends:
            self.hit, self._held = True, ""
            return text[: min(ends)[1]]
        longest = max(map(len, self._stops), default=1) - 1
        tails = (text[start:] for start in range(max(0, len(text) - longest), len(text)))
        self._held = next((tail for tail in tails if any(stop.startswith(tail) for stop in self._stops)), "")
        return text[: len(text) - len(self._held)]

    def finish(self) -> str:
        """Return what was held back in case a stop string followed."""
        held, self._held = self._held, ""
        return held


class Completion:
    """All choices of one API request: `body.n` for each prompt, numbered prompt by prompt.

    prompt_tokens counts every prompt once; completion_tokens grows while `pieces` runs and includes end-of-text tokens.
    """

    def __init__(
        self,
        id: str,
        engine: EngineClient,
        tokenizer: Tokenizer,
        prompts: list[list[int]],
        body: GenerationBody,
        *,
        param: str,
        echo: list[str | list[int]] | None = None,
    ) -> None:
        """Check the prompts (token ids) and lay out the engine's requests.

        `param` is the field the prompts came from, for messages. `echo`, the prompts as they were written, opens the
        text of their choices.
        ApiError 400: an empty prompt, an id outside the vocabulary, or more tokens than the context holds.
        """
        if len(prompts) * body.n > MOST_ANSWERS:
            message = f"{len(prompts)} in {param} times n={body.n}: a request may have {MOST_ANSWERS} answers"
            raise ApiError(400, message, param=param)
        for field, ids in (("logit_bias", body.logit_bias), ("stop_token_ids", body.stop_token_ids)):
            _check_vocabulary(field, ids, tokenizer)
        if body.json_schema is not None:
            try:
                Constraints(tokenizer).check(body.json_schema)
            except ValueError as error:
                raise ApiError(400, f"response_format: {error}", param="response_format") from None
        self._engine, self._tokenizer, self._stops = engine, tokenizer, body.stop
        self.tells_logprobs, self._min_tokens = body.told_logprobs is not None, body.min_tokens
        self._prompt_alone = body.max_tokens == 0
        self.requests: list[Request] = []
        for prompt in prompts:
            for sampling in body.samplings(_max_tokens(prompt, engine, tokenizer, body, param)):
                self.requests.append(Request(f"{id}-{len(self.requests)}", prompt, sampling))
        opening = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in echo or []]
        self._echo = [text for text in opening for _ in range(body.n)]
        self.prompt_tokens = sum(map(len, prompts))
        self.completion_tokens = 0

    @property
    def usage(self) -> dict[str, int]:
        """The token counts so far, as OpenAI reports them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Run all choices and yield their pieces. The other choices end with one that fails.

        ApiError 500 if this request alone cannot be answered, 503 if the engine fails.
        """
        queue: asyncio.Queue[Piece | BaseException] = asyncio.Queue()

        def report(task: asyncio.Task[None]) -> None:
            error = asyncio.CancelledError("cancelled inside") if task.cancelled() else task.exception()
            if error is not None:
                queue.put_nowait(error)

        running = len(self.requests)
        tasks = [asyncio.create_task(self._write(index, queue.put_nowait)) for index in range(running)]
        for task in tasks:
            task.add_done_callback(report)
        try:
            while running:
                item = await queue.get()
                if isinstance(item, BaseException):
                    logger.error("request %s failed", self.requests[0].id, exc_info=item)
                    if isinstance(item, RequestFailed):
                        raise ApiError(500, f"the request failed: {item}") from item
                    raise ApiError(503, f"the engine failed: {type(item).__name__}: {item}") from item
                running -= item.finish_reason is not None
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=CLEANUP_SECONDS)

    async def _write(self, index: int, put: Callable[[Piece], None]) -> None:
        """Turn the tokens of one choice into pieces of text."""
        text, stops = self._tokenizer.stream(), StopStrings(self._stops)
        echo = self._echo[index] if self._echo else ""
        if echo:
            put(Piece(index, echo))
        if self._prompt_alone and not self.tells_logprobs:
            put(Piece(index, "", "length"))
            return
        said: list[Said] = []
        written = given = len(echo)  # characters: of all tokens, and of the pieces
        tokens = 0
        async with aclosing(self._engine.generate(self.requests[index])) as outputs:
            async for output in outputs:
                if output.prompt_logprobs is not None:
                    said += self._prompt_said(self.requests[index].prompt_token_ids, output.prompt_logprobs)
                if self._prompt_alone:  # the engine tells of a prompt with the token that follows
                    put(Piece(index, "", "length", tuple(said)))
                    return
                tokens += 1
                self.completion_tokens += 1
                # The end-of-text token is no part of the text, special or not.
                new = ""
                if output.finish_reason != "stop":
                    if output.logprobs is not None:
                        said.append(self._said(output.logprobs, written))
                    more = text.push(output.token_id)
                    written += len(more)
                    new = stops.push(more, tokens > self._min_tokens)
                if output.finish_reason is not None:
                    new += stops.push(text.finish()) + stops.finish()
                given += len(new)
                if stops.hit:
                    said = [one for one in said if one.offset < given]
                if new:
                    put(Piece(index, new, said=tuple(said)))
                    said = []
                finish_reason = "stop" if stops.hit else output.finish_reason
                if finish_reason is not None:
                    put(Piece(index, "", finish_reason, tuple(said)))
                    return
        raise RuntimeError("the tokens ended without a finish reason")

    def _said(self, logprobs: Logprobs, offset: int) -> Said:
        top = [(self._spelled(one.token_id), one.logprob) for one in logprobs.top]
        return Said(self._spelled(logprobs.token.token_id), offset, logprobs.token.logprob, top)

    def _spelled(self, token_id: int) -> Spelled:
        return Spelled(self._tokenizer.spell(token_id), self._tokenizer.bytes_of(token_id))

    def _prompt_said(self, prompt: list[int], told: tuple[Logprobs, ...]) -> list[Said]:
        """The prompt's tokens; what was told begins with the second."""
        text, offset = self._tokenizer.stream(), len(self._tokenizer.decode(prompt[:1]))
        text.push(prompt[0])
        said = [Said(self._spelled(prompt[0]), 0, None, [])]
        for token_id, logprobs in zip(prompt[1:], told, strict=True):
            said.append(self._said(logprobs, offset))
            offset += len(text.push(token_id))
        return said


def _check_vocabulary(field: str, token_ids: Iterable[int], tokenizer: Tokenizer) -> None:
    if not all(0 <= token_id < tokenizer.vocab_size for token_id in token_ids):
        raise ApiError(400, f"{field}: token ids go from 0 to {tokenizer.vocab_size - 1}", param=field)


def _max_tokens(prompt: list[int], engine: EngineClient, tokenizer: Tokenizer, body: GenerationBody, param: str) -> int:
    """How many tokens may follow `prompt`; ApiError 400 if it cannot be continued as asked."""
    if not prompt:
        raise ApiError(400, f"{param} is empty: there is nothing to continue", param=param)
    _check_vocabulary(param, prompt, tokenizer)
    room = engine.context_length - len(prompt)
    max_tokens = max(1, body.max_tokens_for(room))
    if max_tokens > room:
        message = (
            f"the context holds {engine.context_length} tokens, the request needs {len(prompt) + max_tokens}: "
            f"{len(prompt)} in {param} and {max_tokens} to generate"
        )
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    if body.max_tokens == 0 and not body.told_prompt:
        raise ApiError(400, "max_tokens=0 asks for nothing; it goes with echo=true", param="max_tokens")
    if body.min_tokens > max_tokens:
        message = f"min_tokens={body.min_tokens} is more than the {max_tokens} tokens that max_tokens allows"
        raise ApiError(400, message, param="min_tokens")
    return max_tokens
