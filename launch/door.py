"""The OpenAI-compatible HTTP door: it checks what comes in, hands it to the engine and writes the answer.

    POST /v1/completions        POST /v1/chat/completions
    GET /v1/models[/{id}]        GET /health        GET /metrics        GET /dashboard

With an API key all of them but /health need it, as "Authorization: Bearer KEY", or in a browser as the password. A
body has at most 32 MiB.

What lies between prompt and text is in completion.py, the shape of the bodies in openai_api.py and openai_answer.py.
Here are the routes, the errors (all in OpenAI's form), the event stream, and the watch on the caller's connection: a
caller who leaves frees the engine at once, streamed or not. /openapi.json tells programs every field and every status.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from base64 import b64decode
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertmesh.launch.completion import Completion
from expertmesh.launch.metrics import Metrics, Observed
from expertmesh.launch.openai_answer import (
    ChatAnswer,
    ChatCompletion,
    CompletionAnswer,
    Model,
    ModelList,
    Said,
    TextCompletion,
)
from expertmesh.launch.openai_api import (
    ApiError,
    ChatBody,
    CompletionBody,
    ErrorAnswer,
    GenerationBody,
)
from expertmesh.system.serve.request import EngineClient
from expertmesh.system.tokenizer import Tokenizer

DASHBOARD = Path(__file__).with_name("dashboard.html")
MOST_BODY_BYTES = 32 * 2**20  # a prompt of a million tokens as ids, and more
BEARER = Security(HTTPBearer(auto_error=False))  # for /openapi.json alone: _Guard looks at the key, before the routes


def build_app(engine: EngineClient, tokenizer: Tokenizer, model_name: str, api_key: str | None = None) -> FastAPI:
    """Build the server's app for one model, known to callers as `model_name`; with `api_key` they must have it."""
    app = FastAPI(title="expertmesh")
    app.add_middleware(_Guard, api_key=api_key)
    keyed = APIRouter() if api_key is None else APIRouter(dependencies=[BEARER], responses=_errors(401))
    metrics = Metrics(model_name)
    engine = Observed(engine, metrics)
    for kind in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)
    card: Model = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "expertmesh"}

    def check_model(name: str) -> None:
        if name != model_name:
            message = f"no model {name!r} here; this server has {model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    @app.get("/health", responses=_errors(503))
    async def health() -> dict[str, str]:
        """Say whether the engine behind this process answers: 503 where it does not."""
        if engine.down is not None:
            raise ApiError(503, f"the engine is gone: {engine.down}")
        return {"status": "ok"}

    @keyed.get("/metrics", response_class=Response, responses=_text("text/plain"))
    async def figures() -> Response:
        """Tell Prometheus what was counted so far."""
        return Response(await metrics.text(engine), media_type=CONTENT_TYPE_LATEST)

    @keyed.get("/dashboard", response_class=Response, responses=_text("text/html"))
    async def dashboard() -> Response:
        """Show the figures to people, as they change."""
        return HTMLResponse(DASHBOARD.read_text())

    @keyed.get("/v1/models")
    async def models() -> ModelList:
        """List the one model."""
        return {"object": "list", "data": [card]}

    @keyed.get("/v1/models/{name:path}", responses=_errors(404, "default"))
    async def model(name: str) -> Model:
        """Describe the model."""
        check_model(name)
        return card

    @keyed.post("/v1/completions", responses=_generated(TextCompletion))
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue one or more prompts, each a text or token ids."""
        check_model(body.model)
        # In a thread, because a long text takes long to encode and others are waiting for their tokens.
        prompts = [
            await asyncio.to_thread(tokenizer.encode, prompt) if isinstance(prompt, str) else prompt
            for prompt in body.prompt
        ]
        answer = CompletionAnswer(model_name)
        echo = body.prompt if body.echo else None
        # So does the check: of a schema, it may take a second.
        of_prompts = partial(Completion, answer.id, engine, tokenizer, prompts, body, param="prompt", echo=echo)
        completion = await asyncio.to_thread(of_prompts)
        return await _respond(completion, answer, body, request)

    @keyed.post("/v1/chat/completions", responses=_generated(ChatCompletion))
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Write the assistant's next turn."""
        check_model(body.model)
        try:
            text = tokenizer.render_chat([message.for_template() for message in body.messages])
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        prompt = await asyncio.to_thread(tokenizer.encode, text)
        answer = ChatAnswer(model_name)
        of_chat = partial(Completion, answer.id, engine, tokenizer, [prompt], body, param="messages")
        completion = await asyncio.to_thread(of_chat)
        return await _respond(completion, answer, body, request)

    app.include_router(keyed)
    return app


def _errors(*statuses: int | str) -> dict[int | str, dict[str, Any]]:
    """Naming "default" keeps FastAPI from promising a 422, which _answer_error makes a 400."""
    return {status: {"model": ErrorAnswer} for status in statuses}


def _text(media_type: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {media_type: {"schema": {"type": "string"}}}}}


def _generated(whole: Any) -> dict[int | str, dict[str, Any]]:
    data = {"type": "string", "description": "JSON of a piece of the answer, or of an error; at the end [DONE]"}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    streamed = {"text/event-stream": {"itemSchema": event}}
    return {200: {"model": whole, "content": streamed}, **_errors(400, 404, 413, 503, "default")}


async def _respond(
    completion: Completion, answer: CompletionAnswer, body: GenerationBody, request: Request
) -> Response:
    if body.stream:
        return _EventStream(_events(completion, answer, body))
    whole = await _while_connected(request.receive, _whole(completion, answer))
    return Response(status_code=499) if whole is None else JSONResponse(whole)  # 499 reaches nobody: the caller left


async def _whole(completion: Completion, answer: CompletionAnswer) -> dict[str, Any]:
    """Gather all pieces into one body."""
    texts = [""] * len(completion.requests)
    said: list[list[Said]] = [[] for _ in texts]
    choices: dict[int, dict[str, Any]] = {}
    async with aclosing(completion.pieces()) as pieces:
        async for piece in pieces:
            index = piece.index
            texts[index] += piece.text
            said[index] += piece.said
            if piece.finish_reason is not None:
                told = said[index] if completion.tells_logprobs else None
                choices[index] = answer.choice(index, texts[index], piece.finish_reason, told)
    return answer.whole([choices[index] for index in sorted(choices)], completion.usage)


async def _events(completion: Completion, answer: CompletionAnswer, body: GenerationBody) -> AsyncGenerator[str, None]:
    """Write the pieces as server-sent events. A failure becomes the last event, and [DONE] does not follow it."""
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    no_usage: dict[str, Any] = {"usage": None} if include_usage else {}
    try:
        for index in range(len(completion.requests)):
            if opening := answer.opening(index):
                yield _event(answer.chunk(opening, **no_usage))
        async with aclosing(completion.pieces()) as pieces:
            async for piece in pieces:
                told = list(piece.said) if completion.tells_logprobs else None
                delta = answer.delta(piece.index, piece.text, piece.finish_reason, told)
                yield _event(answer.chunk([delta], **no_usage))
        if include_usage:
            yield _event(answer.chunk([], usage=completion.usage))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body())


def _event(content: Mapping[str, Any]) -> str:
    # ASCII only: many clients take U+2028 or U+0085 inside a text for the end of the line.
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


class _Guard:
    """Before all routes, also those of nobody: the key, and the size of a body, announced or not."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app, self._key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, size = Headers(scope=scope), 0
        if self._key is not None and scope["path"] != "/health":
            given = _key_in(headers.get("authorization", ""))
            if not hmac.compare_digest(given.encode(), self._key.encode()):
                message = "this server needs its API key: Authorization: Bearer KEY"
                refusal = ApiError(401, message, code="invalid_api_key").body()
                asking = {"WWW-Authenticate": 'Basic realm="expertmesh"'}
                await JSONResponse(refusal, 401, asking)(scope, receive, send)
                return

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MOST_BODY_BYTES:
                raise HTTPException(413, f"the body has more than {MOST_BODY_BYTES} bytes")
            return message

        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > MOST_BODY_BYTES:
            error = ApiError(413, f"the body has {announced} bytes; at most {MOST_BODY_BYTES} are taken")
            await JSONResponse(error.body(), 413)(scope, receive, send)
            return
        await self._app(scope, counted, send)


def _key_in(authorization: str) -> str:
    """Of "Bearer KEY", and of a browser's "Basic base64(anybody:KEY)"."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() != "basic":
        return value
    with suppress(ValueError):
        return b64decode(value, validate=True).decode().partition(":")[2]
    return ""


class _EventStream(StreamingResponse):
    """A StreamingResponse that closes its iterator itself when the caller leaves, not whenever Python collects it."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await _while_connected(receive, self.stream_response(send))


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """Run `work` and return its result, or cancel it and return None if the caller leaves first."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait({working, leaving})


async def _answer_error(request: Request, error: Exception) -> Response:
    """Put any exception into OpenAI's form, with the status that clients decide by."""
    headers = None
    if isinstance(error, RequestValidationError):
        error = _first_complaint(error)
    elif isinstance(error, HTTPException):
        headers = error.headers  # Allow, where another method is
        error = ApiError(error.status_code, str(error.detail))
    elif not isinstance(error, ApiError):
        error = ApiError(500, f"the server failed: {type(error).__name__}")
    return JSONResponse(error.body(), error.status, headers)


def _first_complaint(error: RequestValidationError) -> ApiError:
    """Turn the first thing wrong with a body into a 400 that names the field."""
    complaint = error.errors()[0]
    where = [str(step) for step in complaint["loc"][1:]]
    if complaint["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {complaint['ctx']['error']}")
    if complaint["type"] == "extra_forbidden":
        message = "this server does not support the field"
    else:
        message = complaint["msg"].removeprefix("Value error, ")
    name = ".".join(where)
    return ApiError(400, f"{name}: {message}" if name else message, param=name or None)
