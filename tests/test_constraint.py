"""Answers that must be JSON of a schema are, whatever the model would say; the mask is what a plain search finds."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest
from fake_engine import END, byte_tokenizer
from serving import steps_to_the_end
from test_engine import drive
from tiny import tiny_model

from expertmesh.launch.openai_api import ChatBody
from expertmesh.parallel.dispatchers import LocalDispatcher
from expertmesh.parallel.timeline import Turns
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import initialise
from expertmesh.system.serve import constraint
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.constraint import Constraints
from expertmesh.system.serve.draft import build_drafter
from expertmesh.system.serve.engine import Engine
from expertmesh.system.serve.request import Request, Sampling

TOKENIZER = byte_tokenizer()
TEXTS = {  # schema, and all texts of it
    "an enum": ({"enum": ["ab", "ac", 12, None]}, ['"ab"', '"ac"', "12", "null"]),
    "a boolean": ({"type": "boolean"}, ["true", "false"]),
    "an object": (
        {"type": "object", "properties": {"é": {"enum": [1, 2]}}, "required": ["é"], "additionalProperties": False},
        ['{"é": 1}', '{"é": 2}'],
    ),
    "a list": ({"type": "array", "items": {"const": 5}, "minItems": 1, "maxItems": 3}, ["[5]", "[5, 5]", "[5, 5, 5]"]),
}


@pytest.mark.parametrize("case", TEXTS)
def test_the_mask_is_what_may_follow(case):
    """After every beginning of every text; a text that is whole may only end."""
    schema, texts = TEXTS[case]
    spelled = [[*TOKENIZER.encode(text), END] for text in texts]
    constraints = Constraints(TOKENIZER)
    for number, text in enumerate(spelled):
        for place in range(len(text)):
            allowed_V = constraints.allowed(str(number), json.dumps(schema), text[:place])
            following = {other[place] for other in spelled if other[:place] == text[:place] and len(other) > place}
            assert allowed_V is not None and set(allowed_V.nonzero()[:, 0].tolist()) == following


def test_drafts_are_walked_by_a_copy():
    schema, _ = TEXTS["an enum"]
    constraints, text = Constraints(TOKENIZER), TOKENIZER.encode('"ab"')
    after_draft_V = constraints.allowed("x", json.dumps(schema), text[:1], text[1:3])
    assert after_draft_V is not None and after_draft_V.nonzero()[:, 0].tolist() == [text[3]]
    assert constraints.allowed("x", json.dumps(schema), text[:1], [text[1], text[0]]) is None
    first_V = constraints.allowed("x", json.dumps(schema), text[:1])
    assert first_V is not None and first_V.nonzero()[:, 0].tolist() == [text[1]]
    constraints.forget("x")
    start_V = constraints.allowed("x", json.dumps(schema), [])
    assert start_V is not None and start_V.sum() == 3


@pytest.mark.parametrize("schema", ['{"type": "nonsense"}', '{"enum": []}'])
def test_refused(schema):
    with pytest.raises(ValueError) as error:
        Constraints(TOKENIZER).check(schema)
    assert "\n" not in str(error.value)


MODEL = tiny_model(vocab_size=TOKENIZER.vocab_size + 3, context_length=96)  # more logits than tokens
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "kind": {"enum": ["router", "expert"]},
            "on": {"type": "boolean"},
            "loads": {"type": "array", "items": {"enum": [1, 22]}, "maxItems": 4},
        },
        "required": ["kind", "on", "loads"],
        "additionalProperties": False,
    }
)
ASKED = [
    Sampling(max_tokens=80, temperature=0, json_schema=SCHEMA),
    Sampling(max_tokens=80, temperature=9, seed=3, json_schema=SCHEMA),
    Sampling(max_tokens=80, seed=4, top_k=2, repetition_penalty=1.3, json_schema=SCHEMA),
    Sampling(max_tokens=80, temperature=9, seed=5, min_tokens=75, json_schema=SCHEMA, logit_bias={END: 100.0}),
    Sampling(max_tokens=30, seed=6),  # no schema, in the same company
]


@pytest.fixture(scope="module")
def model() -> Transformer:
    made = Transformer(MODEL)
    initialise(made, seed=3, standard_deviation=0.3)
    return made.eval()


def engine_of(model: Transformer, micro_batches: int = 1, **changes: Any) -> Engine:
    config = ServeConfig(**{"max_running": 5, "page_size": 4, **changes})
    lanes = [LocalDispatcher() for _ in range(micro_batches)]
    drafter = build_drafter(config, MODEL)
    return Engine(model, {END}, config, "cpu", lanes, Turns(), None, drafter, Constraints(TOKENIZER))


def texts(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    said: dict[str, list[int]] = {request.id: [] for request in requests}
    for outputs in steps_to_the_end(engine, requests):
        for output in outputs:
            said[output.request_id].append(output.token_id)
    return said


@pytest.mark.parametrize("changes", [{}, {"micro_batches": 2}, {"drafts": "lookup"}, {"step_tokens": 7}], ids=str)
def test_answers_are_of_the_schema(model, changes):
    requests = [Request(str(place), [70, 71, 72], sampling) for place, sampling in enumerate(ASKED)]
    said = texts(engine_of(model, **changes), requests)
    assert said == texts(engine_of(model), requests)
    for place in range(4):
        *text, end = said[str(place)]
        answer = json.loads(TOKENIZER.decode(text))
        assert end == END and list(answer) == ["kind", "on", "loads"] and answer["kind"] in ("router", "expert")
    assert len({tuple(text) for text in said.values()}) >= 4, "one that always says the same proves nothing"


def test_an_answer_goes_on_in_another_engine(model):
    request = Request("x", [70, 71], ASKED[1])
    whole = drive(engine_of(model), {0: [request]})["x"].token_ids
    for cut in range(1, len(whole), 7):
        assert drive(engine_of(model), {0: [request.resumed(whole[:cut])]})["x"].token_ids == whole[cut:]


@pytest.mark.parametrize("limits", [constraint.LIMITS, llguidance.LLParserLimits()], ids=["ours", "the library's"])
def test_a_schema_that_is_too_much_ends_its_own_answer(model, monkeypatch, limits):
    """Members that may each be left out or not; the request beside it is served to its end."""
    ours = limits is constraint.LIMITS
    monkeypatch.setattr(constraint, "LIMITS", limits)
    members = {f"member {number}": {"type": "integer"} for number in range(600)}
    schema = json.dumps({"type": "object", "properties": members, "additionalProperties": False})
    large = Request("large", [70, 71], Sampling(max_tokens=60, temperature=0, json_schema=schema))
    said = texts(engine_of(model), [large, Request("other", [70], ASKED[4])])
    assert len(said["other"]) == 30
    assert (said["large"][1:] == [END]) == (not ours), "after the first brace"
    matched = Constraints(TOKENIZER)
    broken_V = matched.allowed("x", '{"type": "boolean"}', [*TOKENIZER.encode("no")])
    assert broken_V is not None and broken_V.nonzero()[:, 0].tolist() == [END]


def test_nothing_is_kept_of_requests_that_left(model):
    """Cancelled while their micro-batch is computed, and while it is not."""
    engine = engine_of(model, micro_batches=2)
    for number in range(6):
        engine.add(Request(str(number), [70, 71, number], ASKED[1]))
    for number in range(6):
        engine.step()
        engine.cancel(str(number))
    while engine.has_work:
        engine.step()
    assert engine.runner.constraints is not None and not engine.runner.constraints._walked


def test_an_engine_without_a_tokenizer_refuses(model):
    engine = Engine(model, {END}, ServeConfig(), "cpu", [LocalDispatcher()], Turns())
    with pytest.raises(ValueError, match="knows no tokenizer"):
        engine.check(Request("x", [70], ASKED[0]))


def test_a_schema_reaches_the_engine_through_the_door():
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "boolean"}, "strict": True}}
    for format, schema in ((wanted, {"type": "boolean"}), ({"type": "json_object"}, {"type": "object"})):
        body = ChatBody.model_validate(
            {"model": "m", "messages": [{"role": "user", "content": "hi"}], "response_format": format}
        )
        (sampling,) = body.samplings(9)
        assert sampling.json_schema is not None and json.loads(sampling.json_schema) == schema
