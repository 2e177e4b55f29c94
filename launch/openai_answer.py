"""The OpenAI answer bodies: what each holds, and how the texts of one request become one, whole or event by event."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal, NamedTuple

from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from expertmesh.system.serve.request import FinishReason


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextLogprobs(TypedDict):
    """Of all tokens of a text, list by list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class TextCompletion(TypedDict):
    """POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class TokenLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class PlaceLogprobs(TokenLogprob):
    """Of the token that stands at a place, and of the likeliest ones there."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(TypedDict):
    content: list[PlaceLogprobs]
    refusal: None


class Turn(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: Turn
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Spelled(NamedTuple):
    """A token as it is written; half a character is U+FFFD in the text, and itself in the bytes."""

    text: str
    bytes: bytes


class Said(NamedTuple):
    """A token of a text, and how likely it was."""

    token: Spelled
    offset: int  # characters of the choice's text before it
    logprob: float | None  # None: the first token of a prompt, which nothing comes before
    top: list[tuple[Spelled, float]]  # the likeliest tokens there


class CompletionAnswer:
    """The answer bodies of one completion request; `chunk` is one event of a stream, `whole` all of it at once."""

    id_prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str) -> None:
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        """Build the one JSON body of an answer that is not streamed."""
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], **usage: dict[str, int] | None) -> dict[str, Any]:
        """Build one event; `usage` appears only if the caller asked for it, null in all events but the last."""
        return {**self._head, "object": self.chunk_object, "choices": choices, **usage}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Choices of the event that opens choice `index`; empty if none does."""
        return []

    def choice(
        self, index: int, text: str, finish_reason: FinishReason | None, said: list[Said] | None
    ) -> dict[str, Any]:
        """Build a finished choice. `said`: its tokens, where log-probabilities were asked for."""
        return {"index": index, "text": text, "logprobs": _of_completion(said), "finish_reason": finish_reason}

    def delta(
        self, index: int, text: str, finish_reason: FinishReason | None, said: list[Said] | None
    ) -> dict[str, Any]:
        """Build the next piece of a choice."""
        return self.choice(index, text, finish_reason, said)


class ChatAnswer(CompletionAnswer):
    """The same for a chat."""

    id_prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Say whose turn it is before the first text."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def choice(
        self, index: int, text: str, finish_reason: FinishReason | None, said: list[Said] | None
    ) -> dict[str, Any]:
        """Build a finished choice."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": _of_chat(said), "finish_reason": finish_reason}

    def delta(
        self, index: int, text: str, finish_reason: FinishReason | None, said: list[Said] | None
    ) -> dict[str, Any]:
        """Build the next piece of a choice; the last one has a finish reason and no content."""
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": _of_chat(said), "finish_reason": finish_reason}


def _of_completion(said: list[Said] | None) -> dict[str, Any] | None:
    if said is None:
        return None
    return {
        "tokens": [one.token.text for one in said],
        "token_logprobs": [one.logprob for one in said],
        "top_logprobs": [
            None
            if one.logprob is None
            else {spelled.text: logprob for spelled, logprob in [(one.token, one.logprob), *one.top]}
            for one in said
        ],
        "text_offset": [one.offset for one in said],
    }


def _of_chat(said: list[Said] | None) -> dict[str, Any] | None:
    if said is None:
        return None

    def entry(token: Spelled, logprob: float | None) -> dict[str, Any]:
        return {"token": token.text, "logprob": logprob, "bytes": list(token.bytes)}

    content = [entry(one.token, one.logprob) | {"top_logprobs": [entry(*top) for top in one.top]} for one in said]
    return {"content": content, "refusal": None}
