"""Continuous batching changes nothing: every request gets the text that it would get alone, without a cache."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from tiny import context_of, tiny_model

from expertmesh.parallel.dispatchers import LocalDispatcher
from expertmesh.parallel.timeline import Turns
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import initialise
from expertmesh.system.serve import sampler
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.draft import NO_DRAFTS, Drafter, Nested
from expertmesh.system.serve.engine import Engine
from expertmesh.system.serve.request import Failure, Output, Request, Sampling
from expertmesh.system.serve.sampler import Place, draw, sample

CONFIG = tiny_model(vocab_size=64, context_length=24)


@pytest.fixture(scope="module")
def model() -> Transformer:
    made = Transformer(CONFIG)
    initialise(made, seed=3, standard_deviation=0.3)  # wide enough to say different things
    return made.eval()


class Answer(NamedTuple):
    token_ids: list[int]
    finish_reason: str | None


@torch.inference_mode()
def alone(model: Transformer, request: Request, eos_ids: Collection[int] = ()) -> Answer:
    """The definition: the whole sequence again for each token."""
    token_ids, sampling = list(request.prompt_token_ids), request.sampling
    answer: list[int] = []
    while True:
        length = len(token_ids)
        hidden_TD, _ = model(torch.tensor(token_ids), context_of(length))
        place = Place(sampling, sampling.seed or 0, token_ids, len(request.prompt_token_ids))
        answer.append(sample(model.lm_head(hidden_TD[-1:]), [place])[0].token_id)
        token_ids.append(answer[-1])
        if answer[-1] in eos_ids and not sampling.ignore_eos:
            return Answer(answer, "stop")
        if len(answer) == sampling.max_tokens or len(token_ids) == CONFIG.context_length:
            return Answer(answer, "length")


def engine_of(
    model: Transformer,
    running: int = 3,
    micro_batches: int = 1,
    eos_ids: Collection[int] = (),
    drafter: Drafter = NO_DRAFTS,
    **changes: Any,
) -> Engine:
    config = ServeConfig(**{"max_running": running, "page_size": 4, "micro_batch_tokens": 1, **changes})
    lanes = [LocalDispatcher() for _ in range(micro_batches)]
    return Engine(model, eos_ids, config, "cpu", lanes, Turns(), drafter=drafter)


def drive(
    engine: Engine, arrivals: dict[int, list[Request]], cancels: dict[int, str] | None = None
) -> dict[str, Answer]:
    """Step until all is done; `arrivals` and `cancels` say what comes before which step."""
    tokens: dict[str, list[int]] = defaultdict(list)
    reasons: dict[str, str | None] = {}
    step = 0
    while engine.has_work or step <= max([*arrivals, *(cancels or {})]):
        for request in arrivals.get(step, []):
            engine.add(request)
        if cancels and step in cancels:
            engine.cancel(cancels[step])
        outputs = engine.step()
        counts = engine.counts()
        assert len({output.request_id for output in outputs}) == len(outputs) <= engine.scheduler.max_running
        assert counts.running <= engine.scheduler.max_running
        for output in outputs:
            assert reasons.get(output.request_id) is None, "a token after the last one"
            tokens[output.request_id].append(output.token_id)
            reasons[output.request_id] = output.finish_reason
        step += 1
        assert step < 1000, "it does not end"
    assert engine.step() == []
    assert engine.counts().pages_used == 0, "a page was lost"
    return {name: Answer(tokens[name], reasons[name]) for name in tokens}


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def mixed_requests() -> dict[int, list[Request]]:
    """Ten requests of different lengths over twelve steps; some are drawn, most are greedy."""
    greedy = Sampling(max_tokens=7, temperature=0)
    return {
        0: [Request("a", prompt(1, 1), greedy), Request("b", prompt(5, 2), greedy)],
        1: [Request("c", prompt(12, 3), Sampling(max_tokens=3, temperature=0))],
        2: [
            Request("d", prompt(2, 4), Sampling(max_tokens=9, temperature=1.0, seed=5)),
            Request("e", prompt(9, 5), greedy),
            Request("f", prompt(3, 6), Sampling(max_tokens=1, temperature=0)),
        ],
        5: [Request("g", prompt(23, 7), greedy), Request("h", prompt(18, 8), Sampling(max_tokens=99, temperature=0))],
        11: [
            Request("i", prompt(4, 9), Sampling(max_tokens=6, temperature=0.7, top_p=0.8, top_k=9, seed=6)),
            Request("j", prompt(6, 10), greedy),
        ],
    }


WAYS = [
    ({"running": 1}, "one at a time"),
    ({"running": 3}, "fewer places than requests"),
    ({"running": 3, "micro_batches": 2}, "two micro-batches"),
    ({"running": 10, "micro_batches": 3}, "room for all, three micro-batches"),
    ({"running": 4, "micro_batches": 4}, "a micro-batch each"),
    ({"running": 10, "step_tokens": 5}, "prompts in bites"),
    ({"running": 10, "step_tokens": 1}, "one token at a time"),
    ({"running": 10, "micro_batches": 3, "step_tokens": 12}, "prompts in bites, three micro-batches"),
    ({"running": 10, "page_size": 1}, "pages of one token"),
    ({"running": 10, "page_size": 24}, "pages of the whole context"),
    ({"running": 10, "prefix_cache": False}, "no prefix cache"),
    ({"running": 10, "cache_tokens": 24}, "pages for the longest request and no more"),
    (
        {"running": 10, "cache_tokens": 40, "page_size": 2, "micro_batches": 3, "step_tokens": 9},
        "few pages, all at once",
    ),
    ({"running": 10, "cache_tokens": 40, "prefix_cache": False}, "few pages, nothing found again"),
]


@pytest.fixture(scope="module")
def alone_answers(model) -> dict[str, Answer]:
    return {request.id: alone(model, request) for batch in mixed_requests().values() for request in batch}


@pytest.mark.parametrize("way, reason", WAYS, ids=[reason for _, reason in WAYS])
def test_text_does_not_depend_on_company(model, alone_answers, way, reason):
    engine = engine_of(model, **way)
    assert drive(engine, mixed_requests()) == alone_answers
    if way.get("micro_batches", 1) == 1:  # else it depends on who is faster
        assert (engine.counts().preemptions > 0) == reason.startswith("few pages"), "so few that they are fought for"
    said = {tuple(answer.token_ids[:3]) for answer in alone_answers.values()}
    assert len(said) > len(alone_answers) // 2, "a model that always says the same proves nothing"


RESUMED = [
    Sampling(max_tokens=8, temperature=0),
    Sampling(max_tokens=8, seed=4, top_k=5),
    Sampling(max_tokens=8, seed=4, repetition_penalty=1.5, frequency_penalty=1.0, min_tokens=4),
    Sampling(max_tokens=99, temperature=0, logprobs=2),
]


@pytest.mark.parametrize("sampling", RESUMED, ids=["greedy", "drawn", "penalties", "to the end of the context"])
def test_a_request_cut_after_any_token_goes_on_in_another_engine(model, sampling):
    request = Request("x", prompt(14, 3), sampling)
    end = frozenset({request.prompt_token_ids[0]})
    whole = drive(engine_of(model, eos_ids=end), {0: [request]})["x"]
    for cut in range(1, len(whole.token_ids)):
        rest = drive(engine_of(model, eos_ids=end), {0: [request.resumed(whole.token_ids[:cut])]})["x"]
        assert rest == Answer(whole.token_ids[cut:], whole.finish_reason)


def test_equal_beginnings_are_computed_once(model):
    """The whole prompt, its beginning, the prompt and more; the second time all of it is found."""
    greedy = Sampling(max_tokens=5, temperature=0)
    long = prompt(16, 3)
    prompts = {"all": long, "most": long[:11], "more": [*long, 7], "other": prompt(16, 4), "again": list(long)}
    wanted = {name: alone(model, Request(name, token_ids, greedy)) for name, token_ids in prompts.items()}
    for micro_batches in (1, 3):
        engine = engine_of(model, 5, micro_batches)
        for time in ("first", "second"):
            requests = [Request(name, token_ids, greedy) for name, token_ids in prompts.items()]
            assert drive(engine, {0: requests}) == wanted, time
        counts, total = engine.counts(), sum(map(len, prompts.values()))
        # First: all of "all" and "other"; the rest of three others. Then whole pages, but one token of each at least.
        first = 8 + 16 + 15
        assert counts.prompt_tokens == 2 * total and counts.reused_tokens == first + 15 + 8 + 16 + 15 + 15
        if micro_batches == 1:
            reused = drive_outputs(engine, [Request("all", long, greedy)])[0].reused_tokens
            assert reused == 15, "the last token must be computed, into a copy of its page"


def drive_outputs(engine: Engine, requests: list[Request]) -> list[Output]:
    for request in requests:
        engine.add(request)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def test_logprobs_are_those_of_the_whole_sequence(model):
    """Of the answer and, in bites and without the cache's help, of the prompt."""
    asked = Sampling(max_tokens=3, temperature=0, logprobs=2, prompt_logprobs=1)
    request = Request("a", prompt(10, 3), asked)
    with torch.inference_mode():
        token_ids = [*request.prompt_token_ids, *alone(model, request).token_ids]
        hidden_TD, _ = model(torch.tensor(token_ids), context_of(len(token_ids)))
        logprobs_TV = model.lm_head(hidden_TD).double().log_softmax(-1)
    engine = engine_of(model, step_tokens=4)
    for _ in range(2):
        outputs = drive_outputs(engine, [request])
        assert outputs[0].prompt_logprobs is not None and len(outputs[0].prompt_logprobs) == 9
        told = [*outputs[0].prompt_logprobs, *(output.logprobs for output in outputs)]
        for place, one in enumerate(told):
            row_V = logprobs_TV[place]
            assert one.token.token_id == token_ids[place + 1]
            assert one.token.logprob == pytest.approx(float(row_V[token_ids[place + 1]]), abs=1e-4)
            best = row_V.topk(1 if place < 9 else 2)
            assert [t.token_id for t in one.top] == best.indices.tolist()
            assert [t.logprob for t in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert all(output.prompt_logprobs is None for output in outputs[1:])
    assert not engine._told


def test_stop_tokens_and_min_tokens(model):
    request = Request("a", prompt(5, 2), Sampling(max_tokens=12, temperature=0))
    spoken = alone(model, request).token_ids
    stop = next(token for token in spoken if spoken.index(token) >= 3)
    until = spoken.index(stop) + 1
    one = Sampling(max_tokens=12, temperature=0, stop_token_ids=frozenset([stop]), ignore_eos=True)
    answers = drive(engine_of(model, eos_ids=[spoken[0]]), {0: [Request("a", request.prompt_token_ids, one)]})
    assert answers["a"] == Answer(spoken[:until], "stop")
    late = Sampling(max_tokens=12, temperature=0, min_tokens=until + 1)
    answer = drive(engine_of(model, eos_ids=[stop]), {0: [Request("a", request.prompt_token_ids, late)]})["a"]
    assert len(answer.token_ids) > until and stop not in answer.token_ids[:until]
    assert answer.token_ids[: until - 1] == spoken[: until - 1]


def test_a_model_without_ffn_experts():
    config = tiny_model(vocab_size=64, context_length=24, layers=2, moe={"gate_mode": "released", "ffn_experts": 0})
    other = Transformer(config)
    initialise(other, seed=3, standard_deviation=0.3)
    request = Request("a", prompt(4, 1), Sampling(max_tokens=6, temperature=0))
    assert drive(engine_of(other.eval()), {0: [request]}) == {"a": alone(other, request)}


LIMITS = [
    (5, Sampling(max_tokens=4, temperature=0), 4, "max_tokens"),
    (5, Sampling(max_tokens=1, temperature=0), 1, "one token"),
    (20, Sampling(max_tokens=99, temperature=0), 4, "the context is full"),
    (23, Sampling(max_tokens=99, temperature=0), 1, "room for one token"),
    (20, Sampling(max_tokens=4, temperature=0), 4, "both at once"),
]


@pytest.mark.parametrize("length, sampling, tokens, reason", LIMITS, ids=[reason for *_, reason in LIMITS])
def test_length_limits(model, length, sampling, tokens, reason):
    answers = drive(engine_of(model), {0: [Request("a", prompt(length, 1), sampling)]})
    assert len(answers["a"].token_ids) == tokens and answers["a"].finish_reason == "length"


def test_end_of_text_stops(model):
    request = Request("a", prompt(5, 2), Sampling(max_tokens=12, temperature=0))
    spoken = alone(model, request).token_ids
    eos = next(token for token in spoken if spoken.index(token) >= 3)
    until = spoken.index(eos) + 1
    beside = Request("b", prompt(7, 3), Sampling(max_tokens=12, temperature=0, ignore_eos=True))
    answers = drive(engine_of(model, eos_ids=[eos, 63]), {0: [request, beside]})
    assert answers["a"] == Answer(spoken[:until], "stop")  # the end-of-text token itself is the last output
    assert answers["b"] == alone(model, beside)
    deaf = Request("a", request.prompt_token_ids, Sampling(max_tokens=12, temperature=0, ignore_eos=True))
    assert drive(engine_of(model, eos_ids=[eos]), {0: [deaf]})["a"] == Answer(spoken, "length")
    last = Request("a", request.prompt_token_ids, Sampling(max_tokens=until, temperature=0))
    assert drive(engine_of(model, eos_ids=[eos]), {0: [last]})["a"].finish_reason == "stop"


def test_end_of_text_in_the_prompt_does_not_stop(model):
    request = Request("a", [9, 9, 9], Sampling(max_tokens=3, temperature=0))
    assert drive(engine_of(model, eos_ids=[9]), {0: [request]})["a"] == alone(model, request, [9])


CANCELS = [
    ({3: "b"}, {"b"}, "while it runs: its place goes to the next"),
    ({1: "e"}, set(), "one that has not come yet: it comes all the same"),
    ({2: "f"}, {"f"}, "while it waits: it never runs"),
    ({0: "nobody"}, set(), "an unknown id"),
    ({9: "a"}, set(), "one that has ended"),
]


@pytest.mark.parametrize("cancels, gone, reason", CANCELS, ids=[reason for *_, reason in CANCELS])
def test_cancelled_requests_stop_and_leave_the_others_alone(model, cancels, gone, reason):
    arrivals = mixed_requests()
    expected = {r.id: alone(model, r) for batch in arrivals.values() for r in batch}
    answers = drive(engine_of(model, running=2), arrivals, cancels)
    for name, answer in expected.items():
        if name not in gone:
            assert answers[name] == answer
        else:
            stopped = answers.get(name, Answer([], None))
            assert stopped.finish_reason is None and len(stopped.token_ids) < len(answer.token_ids)
            assert stopped.token_ids == answer.token_ids[: len(stopped.token_ids)]


def test_a_cancelled_place_is_free_at_once(model):
    engine = engine_of(model, running=1)
    long, next_one = (Request(name, prompt(3, 1), Sampling(max_tokens=9, temperature=0)) for name in "ab")
    engine.add(long)
    engine.add(next_one)
    assert [output.request_id for output in engine.step()] == ["a"]
    engine.cancel("a")
    assert engine.step() == [Output("b", alone(model, next_one).token_ids[0])]


@pytest.mark.parametrize(("micro_batches", "drafter"), [(1, NO_DRAFTS), (2, NO_DRAFTS), (1, Nested(3, 1.0))])
def test_a_request_that_cannot_be_drawn_ends_alone(model, monkeypatch, micro_batches, drafter):
    """Its answer is told up to there; all others are as without it, and its pages are free."""

    def raising(logits_V: torch.Tensor, place: Place) -> int:
        if place.seed == 13 and len(place.token_ids) >= 8:
            raise ZeroDivisionError("of its own\nmaking")
        return draw(logits_V, place)

    drawn = Sampling(max_tokens=9, temperature=1.0, seed=13)
    others = [
        Request("a", prompt(3, 1), Sampling(9, temperature=0)),
        Request("c", prompt(5, 2), replace(drawn, seed=5)),
    ]
    bad = Request("b", prompt(5, 2), drawn)
    want = {request.id: alone(model, request) for request in [*others, bad]}
    monkeypatch.setattr(sampler, "draw", raising)
    engine = engine_of(model, micro_batches=micro_batches, drafter=drafter)
    said = drive_outputs(engine, [others[0], bad, others[1]])
    for request in others:
        mine = [output for output in said if output.request_id == request.id]
        assert Answer([output.token_id for output in mine], mine[-1].finish_reason) == want[request.id]
    *told, last = [output for output in said if output.request_id == "b"]
    assert [output.token_id for output in told] == want["b"].token_ids[:3]
    assert last == Failure("b", "ZeroDivisionError: of its own making")
    assert engine.counts().pages_used == 0


def test_seeds(model):
    def drawn(name: str, seed: int | None) -> Request:
        return Request(name, prompt(4, 1), Sampling(max_tokens=12, temperature=1.5, seed=seed))

    same = drive(engine_of(model), {0: [drawn("a", 5), drawn("b", 5), drawn("c", 6)], 4: [drawn("d", 5)]})
    assert same["a"] == same["b"] == same["d"] == alone(model, drawn("a", 5)) != same["c"]
    unseeded = drive(engine_of(model), {0: [drawn(name, None) for name in "abc"]})
    assert len({tuple(answer.token_ids) for answer in unseeded.values()}) == 3
    assert drive(engine_of(model), {0: [drawn("a", 0)]})["a"] == alone(model, drawn("a", 0))  # 0 is a seed too


@pytest.mark.parametrize("length", [0, 24, 30], ids=["empty", "no room for an answer", "longer than the context"])
def test_prompts_that_do_not_fit_are_refused(model, length):
    engine = engine_of(model)
    with pytest.raises(ValueError, match=f"the prompt has {length} tokens; it must have at least 1 and at most 23"):
        engine.add(Request("a", [1] * length))
    assert not engine.has_work


def test_requests_run_in_the_order_they_came(model):
    requests = [Request(name, prompt(3, 1), Sampling(max_tokens=2, temperature=0)) for name in "abcde"]
    engine, order = engine_of(model, running=2), []
    for request in requests:
        engine.add(request)
    while engine.has_work:
        order.append("".join(output.request_id for output in engine.step()))
    assert order == ["ab", "ab", "cd", "cd", "e", "e"]


@pytest.mark.parametrize("seed", range(6))
def test_page_accounts_after_any_mix(model, seed):
    """Requests that begin alike or not, few pages, cancelled at random while in flight: nothing is lost."""
    draw = random.Random(seed)
    engine = engine_of(
        model,
        draw.randint(1, 6),
        draw.randint(1, 4),
        page_size=draw.choice([1, 2, 4, 8]),
        cache_tokens=draw.randint(24, 60),
        step_tokens=draw.choice([1, 4, 16, 64]),
        prefix_cache=draw.random() < 0.7,
    )
    stem, requests = prompt(12, seed), {}
    for n in range(14):
        begins = stem[: draw.randint(0, 12)]
        ids = (begins + prompt(12, 100 * seed + n))[: draw.randint(1, 20)]
        requests[f"r{n}"] = Request(f"r{n}", ids, Sampling(max_tokens=draw.randint(1, 8), temperature=0))
    arrivals: dict[int, list[Request]] = defaultdict(list)
    for request in requests.values():
        arrivals[draw.randint(0, 20)].append(request)
    cancels = {draw.randint(0, 40): f"r{draw.randrange(14)}" for _ in range(5)}
    answers = drive(engine, arrivals, cancels)
    for name, request in requests.items():
        whole = alone(model, request)
        if answers.get(name) != whole:
            assert name in cancels.values(), f"{name} was not cancelled"
            told = answers.get(name, Answer([], None)).token_ids
            assert told == whole.token_ids[: len(told)]


def test_what_experts_served_is_counted(model):
    """Of every token that was computed, in whatever bites, each layer's choices, as the router made them."""
    request = Request("a", prompt(9, 3), Sampling(max_tokens=4, temperature=0))
    engine = engine_of(model, step_tokens=4)
    token_ids = [*request.prompt_token_ids, *drive(engine, {0: [request]})["a"].token_ids]
    with torch.inference_mode():
        routings = model(torch.tensor(token_ids[:-1]), context_of(12)).routings  # the last token is not computed
    want = {i: torch.bincount(r.experts_TK.flatten(), minlength=8).tolist() for i, r in enumerate(routings)}
    assert engine.runner.loads() == want and all(sum(counts) == 24 for counts in want.values())
