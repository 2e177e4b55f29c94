"""The HTTP door through a real server: the openai client and raw HTTP, whole answers and streams, errors, leaving."""

import asyncio
import json
import socket
import threading
import time
from base64 import b64encode
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fake_engine import END, FakeEngine, byte_tokenizer

from expertmesh.launch.door import _EventStream, build_app
from expertmesh.system.serve.request import Request
from expertmesh.system.tokenizer import Tokenizer

TEXT = "Grüße, 世界 🙂 and more"  # of 31 bytes, so 31 tokens
CHAT = [{"role": "user", "content": "hi"}]


def say(text: str) -> Callable[[Request], list[int]]:
    tokens = [*byte_tokenizer().encode(text), END]
    return lambda request: tokens


class Door:
    """A server in a thread, the engine behind it and the clients before it."""

    def __init__(self, tokenizer: Tokenizer, api_key: str | None = None) -> None:
        self.engine = FakeEngine(say(TEXT))
        listener = socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = build_app(self.engine, tokenizer, "org/tiny", api_key)
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        self.http = httpx.Client(base_url=url, timeout=10)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=10)

    def close(self) -> None:
        self.http.close()
        self.openai.close()
        self.server.should_exit = True
        self.thread.join(10)

    def complete(self, **fields: Any) -> Any:
        return self.openai.completions.create(**{"model": "org/tiny", "prompt": "hi", "max_tokens": 40, **fields})

    def chat(self, **fields: Any) -> Any:
        return self.openai.chat.completions.create(**{"model": "org/tiny", "messages": CHAT, **fields})

    def freed(self) -> bool:
        """Wait until the engine runs nothing; the caller's leaving takes a moment to arrive."""
        for _ in range(500):
            if not self.engine.running:
                return True
            time.sleep(0.01)
        return False


@pytest.fixture(scope="module")
def server() -> Iterator[Door]:
    door = Door(byte_tokenizer())
    yield door
    door.close()


@pytest.fixture
def door(server: Door) -> Iterator[Door]:
    engine = server.engine
    engine.script, engine.pause, engine.failure = say(TEXT), 0.0, None
    engine.requests.clear()
    yield server
    assert server.freed()


def test_models_and_health(door: Door) -> None:
    assert door.http.get("/health").json() == {"status": "ok"}
    assert "/v1/chat/completions" in door.http.get("/openapi.json").json()["paths"]
    (card,) = door.openai.models.list().data
    assert card == door.openai.models.retrieve("org/tiny") and card.id == "org/tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        door.openai.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("hé", [byte_tokenizer().encode("hé")]),
        (["a", "bc"], [byte_tokenizer().encode("a"), byte_tokenizer().encode("bc")]),
        ([70, 71], [[70, 71]]),
        ([[70], [71, 72]], [[70], [71, 72]]),
    ],
)
def test_prompts_reach_the_engine_as_tokens(door: Door, prompt: Any, ids: list[list[int]]) -> None:
    answer = door.complete(prompt=prompt)
    assert [request.prompt_token_ids for request in door.engine.requests] == ids
    assert [(choice.index, choice.text) for choice in answer.choices] == [(i, TEXT) for i in range(len(ids))]
    assert answer.usage.prompt_tokens == sum(map(len, ids))


def test_sampling_reaches_the_engine(door: Door) -> None:
    fields = {"temperature": 0, "top_p": 0.5, "seed": 3, "user": "u", "extra_body": {"top_k": 4, "ignore_eos": True}}
    door.complete(max_tokens=9, **fields)
    door.chat(max_completion_tokens=8, **fields)
    door.http.post("/v1/completions", json={"model": "org/tiny", "prompt": "hi"})
    door.chat()
    asked, chat_asked, plain, chat_plain = (request.sampling for request in door.engine.requests)
    assert (asked.temperature, asked.top_p, asked.top_k, asked.seed, asked.ignore_eos) == (0, 0.5, 4, 3, True)
    assert (asked.max_tokens, chat_asked.max_tokens, chat_asked.top_k) == (9, 8, 4)
    assert (plain.max_tokens, plain.temperature, plain.top_p, plain.top_k, plain.seed) == (16, 1.0, 1.0, 0, None)
    prompt = byte_tokenizer().encode("<|user|>\nhi<|end|>\n<|assistant|>\n")
    assert door.engine.requests[-1].prompt_token_ids == prompt
    assert chat_plain.max_tokens == 64 - len(prompt)


def test_every_field_of_sampling_reaches_the_engine(door: Door) -> None:
    penalties = {"presence_penalty": 0.5, "frequency_penalty": -1, "logit_bias": {"71": -100, "72": 2.5}}
    more = {"min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "stop_token_ids": [7, 8]}
    door.complete(**penalties, logprobs=3, extra_body=more)
    door.chat(**penalties, logprobs=True, top_logprobs=3, extra_body=more)
    for asked in (request.sampling for request in door.engine.requests):
        assert (asked.presence_penalty, asked.frequency_penalty, asked.repetition_penalty) == (0.5, -1, 1.2)
        assert (asked.logit_bias, asked.stop_token_ids) == ({71: -100, 72: 2.5}, {7, 8})
        assert (asked.min_p, asked.min_tokens, asked.logprobs, asked.prompt_logprobs) == (0.1, 2, 3, None)
    door.chat(logprobs=True)
    assert door.engine.requests[-1].sampling.logprobs == 0


# The text, what is asked, and the tokens that are told of, those that begin within what the caller reads, and where.
TOLD: dict[str, tuple[str, dict[str, Any], list[str], list[int]]] = {
    "to the end": ("Grü", {}, ["G", "r", "\ufffd", "\ufffd"], [0, 1, 2, 2]),
    "to max_tokens": ("Grü", {"max_tokens": 2}, ["G", "r"], [0, 1]),
    "to a stop": ("abcd", {"stop": "c"}, ["a", "b"], [0, 1]),
    "held back for a stop that does not come": ("abcd", {"stop": "cx"}, ["a", "b", "c", "d"], [0, 1, 2, 3]),
    "nothing": ("", {}, [], []),
}


@pytest.mark.parametrize("case", TOLD)
def test_logprobs(door: Door, case: str) -> None:
    script, fields, tokens, offsets = TOLD[case]
    door.engine.script = say(script)
    ids = byte_tokenizer().encode(script)[: len(tokens)]
    whole = door.complete(logprobs=2, **fields).choices[0].logprobs
    assert whole.tokens == tokens and whole.token_logprobs == [-token / 100 for token in ids]
    assert whole.text_offset == offsets
    likeliest = dict(zip(byte_tokenizer().decode([70, 71]), (0.0, -1.0), strict=True))
    for top, token, token_id in zip(whole.top_logprobs, tokens, ids, strict=True):
        assert top == {token: -token_id / 100, **likeliest}
    parts = [chunk.choices[0].logprobs for chunk in door.complete(logprobs=2, stream=True, **fields)]
    assert [token for part in parts for token in part.tokens] == tokens
    turn = door.chat(logprobs=True, top_logprobs=2, **fields).choices[0].logprobs.content
    assert [(one.token, one.logprob, bytes(one.bytes)) for one in turn] == [
        (token, -id / 100, bytes([byte]))
        for token, id, byte in zip(tokens, ids, script.encode()[: len(tokens)], strict=True)
    ]
    assert all([(top.token, top.logprob) for top in one.top_logprobs] == list(likeliest.items()) for one in turn)
    turns = [chunk.choices[0].logprobs for chunk in door.chat(logprobs=True, stream=True, **fields)]
    assert [one.token for part in turns if part for one in part.content] == tokens
    assert door.complete(**fields).choices[0].logprobs is None


def test_logprobs_of_an_echoed_prompt(door: Door) -> None:
    door.engine.script = say("b")
    told = door.complete(prompt="hé", echo=True, logprobs=0, max_tokens=1).choices[0].logprobs
    ids = byte_tokenizer().encode("héb")
    assert told.tokens == ["h", "\ufffd", "\ufffd", "b"] and told.text_offset == [0, 1, 1, 2]
    assert told.token_logprobs == [None, *(-token / 100 for token in ids[1:])]
    assert told.top_logprobs[0] is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_alone(door: Door, stream: bool) -> None:
    """max_tokens=0 with echo: what is told of the prompt, and nothing after it."""
    door.engine.script = say("b")

    def ask(**fields: Any) -> tuple[str, list[str], str]:
        said = door.complete(prompt="hé", echo=True, max_tokens=0, stream=stream, **fields)
        choices = [chunk.choices[0] for chunk in said] if stream else [said.choices[0]]
        tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.tokens]
        return "".join(choice.text for choice in choices), tokens, choices[-1].finish_reason

    assert ask() == ("hé", [], "length") and not door.engine.requests
    assert ask(logprobs=1) == ("hé", ["h", "\ufffd", "\ufffd"], "length")
    usage = door.complete(prompt="hé", echo=True, max_tokens=0).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 0)


def test_a_large_schema_does_not_stop_the_others(door: Door) -> None:
    """Its check takes a second or more; who asks for health meanwhile is answered."""
    members = {f"member{i}": {"type": "string", "maxLength": i} for i in range(3000)}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": members}}}
    body = {"model": "org/tiny", "prompt": "hi", "response_format": schema}
    began, answered = time.perf_counter(), []
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(door.http.post, COMPLETION, json=body, timeout=60)
        while not large.done():
            door.http.get("/health")
            answered.append(time.perf_counter() - began)
    assert large.result().status_code in (200, 400) and len(answered) > 5


def test_an_api_key_covers_all_but_health() -> None:
    door = Door(byte_tokenizer(), api_key="sesame-open")
    try:
        assert door.http.get("/health").status_code == 200
        for method, path in (
            ("GET", "/v1/models"),
            ("GET", "/openapi.json"),
            ("GET", "/nowhere"),
            ("POST", COMPLETION),
        ):
            for header in ({}, {"Authorization": "Bearer sesame"}, {"Authorization": "Basic x"}):
                answer = door.http.request(method, path, headers=header)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError, match="needs its API key"):
            door.complete()
        assert not door.engine.requests
        for right in ("Bearer sesame-open", f"Basic {b64encode(b'anybody:sesame-open').decode()}"):
            assert door.http.get("/v1/models", headers={"Authorization": right}).status_code == 200
        assert door.http.get("/v1/models", headers={"Authorization": "Basic ?"}).status_code == 401
    finally:
        door.close()


def test_health_is_that_of_the_engine(door: Door) -> None:
    door.engine.down = "worker 3 is gone"
    try:
        answer = door.http.get("/health")
    finally:
        door.engine.down = None
    assert answer.status_code == 503 and "worker 3 is gone" in answer.json()["error"]["message"]
    assert door.http.get("/health").status_code == 200


def test_metrics_are_of_the_requests_that_came_by(door: Door) -> None:
    def read() -> float:
        answer = door.http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        lines = [line for line in answer.text.splitlines() if line.startswith("vllm:time_to_first_token_seconds_count")]
        return float(lines[0].split()[-1])

    before = read()
    door.complete()
    door.chat(n=2)
    assert read() == before + 3


def test_the_dashboard_needs_nothing_from_elsewhere(door: Door) -> None:
    page = door.http.get("/dashboard")
    assert page.headers["content-type"].startswith("text/html") and "://" not in page.text


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large(door: Door, announced: bool) -> None:
    content = b" " * (32 * 2**20 + 1)
    body = content if announced else iter([content[: 2**20]] * 33)
    answer = door.http.post(COMPLETION, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 413 and "33554432" in answer.json()["error"]["message"]


# What the engine says, what is asked, the text and the finish reason that follow, in all four variants.
TEXTS = {
    "to the end": (TEXT, {}, TEXT, "stop"),
    "max_tokens inside a character": (TEXT, {"max_tokens": 3}, "Gr\ufffd", "length"),
    "stop across tokens": (TEXT, {"stop": "🙂 and"}, "Grüße, 世界 ", "stop"),
    "the first of several stops": (TEXT, {"stop": ["more", "世"]}, "Grüße, ", "stop"),
    "a stop that almost came": ("a b", {"stop": " bc"}, "a b", "stop"),
    "nothing": ("", {}, "", "stop"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_whole_and_streamed_texts_agree(door: Door, case: str) -> None:
    script, fields, text, reason = TEXTS[case]
    door.engine.script = say(script)
    (whole,) = door.complete(**fields).choices
    assert (whole.text, whole.finish_reason) == (text, reason)
    (turn,) = door.chat(**fields).choices
    assert (turn.message.role, turn.message.content, turn.finish_reason) == ("assistant", text, reason)
    chunks = [chunk.choices[0] for chunk in door.complete(stream=True, **fields)]
    assert "".join(chunk.text for chunk in chunks) == text
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [reason]
    turns = [chunk.choices[0] for chunk in door.chat(stream=True, **fields)]
    assert "".join(chunk.delta.content or "" for chunk in turns) == text
    assert turns[0].delta.role == "assistant" and turns[-1].finish_reason == reason
    assert len(turns) == len(chunks) + 1


def test_several_choices_whole_and_streamed(door: Door) -> None:
    door.engine.script = lambda request: [*byte_tokenizer().encode(f"é{request.sampling.seed}"), END]
    expected = ["é7", "é8", "é9"]
    fields: dict[str, Any] = {"n": 3, "seed": 7}
    assert [choice.text for choice in door.complete(**fields).choices] == expected
    answer = door.chat(**fields)
    assert [choice.message.content for choice in answer.choices] == expected
    assert answer.usage.completion_tokens == 3 * 4  # two bytes, a digit and the end of text
    texts = [""] * 3
    for chunk in door.chat(stream=True, **fields):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == expected


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["h<|end|>i", byte_tokenizer().encode("hi")])
def test_echo(door: Door, prompt: Any, stream: bool) -> None:
    answer = door.complete(prompt=prompt, echo=True, stream=stream, stop="i")  # which is no stop in the prompt
    text = "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
    assert text == (prompt if isinstance(prompt, str) else "hi") + TEXT


def events(answer: httpx.Response) -> list[Any]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.isascii()  # a raw U+2028 would end the line for many clients
    lines = answer.text.split("\n\n")
    assert lines.pop() == "" and all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def test_the_events_of_a_chat(door: Door) -> None:
    door.engine.script = say("é\u2028")
    body = {"model": "org/tiny", "messages": CHAT, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = events(door.http.post("/v1/chat/completions", json=body))
    assert done == "[DONE]"
    head = {key: usage[key] for key in ("id", "object", "created", "model")}
    assert head["id"].startswith("chatcmpl-")
    assert (head["object"], head["model"]) == ("chat.completion.chunk", "org/tiny")
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 6
    deltas = [{"role": "assistant", "content": "", "refusal": None}, {"content": "é"}, {"content": "\u2028"}, {}]
    for chunk, delta in zip(chunks, deltas, strict=True):
        reason = None if delta else "stop"
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        assert chunk == {**head, "choices": [choice], "usage": None}


def test_the_events_of_a_completion(door: Door) -> None:
    door.engine.script = say("ab")
    body = {"model": "org/tiny", "prompt": "x", "stream": True}
    *chunks, done = events(door.http.post("/v1/completions", json=body))
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b", ""]
    assert all("usage" not in chunk and chunk["object"] == "text_completion" for chunk in chunks)


COMPLETION, CHAT_PATH = "/v1/completions", "/v1/chat/completions"
ERRORS = [  # path, what differs from a good body, status, param, part of the message
    (COMPLETION, {"model": "gpt-4"}, 404, "model", "no model 'gpt-4' here"),
    (CHAT_PATH, {"model": "gpt-4"}, 404, "model", "no model 'gpt-4' here"),
    (COMPLETION, {"prompt": ""}, 400, "prompt", "prompt is empty"),
    (COMPLETION, {"prompt": ["a", ""]}, 400, "prompt", "prompt is empty"),
    (COMPLETION, {"prompt": [261]}, 400, "prompt", "from 0 to 260"),
    (COMPLETION, {"prompt": [-1], "echo": True}, 400, "prompt", "from 0 to 260"),
    (COMPLETION, {"prompt": {}}, 400, "prompt", "prompt: must be a text, a list of texts"),
    (COMPLETION, {"max_tokens": 63}, 400, "prompt", "holds 64 tokens, the request needs 65: 2 in prompt and 63"),
    (CHAT_PATH, {"messages": [{"role": "user", "content": "x" * 70}]}, 400, "messages", "holds 64 tokens"),
    (COMPLETION, {"temperature": 3}, 400, "temperature", "temperature: Input should be less than or equal to 2"),
    (COMPLETION, {"suffix": "x"}, 400, "suffix", "suffix: this server does not support the field"),
    (COMPLETION, {"max_tokens": 0}, 400, "max_tokens", "max_tokens=0 asks for nothing; it goes with echo=true"),
    (CHAT_PATH, {"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    (COMPLETION, {"min_tokens": 17}, 400, "min_tokens", "min_tokens=17 is more than the 16 tokens that max_tokens"),
    (CHAT_PATH, {"min_tokens": 3, "max_tokens": 2}, 400, "min_tokens", "min_tokens=3 is more than the 2 tokens"),
    (
        CHAT_PATH,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"title": "x" * 2**18}}}},
        400,
        "response_format",
        "a schema may have 262144 characters",
    ),
    (COMPLETION, {"logit_bias": {"261": 1}}, 400, "logit_bias", "from 0 to 260"),
    (CHAT_PATH, {"stop_token_ids": [-1]}, 400, "stop_token_ids", "from 0 to 260"),
    (COMPLETION, {"prompt": ["x"] * 129, "n": 2}, 400, "prompt", "129 in prompt times n=2: a request may have 256"),
    (CHAT_PATH, {"tools": [{}]}, 400, "tools", "tools: this server does not support the field"),
    (CHAT_PATH, {"messages": [{"role": "user", "content": 1}]}, 400, "messages.0.content", "valid string"),
    (CHAT_PATH, {"stream_options": {}}, 400, None, "only allowed with stream=true"),
    (CHAT_PATH, {"n": 17, "stream": True}, 400, "n", "less than or equal to 16"),
]


@pytest.mark.parametrize(("path", "fields", "status", "param", "message"), ERRORS)
def test_bad_requests(door: Door, path: str, fields: Any, status: int, param: str | None, message: str) -> None:
    good = {"prompt": "hi"} if path == COMPLETION else {"messages": CHAT}
    answer = door.http.post(path, json={"model": "org/tiny", **good, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert message in error["message"] and error["type"] == "invalid_request_error" and "code" in error
    assert not door.engine.requests


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "the body is not JSON"),
        (b"[]", "dictionary"),
        (b"", ""),
        (b"\xff", ""),
        (b"[" * 100_000, ""),
        (b'{"model": "org/tiny", "prompt": "\\ud800"}', "prompt: is no valid Unicode"),
        (b'{"model": "org/tiny", "prompt": "a", "\\ud800": 1}', "unicode"),
        (b'{"model": "org/tiny", "prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"model": "org/tiny", "prompt": [' + b"9" * 5000 + b"]}", ""),
    ],
)
def test_bodies_that_are_no_request(door: Door, content: bytes, message: str) -> None:
    answer = door.http.post(COMPLETION, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_wrong_paths_answer_in_the_same_form(door: Door) -> None:
    for answer, status in ((door.http.get("/v1/nothing"), 404), (door.http.get(COMPLETION), 405)):
        assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"


def test_chat_needs_a_template(door: Door, tmp_path: Any) -> None:
    byte_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    bare = Door(Tokenizer.load(tmp_path))
    try:
        with pytest.raises(openai.BadRequestError, match="this tokenizer has no chat template"):
            bare.chat()
        assert bare.complete().choices[0].text == TEXT
    finally:
        bare.close()


def test_an_engine_failure_is_an_answer(door: Door) -> None:
    door.engine.script, door.engine.failure = (lambda _: [70, 71]), RuntimeError("worker 3 is gone")
    for ask in (door.complete, door.chat):
        with pytest.raises(openai.InternalServerError, match="the engine failed: RuntimeError: worker 3") as caught:
            ask()
        assert caught.value.status_code == 503
        texts = []
        with pytest.raises(openai.APIError, match="the engine failed: RuntimeError: worker 3"):
            for chunk in ask(stream=True):
                texts.append(chunk.choices[0])
        assert len(texts) >= 2
    body = {"model": "org/tiny", "prompt": "x", "stream": True}
    *_, last = events(door.http.post(COMPLETION, json=body))
    assert last["error"]["type"] == "server_error"


def test_a_failure_of_the_door_itself_is_an_answer(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertmesh.launch.door.Completion", None)
    with pytest.raises(openai.InternalServerError, match="the server failed: TypeError") as caught:
        door.complete()
    assert caught.value.status_code == 500


@pytest.mark.parametrize("path", [COMPLETION, CHAT_PATH])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pause", [0.2, 60])  # among the tokens, and while waiting long for the first
def test_a_caller_who_leaves_frees_the_engine(door: Door, path: str, stream: bool, pause: float) -> None:
    door.engine.script, door.engine.pause = (lambda _: [70] * 60), pause
    body = {"model": "org/tiny", "stream": stream, "n": 3, "max_tokens": 30}
    body |= {"prompt": "hi"} if path == COMPLETION else {"messages": CHAT}
    content = json.dumps(body)
    with socket.create_connection((door.http.base_url.host, door.http.base_url.port)) as caller:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        caller.sendall(f"{head}\r\n\r\n{content}".encode())
        for _ in range(500):
            if len(door.engine.running) == 3:
                break
            time.sleep(0.01)
        assert len(door.engine.running) == 3
        if stream and pause < 1:
            assert caller.recv(100)
    assert door.freed()
    door.engine.pause = 0.0
    assert door.complete(max_tokens=2).choices[0].text == byte_tokenizer().decode([70, 70])


@pytest.mark.parametrize("where", ["sending", "waiting"])
def test_a_stream_is_closed_wherever_the_caller_leaves(where: str) -> None:
    """While the server waits for a slow caller to read, or for the next token, whose cleanup takes a while."""
    closed = []

    async def events() -> AsyncGenerator[str, None]:
        try:
            yield "data: 1\n\n"
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.02)
            closed.append(True)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.02)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if where == "sending" and message["type"] == "http.response.body":
            await asyncio.sleep(60)

    async def serve() -> None:
        kept = events()  # so that Python's garbage collection cannot close it
        await _EventStream(kept)({"type": "http"}, receive, send)
        assert closed

    asyncio.run(serve())
