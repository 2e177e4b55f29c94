"""A fuzzer at the door: schemathesis reads the server's own OpenAPI and asks what it allows, and what it does not.

Before a real engine. No answer may be a failure of the server, keep the caller waiting, or be other than the OpenAPI
says; nothing wrong may be taken; and afterwards the engine answers as before, and holds no page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from doors import MODEL, figures, open_door, tiny_checkpoint
from fake_engine import FakeEngine, byte_tokenizer
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.config import ProjectConfig, ProjectsConfig, SchemathesisConfig
from schemathesis.specs.openapi import checks

from expertmesh.launch.door import build_app
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.workers import joined_engine

DEADLINE_S = 10.0
KEY = "sesame-open"
VOCAB_SIZE = byte_tokenizer().vocab_size
BEARER = {"Authorization": f"Bearer {KEY}"}
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
    checks.ignored_auth,
]
TOLD = build_app(FakeEngine(lambda request: []), byte_tokenizer(), MODEL, KEY).openapi()
LIMITS = settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
WHOLE_STREAMS = ProjectsConfig(default=ProjectConfig(max_stream_events=10_000))
API = schemathesis.openapi.from_dict(TOLD, config=SchemathesisConfig(seed=1, projects=WHOLE_STREAMS))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server that says the same after all questions as before them."""
    checkpoint = tiny_checkpoint(tmp_path_factory.mktemp("fuzz"))
    with open_door(checkpoint, [joined_engine(checkpoint, ServeConfig())], KEY) as address:

        def say() -> str:
            body = {"model": MODEL, "prompt": "hi", "seed": 1}
            answer = httpx.post(f"{address}/v1/completions", json=body, headers=BEARER, timeout=DEADLINE_S)
            return answer.json()["choices"][0]["text"]

        before = say()
        yield address
        assert say() == before
        told = figures(address, BEARER)
        assert told["vllm:kv_cache_usage_perc"] == 0 and told["vllm:generation_tokens_total"] > 500


def aim(body: dict[str, Any]) -> None:
    """Most of what is drawn at random is refused for its model, its tokens or its length: let it reach the engine."""
    body["model"] = MODEL
    if "prompt" in body:
        body["prompt"] = within(body["prompt"])
    if body.get("stop_token_ids"):
        body["stop_token_ids"] = within(body["stop_token_ids"])
    if body.get("logit_bias"):
        body["logit_bias"] = {str(within(int(name))): bias for name, bias in body["logit_bias"].items()}
    for field, most in (("n", 2), ("min_tokens", 3), ("max_completion_tokens", 3)):
        body |= {field: min(body[field], most)} if body.get(field) else {}
    body["max_tokens"] = min(body.get("max_tokens") or 3, 3)


def within(prompt: Any) -> Any:
    """The same kind of prompt, of tokens that there are, and not empty."""
    if isinstance(prompt, list):
        return [within(part) for part in prompt] or [1]
    return abs(prompt) % VOCAB_SIZE if isinstance(prompt, int) else prompt or "a"


def asked(path: str) -> Callable[..., None]:
    """A test for each: pytest gives all that schemathesis makes of one test the same id."""

    def ask(case: schemathesis.Case, url: str) -> None:
        if case.meta.generation.mode.is_positive and isinstance(case.body, dict):
            aim(case.body)
        response = case.call_and_validate(url, checks=CHECKS, headers=BEARER, timeout=DEADLINE_S)
        if response.headers["content-type"][0].startswith("text/event-stream"):
            check_events(response.text)

    return API.include(path=path).parametrize()(LIMITS(ask))


test_health = asked("/health")
test_metrics = asked("/metrics")
test_dashboard = asked("/dashboard")
test_models = asked("/v1/models")
test_model = asked("/v1/models/{name}")
test_completions = asked("/v1/completions")
test_chat_completions = asked("/v1/chat/completions")


def test_there_is_no_other_path():
    assert len(TOLD["paths"]) == 7


def check_events(text: str) -> None:
    """Each a piece of the answer in OpenAI's form; after them only [DONE]."""
    *pieces, last, rest = text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    for piece in pieces:
        chunk = json.loads(piece.removeprefix("data: "))
        assert chunk["model"] == MODEL and chunk["choices"] or chunk["usage"]
