"""Continuous batching changes nothing: every request gets the text that it would get alone, without a cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from threading import Lock
from typing import NamedTuple

import pytest
import torch
from tiny import context_of, tiny_model

from expertmesh.parallel.dispatchers import LocalDispatcher
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import initialise
from expertmesh.system.serve.engine import Engine, _Running, _split
from expertmesh.system.serve.request import Output, Request, Sampling
from expertmesh.system.serve.sampler import sample

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
        answer.append(sample(model.lm_head(hidden_TD[-1]), sampling, sampling.seed or 0, length))
        token_ids.append(answer[-1])
        if answer[-1] in eos_ids and not sampling.ignore_eos:
            return Answer(answer, "stop")
        if len(answer) == sampling.max_tokens or len(token_ids) == CONFIG.context_length:
            return Answer(answer, "length")


def engine_of(model: Transformer, slots: int = 3, micro_batches: int = 1, eos_ids: Collection[int] = ()) -> Engine:
    return Engine(model, eos_ids, [LocalDispatcher() for _ in range(micro_batches)], Lock(), slots, "cpu")


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
        assert len({output.request_id for output in outputs}) == len(outputs) <= engine.cache.keys_LXGCd.shape[1]
        for output in outputs:
            assert reasons.get(output.request_id) is None, "a token after the last one"
            tokens[output.request_id].append(output.token_id)
            reasons[output.request_id] = output.finish_reason
        step += 1
        assert step < 500, "it does not end"
    assert engine.step() == []
    assert sorted(engine._free_slots) == list(range(engine.cache.keys_LXGCd.shape[1])), "a slot was lost"
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


@pytest.mark.parametrize(
    "slots, micro_batches",
    [(1, 1), (3, 1), (3, 2), (10, 3), (4, 4)],
    ids=["one at a time", "fewer slots than requests", "two threads", "room for all, three threads", "a thread each"],
)
def test_text_does_not_depend_on_company(model, slots, micro_batches):
    arrivals = mixed_requests()
    answers = drive(engine_of(model, slots, micro_batches), arrivals)
    requests = [request for batch in arrivals.values() for request in batch]
    assert answers == {request.id: alone(model, request) for request in requests}
    said = {tuple(answer.token_ids[:3]) for answer in answers.values()}
    assert len(said) > len(requests) // 2, "a model that always says the same proves nothing"


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
    ({3: "b"}, {"b"}, "while it runs: its slot goes to the next"),
    ({1: "e"}, set(), "one that has not come yet: it comes all the same"),
    ({2: "f"}, {"f"}, "while it waits: it never runs"),
    ({0: "nobody"}, set(), "an unknown id"),
    ({9: "a"}, set(), "one that has ended"),
]


@pytest.mark.parametrize("cancels, gone, reason", CANCELS, ids=[reason for *_, reason in CANCELS])
def test_cancelled_requests_stop_and_leave_the_others_alone(model, cancels, gone, reason):
    arrivals = mixed_requests()
    expected = {r.id: alone(model, r) for batch in arrivals.values() for r in batch}
    answers = drive(engine_of(model, slots=2), arrivals, cancels)
    for name, answer in expected.items():
        if name not in gone:
            assert answers[name] == answer
        else:
            stopped = answers.get(name, Answer([], None))
            assert stopped.finish_reason is None and len(stopped.token_ids) < len(answer.token_ids)
            assert stopped.token_ids == answer.token_ids[: len(stopped.token_ids)]


def test_a_cancelled_slot_is_free_at_once(model):
    engine = engine_of(model, slots=1)
    long, next_one = (Request(name, prompt(3, 1), Sampling(max_tokens=9, temperature=0)) for name in "ab")
    engine.add(long)
    engine.add(next_one)
    assert [output.request_id for output in engine.step()] == ["a"]
    engine.cancel("a")
    assert engine.step() == [Output("b", alone(model, next_one).token_ids[0])]


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
    engine, order = engine_of(model, slots=2), []
    for request in requests:
        engine.add(request)
    while engine.has_work:
        order.append("".join(output.request_id for output in engine.step()))
    assert order == ["ab", "ab", "cd", "cd", "e", "e"]


SPLITS = [
    ([], 3, [], "nobody"),
    ([5], 3, [[5]], "fewer requests than parts"),
    ([1, 1, 1, 1], 2, [[1, 1], [1, 1]], "even"),
    ([1, 1, 1], 2, [[1, 1], [1]], "uneven"),
    ([30, 1, 1, 1], 2, [[30], [1, 1, 1]], "a prompt alone, single tokens together"),
    ([1, 1, 1, 30], 2, [[1, 1, 1, 30]], "in order: the prompt is where the cut would be"),
    ([1] * 7, 1, [[1] * 7], "one part"),
]


@pytest.mark.parametrize("lengths, parts, expected, reason", SPLITS, ids=[reason for *_, reason in SPLITS])
def test_micro_batches(lengths, parts, expected, reason):
    running = [_Running(Request("a", [0]), slot, 0, [0] * (length + 2), 2) for slot, length in enumerate(lengths)]
    cut = _split(running, parts)
    assert [r for part in cut for r in part] == running
    assert [[len(r.token_ids) - r.cached for r in part] for part in cut] == expected
