"""The OpenAI request bodies this server understands, and nothing it does not; and its errors.

A field that would change the text and is not supported here is refused by name. A field that asks for nothing (null,
or a value that means "as if absent") passes, and so do the few that are bookkeeping for OpenAI alone. The JSON schema
of a body, which the server's OpenAPI tells, says all of this.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    model_validator,
    with_config,
)
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from expertmesh.system.serve.request import Sampling

# These steer OpenAI's accounts, storage and caches, or tools that no request here can have; the text is the same.
IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "parallel_tool_calls",
}

INT64 = 2**63
DIGITS = "^[0-9]+$"
MOST_LOGPROBS = 20  # alternatives told for each token
MOST_ANSWERS = 256  # of one request: prompts times n
MOST_SCHEMA = 2**18  # characters: an engine reads a schema while others wait


class Error(TypedDict):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    """Every answer other than 200."""

    error: Error


class ApiError(Exception):
    """An answer other than 200, in OpenAI's words: `param` is the field at fault, `code` a name programs test for."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> ErrorAnswer:
        """Build the JSON body, the same whether it is the whole answer or the last event of a stream."""
        kind: Literal["invalid_request_error", "server_error"]
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: Any) -> list[str | list[int]]:
    """Turn the four ways to write a prompt into a list of texts and of token id lists."""
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return [_encodable(item) for item in value]
        if all(isinstance(item, list) and all(type(token_id) is int for token_id in item) for item in value):
            return value
    raise ValueError("must be a text, a list of texts, a list of token ids or a list of token id lists, and not empty")


def _as_biases(value: Any) -> Any:
    """JSON has no numbers as keys: token ids come as texts."""
    if not isinstance(value, dict):
        return value
    if not all(isinstance(key, int) or (isinstance(key, str) and re.fullmatch(DIGITS, key)) for key in value):
        raise ValueError("keys must be token ids")
    return {int(key): bias for key, bias in value.items()}


def _encodable(text: str) -> str:
    """Refuse the halves of characters that JSON can spell (a lone \\ud83d) but no encoding can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"is no valid Unicode: {error.reason} at character {error.start}") from None
    return text


def _as_text(value: Any) -> Any:
    """Join a message's text parts by newlines, as vLLM does."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ValueError('only text parts are supported: {"type": "text", "text": "..."}')
    return "\n".join(part["text"] for part in value)


def _tell_what_passes(schema: dict[str, Any], body: type[_Body]) -> None:
    """Add to a body's JSON schema what it drops: null where a field may be absent, fields that change nothing."""
    fields, null = schema["properties"], {"type": "null"}
    for name in fields.keys() - set(schema.get("required", ())):
        if null not in fields[name].get("anyOf", ()):
            fields[name] = {"anyOf": [fields[name], null]}
    fields |= {name: {"enum": [*values, None]} for name, values in body.without_effect.items()}
    fields |= {name: {"description": "not looked at"} for name in sorted(body.ignored)}


class _Body(BaseModel):
    """A JSON object that refuses fields it does not know; null means absent."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_tell_what_passes)
    # Values with which a field, otherwise unsupported, changes nothing; and fields that never do.
    without_effect: ClassVar[dict[str, tuple[Any, ...]]] = {}
    ignored: ClassVar[set[str]] = set()

    @model_validator(mode="before")
    @classmethod
    def _drop_without_effect(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None and value not in cls.without_effect.get(name, ()) and name not in cls.ignored
        }


class StreamOptions(_Body):
    """include_usage: one more event before the end, with the token counts."""

    include_usage: bool = False
    without_effect: ClassVar = {"include_obfuscation": (False,)}


class Schema(_Body):
    """What an answer must be JSON of; `strict` or not, it is."""

    name: str = "answer"
    description: str = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = True


class ResponseFormat(_Body):
    """How the answer is written."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type=json_schema")
        if len(self.schema_text or "") > MOST_SCHEMA:
            raise ValueError(f"a schema may have {MOST_SCHEMA} characters")
        return self

    @property
    def schema_text(self) -> str | None:
        """JSON; None: any text."""
        if self.type == "text":
            return None
        return json.dumps({"type": "object"} if self.json_schema is None else self.json_schema.schema_)


_Stop = Annotated[str, Field(min_length=1)]
_Stops = Annotated[list[_Stop], Field(max_length=4)]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Biases = Annotated[
    dict[Annotated[str, Field(pattern=DIGITS)], _Bias], Field(json_schema_extra={"additionalProperties": False})
]


class GenerationBody(_Body):
    """What completions and chat have in common. `stop` is always a list here."""

    ignored: ClassVar = IGNORED
    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    n: int = Field(1, ge=1, le=16)
    stop: Annotated[_Stops, BeforeValidator(_as_list, json_schema_input_type=_Stop | _Stops)] = []
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    logit_bias: Annotated[dict[int, _Bias], BeforeValidator(_as_biases, json_schema_input_type=_Biases)] = {}
    stop_token_ids: list[int] = []
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _options_need_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream=true")
        if self.ignore_eos and self.json_schema is not None:
            raise ValueError("ignore_eos is not allowed with a response_format: its text has an end")
        return self

    @property
    def json_schema(self) -> str | None:
        """What the answer must be JSON of; None: it may be any text."""
        return None if self.response_format is None else self.response_format.schema_text

    @property
    def told_logprobs(self) -> int | None:
        """How many alternatives are told of each token; None: not even the token's own log-probability."""
        raise NotImplementedError

    @property
    def told_prompt(self) -> bool:
        """Whether the prompt is told, too, and its log-probabilities if any are."""
        return False

    def max_tokens_for(self, room: int) -> int:
        """Tokens to generate when the context has `room` for so many; more than `room` if the caller insists."""
        raise NotImplementedError

    def samplings(self, max_tokens: int) -> list[Sampling]:
        """One per choice; choice i takes seed + i, or all choices would be the same text."""
        return [
            Sampling(
                max_tokens=max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                seed=None if self.seed is None else self.seed + choice,
                ignore_eos=self.ignore_eos,
                min_tokens=self.min_tokens,
                min_p=self.min_p,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                repetition_penalty=self.repetition_penalty,
                logit_bias=self.logit_bias,
                stop_token_ids=frozenset(self.stop_token_ids),
                json_schema=self.json_schema,
                logprobs=self.told_logprobs,
                prompt_logprobs=self.told_logprobs if self.told_prompt else None,
            )
            for choice in range(self.n)
        ]


_Several = Field(min_length=1)
_Prompt = str | Annotated[list[str], _Several] | Annotated[list[int], _Several] | Annotated[list[list[int]], _Several]


class CompletionBody(GenerationBody):
    """POST /v1/completions. `prompt` is always a list here, of texts and of token id lists."""

    prompt: Annotated[list[str | list[int]], PlainValidator(_as_prompts, json_schema_input_type=_Prompt)]
    max_tokens: int | None = Field(None, ge=0)  # 0: with echo, the prompt alone
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    without_effect: ClassVar = {"best_of": (1,), "suffix": ("",)}

    @property
    def told_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def told_prompt(self) -> bool:
        return self.echo

    def max_tokens_for(self, room: int) -> int:
        """OpenAI's default of 16, or the room if that is less."""
        return min(16, room) if self.max_tokens is None else self.max_tokens


@with_config(extra="ignore")
class TextPart(TypedDict):
    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn of a chat; `developer` is OpenAI's newer name for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str, BeforeValidator(_as_text, json_schema_input_type=str | list[TextPart]), AfterValidator(_encodable)
    ]

    def for_template(self) -> dict[str, str]:
        """Give the form chat templates are written for."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_LOGPROBS)
    without_effect: ClassVar = {
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
    }

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed with logprobs=true")
        return self

    @property
    def told_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def max_tokens_for(self, room: int) -> int:
        """max_completion_tokens, or its older name, or all the room."""
        return self.max_completion_tokens or self.max_tokens or room
