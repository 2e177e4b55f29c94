"""Guessing ahead changes how many passes a text takes, and never the text."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from serving import steps_to_the_end
from test_engine import Answer, alone, engine_of, prompt
from tiny import context_of, tiny_model

from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import initialise
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.draft import build_drafter, look_up
from expertmesh.system.serve.engine import Engine
from expertmesh.system.serve.request import Request, Sampling
from expertmesh.system.serve.runner import accept
from expertmesh.system.serve.sampler import Drawn

NESTED = tiny_model(
    vocab_size=64, context_length=24, moe={"ffn_experts": 4, "expert": {"hidden_size": 32, "nested": [0.25, 0.5, 1]}}
)
PLAIN = tiny_model(vocab_size=64, context_length=24)
DENSE_NESTED = tiny_model(
    vocab_size=64,
    moe={"gating_residual": False},
    dense_layers=[0, 1, 2],
    dense={"hidden_size": 32, "nested": [0.5, 1]},
)

LOOKED_UP: list[tuple[str, list[int], int, list[int]]] = [
    ("nothing", [], 4, []),
    ("one token", [5], 4, []),
    ("two tokens have nothing before them", [5, 6], 4, []),
    ("one equal token is no reason", [5, 6, 5], 4, []),
    ("two are", [5, 6, 7, 5, 6], 2, [7, 5]),
    ("no more than asked for", [5, 6, 7, 8, 5, 6], 1, [7]),
    ("none asked for", [5, 6, 7, 8, 5, 6], 0, []),
    ("the text ends before as many were found", [5, 6, 7, 5, 6], 7, [7, 5, 6, 7, 5, 6, 7]),
    ("one token over and over: it overlaps itself", [3, 3, 3, 3], 4, [3, 3, 3, 3]),
    ("the last place counts", [5, 6, 1, 9, 5, 6, 2, 9, 5, 6], 2, [2, 9]),
    ("a longer match counts more than a later one", [1, 5, 6, 4, 9, 2, 5, 6, 8, 1, 5, 6], 1, [4]),
    ("bytes of two neighbours look like the tokens", [1, 0, 9, 256, 0, 7, 1, 0], 2, [9, 256]),
    ("only bytes do", [1 << 56, 0, 0, 3, 1, 0], 2, []),
]


@pytest.mark.parametrize("reason, text, most, expected", LOOKED_UP, ids=[row[0] for row in LOOKED_UP])
def test_look_up(reason, text, most, expected):
    assert look_up(text, most) == expected


@pytest.mark.parametrize("seed", range(20))
def test_look_up_is_what_a_plain_search_finds(seed):
    text = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
    found: list[int] = []
    for length in (4, 3, 2):
        places = [i for i in range(len(text) - length) if text[i : i + length] == text[-length:]]
        if places:
            found = (text[places[-1] + length :] * 5)[:5]
            break
    assert look_up(text, 5) == found


def test_drafts_count_as_long_as_those_before_them_were_drawn():
    drawn = [Drawn(token) for token in (4, 5, 6, 7)]
    for draft, kept in (([4, 5, 6], 4), ([4, 9, 6], 2), ([9, 5, 6], 1)):
        assert accept(drawn, draft) == drawn[:kept]
    assert accept(drawn[:1], []) == drawn[:1]


def model_of(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    initialise(model, seed=3, standard_deviation=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def models() -> dict[str, Transformer]:
    return {"lookup": model_of(PLAIN), "nested": model_of(NESTED)}


def drafting(model: Transformer, **changes: Any) -> Engine:
    config = ServeConfig(micro_batch_tokens=1, **changes)
    return engine_of(model, drafter=build_drafter(config, model.config), **changes)


def answers(engine: Engine, requests: list[Request]) -> tuple[dict[str, Answer], int]:
    """Of each request, and how many micro-batches were computed."""
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    reasons: dict[str, str | None] = {}
    steps = list(steps_to_the_end(engine, requests))
    for output in itertools.chain.from_iterable(steps):
        assert reasons.get(output.request_id) is None, "a token after the last one"
        tokens[output.request_id].append(output.token_id)
        reasons[output.request_id] = output.finish_reason
    return {name: Answer(tokens[name], reasons[name]) for name in tokens}, len(steps)


REQUESTS = [
    Request("greedy", prompt(3, 1), Sampling(max_tokens=20, temperature=0)),
    Request("a prompt that repeats itself", [1, 2, 3, 4] * 3, Sampling(max_tokens=9, temperature=0)),
    Request("drawn", prompt(4, 2), Sampling(max_tokens=17, seed=5)),
    Request("few tokens to draw from", prompt(5, 3), Sampling(max_tokens=12, seed=6, top_k=2, temperature=0.7)),
    Request("three tokens to draw from", [4, 5], Sampling(18, seed=1, logit_bias=dict.fromkeys([4, 5, 6], 50.0))),
    Request("penalties", prompt(2, 4), Sampling(max_tokens=15, temperature=0, repetition_penalty=1.3)),
    Request("to the end of the context", prompt(9, 5), Sampling(max_tokens=99, temperature=0)),
    Request("one token", prompt(6, 6), Sampling(max_tokens=1, temperature=0)),
]
WAYS: list[tuple[dict[str, Any], str]] = [
    ({"max_running": 1}, "one at a time"),
    ({"max_running": 7, "micro_batches": 3}, "three micro-batches"),
    ({"max_running": 7, "step_tokens": 6}, "drafts and prompts share few tokens"),
    ({"max_running": 7, "page_size": 1}, "pages of one token"),
    ({"max_running": 7, "cache_tokens": 28}, "few pages: drafts get what is left"),
    ({"max_running": 7, "draft_tokens": 1}, "one token ahead"),
    ({"max_running": 7, "draft_tokens": 16}, "more than the text has room for"),
]


@pytest.mark.parametrize("drafts", ["lookup", "nested"])
@pytest.mark.parametrize("way, reason", WAYS, ids=[reason for _, reason in WAYS])
def test_the_text_is_what_it_is_without_drafts(models, drafts, way, reason):
    engine = drafting(models[drafts], drafts=drafts, **way)
    said, _ = answers(engine, REQUESTS)
    assert said == {request.id: alone(models[drafts], request) for request in REQUESTS}
    counts = engine.counts()
    assert 0 < counts.accepted_tokens < counts.drafted_tokens, "some are right and some are wrong"


def test_an_answer_that_ends_within_the_drafts_ends_there(models):
    """Each token of the answer once as the one that ends it."""
    model, prompt_token_ids = models["nested"], REQUESTS[0].prompt_token_ids
    text = alone(model, REQUESTS[0]).token_ids
    for end in sorted(set(text)):
        request = Request("x", prompt_token_ids, Sampling(20, temperature=0, stop_token_ids=frozenset([end])))
        said, _ = answers(drafting(model, drafts="nested"), [request])
        assert said["x"] == Answer(text[: text.index(end) + 1], "stop")


def test_right_drafts_save_passes(models):
    """A greedy text that runs in a circle."""
    request = Request("x", [1, 2, 3], Sampling(max_tokens=20, temperature=0, logit_bias={9: 100.0}))
    said, without = answers(engine_of(models["lookup"]), [request])
    again, steps = answers(drafting(models["lookup"], drafts="lookup"), [request])
    assert said == again == {"x": Answer([9] * 20, "length")}
    assert without == 20
    assert steps == 3 + 4, "three nines one by one, then five a pass and the rest"
    counts = drafting(models["lookup"]).counts()
    assert counts.drafted_tokens == counts.accepted_tokens == 0


@pytest.mark.parametrize("drafts", ["lookup", "nested"])
def test_drawn_texts_are_distributed_as_the_model_says(models, drafts):
    """Pearson's chi-square over texts of three tokens, each of two, for seeds that nobody chose."""
    model, start, times = models[drafts], [1, 2, 1, 2, 1, 2], 1500
    chances = _chances(model, start)
    sampling = Sampling(max_tokens=3, logit_bias=dict.fromkeys([1, 2], 500.0))
    requests = [Request(str(i), start, sampling) for i in range(times)]
    engine = drafting(model, drafts=drafts, max_running=64, step_tokens=512)
    said, _ = answers(engine, requests)
    assert engine.counts().accepted_tokens > 0
    seen = Counter(tuple(answer.token_ids) for answer in said.values())
    assert set(seen) <= set(chances)
    surprise = sum((seen[text] - times * chance) ** 2 / (times * chance) for text, chance in chances.items())
    freedom = len(chances) - 1
    assert surprise < freedom + 5 * (2 * freedom) ** 0.5


@torch.inference_mode()
def _chances(model: Transformer, start: list[int]) -> dict[tuple[int, ...], float]:
    """Of every text of three tokens that can follow."""
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for text, chance in chances.items():
            tokens = [*start, *text]
            hidden_TD, _ = model(torch.tensor(tokens), context_of(len(tokens)))
            shares = model.lm_head(hidden_TD[-1])[1:3].softmax(0).tolist()
            for token, share in zip((1, 2), shares, strict=True):
                longer[*text, token] = chance * share
        chances = longer
    return chances


REFUSED = [
    ({"drafts": "nested"}, PLAIN, "serve.drafts=nested: no network of this model is nested"),
    ({"drafts": "nested", "draft_width": 0.3}, NESTED, "serve.draft_width=0.3: the model was trained for 0.25, 0.5"),
]


@pytest.mark.parametrize("changes, model, line", REFUSED, ids=[row[2] for row in REFUSED])
def test_refused(changes, model, line):
    with pytest.raises(ValueError) as error:
        build_drafter(ServeConfig(**changes), model)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_dense_networks_draft_too():
    assert build_drafter(ServeConfig(drafts="nested"), DENSE_NESTED) == (4, 0.5)
