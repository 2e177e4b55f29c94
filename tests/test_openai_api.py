"""Request bodies: the four kinds of prompt, what passes as "asks for nothing", what is refused and by which name."""

from typing import Any

import jsonschema_rs
import pytest
from pydantic import ValidationError

from expertmesh.launch.openai_api import ApiError, ChatBody, CompletionBody

COMPLETION = {"model": "m", "prompt": "hi"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_prompts_become_a_list(prompt: Any, expected: list[Any]) -> None:
    assert CompletionBody.model_validate({"model": "m", "prompt": prompt}).prompt == expected


NEUTRAL = [
    (COMPLETION, {"logprobs": None, "best_of": 1, "suffix": "", "logit_bias": {}, "presence_penalty": 0.0}),
    (CHAT, {"logprobs": False, "top_logprobs": 0, "tools": [], "tool_choice": "auto", "frequency_penalty": 0}),
    (CHAT, {"response_format": {"type": "text"}, "modalities": ["text"], "functions": None, "temperature": None}),
    (CHAT, {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": True}),
    (COMPLETION, {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}),
]


@pytest.mark.parametrize(("base", "extra"), NEUTRAL)
def test_fields_without_effect_pass(base: dict[str, Any], extra: dict[str, Any]) -> None:
    kind = CompletionBody if base is COMPLETION else ChatBody
    body = kind.model_validate(base | extra)
    if "stream" not in extra and "response_format" not in extra:
        assert body == kind.model_validate(base)


@pytest.mark.parametrize(("base", "extra"), NEUTRAL)
def test_the_json_schema_tells_what_passes(base: dict[str, Any], extra: dict[str, Any]) -> None:
    schema = (CompletionBody if base is COMPLETION else ChatBody).model_json_schema()
    assert jsonschema_rs.is_valid(schema, base | extra)
    assert not any(jsonschema_rs.is_valid(schema, base | wrong) for wrong in ({"max_token": 5}, {"tools": [{}]}))


REFUSED = [
    (COMPLETION, "logprobs", 21),
    (COMPLETION, "logprobs", -1),
    (COMPLETION, "logprobs", True),
    (COMPLETION, "best_of", 2),
    (COMPLETION, "suffix", "x"),
    (COMPLETION, "presence_penalty", 2.1),
    (COMPLETION, "repetition_penalty", 0),
    (COMPLETION, "min_p", 1.1),
    (COMPLETION, "min_tokens", -1),
    (COMPLETION, "stop_token_ids", ["1"]),
    (COMPLETION, "logit_bias", {"a": 1}),
    (COMPLETION, "logit_bias", {"\u0663": 1}),  # a 3 to Python
    (COMPLETION, "logit_bias", {"1": 101}),
    (COMPLETION, "logit_bias", {"1": "5"}),
    (COMPLETION, "logit_bias", [1]),
    (COMPLETION, "max_token", 5),  # a slip of the pen
    (CHAT, "logprobs", 1),
    (CHAT, "top_logprobs", 21),
    (CHAT, "tools", [{"type": "function"}]),
    (CHAT, "tool_choice", "required"),
    (CHAT, "response_format", {"type": "xml"}),
    (CHAT, "response_format", {"type": "json_schema"}),
    (CHAT, "response_format", {"type": "json_object", "json_schema": {"name": "a", "schema": {}}}),
    (COMPLETION, "response_format", {"type": "json_schema", "json_schema": {"name": "a"}}),
    (COMPLETION, "response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": True}}),
    (CHAT, "frequency_penalty", -2.1),
    (CHAT, "echo", True),
    (CHAT, "reasoning_effort", "low"),
    # out of range, or of the wrong type
    (COMPLETION, "prompt", None),
    (COMPLETION, "prompt", []),
    (COMPLETION, "prompt", 5),
    (COMPLETION, "prompt", ["a", 1]),
    (COMPLETION, "prompt", [True]),
    (COMPLETION, "prompt", "\ud800"),
    (COMPLETION, "prompt", [[1, "a"]]),
    (COMPLETION, "temperature", -0.1),
    (COMPLETION, "temperature", 2.1),
    (COMPLETION, "temperature", float("nan")),
    (COMPLETION, "temperature", "1"),
    (COMPLETION, "top_p", 0),
    (COMPLETION, "top_k", -1),
    (COMPLETION, "max_tokens", -1),
    (CHAT, "max_tokens", 0),
    (COMPLETION, "max_tokens", True),
    (COMPLETION, "n", 0),
    (COMPLETION, "n", 17),
    (COMPLETION, "seed", 2**63),
    (COMPLETION, "stop", ""),
    (COMPLETION, "stop", ["a"] * 5),
    (COMPLETION, "stream", "yes"),
    (CHAT, "messages", []),
    (CHAT, "messages", [{"role": "user", "content": "\udc00"}]),
    (CHAT, "messages", [{"role": "tool", "content": "x"}]),
    (CHAT, "messages", [{"role": "user"}]),
    (CHAT, "messages", [{"role": "user", "content": "x", "name": "Ann"}]),
    (CHAT, "messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
]


@pytest.mark.parametrize(("base", "field", "value"), REFUSED)
def test_the_refused_field_is_named(base: dict[str, Any], field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        (CompletionBody if base is COMPLETION else ChatBody).model_validate(base | {field: value})
    assert caught.value.errors()[0]["loc"][0] == field


def test_stream_options_need_a_stream() -> None:
    with pytest.raises(ValidationError, match="only allowed with stream"):
        ChatBody.model_validate(CHAT | {"stream_options": {"include_usage": True}})


def test_top_logprobs_need_logprobs() -> None:
    with pytest.raises(ValidationError, match="only allowed with logprobs=true"):
        ChatBody.model_validate(CHAT | {"top_logprobs": 3})


def test_message_parts_and_roles() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = ChatBody.model_validate({"model": "m", "messages": [{"role": "developer", "content": parts}]})
    assert body.messages[0].for_template() == {"role": "system", "content": "a\nb"}


def test_max_tokens_defaults() -> None:
    completion, chat = CompletionBody.model_validate, ChatBody.model_validate
    assert completion(COMPLETION).max_tokens_for(100) == 16
    assert completion(COMPLETION).max_tokens_for(5) == 5
    assert completion(COMPLETION | {"max_tokens": 50}).max_tokens_for(5) == 50
    assert chat(CHAT).max_tokens_for(100) == 100
    assert chat(CHAT | {"max_tokens": 7}).max_tokens_for(100) == 7
    assert chat(CHAT | {"max_tokens": 7, "max_completion_tokens": 3}).max_tokens_for(100) == 3


def test_choices_differ_by_seed() -> None:
    body = CompletionBody.model_validate(COMPLETION | {"n": 3, "seed": 5, "top_k": 2})
    assert [(one.seed, one.top_k, one.max_tokens) for one in body.samplings(9)] == [(5, 2, 9), (6, 2, 9), (7, 2, 9)]
    assert CompletionBody.model_validate(COMPLETION | {"n": 2}).samplings(1)[1].seed is None


def test_error_body() -> None:
    error = ApiError(404, "gone", param="model", code="model_not_found").body()["error"]
    assert error == {
        "message": "gone",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert ApiError(503, "down").body()["error"]["type"] == "server_error"
