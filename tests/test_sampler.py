"""The next token: which tokens can be drawn, how often, and that seed and position alone decide."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from expertmesh.system.serve.request import Sampling
from expertmesh.system.serve.sampler import Place, _nucleus, draw, penalised, sample, told_prompt

# Sixteenths, in no order: a softmax of their logarithms gives them back.
PROBABILITIES = torch.tensor([1, 8, 2, 4, 1]) / 16
LOGITS = PROBABILITIES.log()
ALL = {0, 1, 2, 3, 4}


def draw_at(logits_V: torch.Tensor, sampling: Sampling, seed: int, position: int) -> int:
    """After `position` tokens of a prompt."""
    return draw(logits_V, Place(sampling, seed, [0] * position, position))


def draws(sampling: Sampling, logits_V: torch.Tensor = LOGITS, count: int = 400, seed: int = 0) -> Counter[int]:
    return Counter(draw_at(logits_V, sampling, seed, position) for position in range(count))


SUPPORTS = [
    (Sampling(1), ALL, "everything"),
    (Sampling(1, temperature=0), {1}, "greedy"),
    (Sampling(1, temperature=0, top_p=0.0, top_k=3), {1}, "greedy, whatever else is asked for"),
    (Sampling(1, temperature=1e-3), {1}, "nearly greedy"),
    (Sampling(1, temperature=1e-40), {1}, "below float32: a division would overflow"),
    (Sampling(1, temperature=1e-320), {1}, "below normal float64"),
    (Sampling(1, top_k=1), {1}, "the best"),
    (Sampling(1, top_k=2), {1, 3}, "the two best"),
    (Sampling(1, top_k=3), {1, 3, 2}, "the three best"),
    (Sampling(1, top_k=4), ALL, "the fourth is a tie of two: both stay"),
    (Sampling(1, top_k=5), ALL, "as many as there are"),
    (Sampling(1, top_k=99), ALL, "more than there are"),
    (Sampling(1, top_p=0.0), {1}, "the likeliest always stays"),
    (Sampling(1, top_p=0.49), {1}, "within the first"),
    (Sampling(1, top_p=0.51), {1, 3}, "just above the first"),
    (Sampling(1, top_p=0.74), {1, 3}, "just below the first two"),
    (Sampling(1, top_p=0.76), {1, 3, 2}, "just above the first two"),
    (Sampling(1, top_p=1.0), ALL, "no limit"),
    (Sampling(1, top_k=2, top_p=0.6), {1}, "top_k first: then the first token has two thirds"),
    (Sampling(1, temperature=9.0, top_p=0.4), {1, 3}, "temperature first: then no token has 0.3"),
    (Sampling(1, min_p=0.26), {1, 3}, "a half of the best is kept, a quarter is not"),
    (Sampling(1, min_p=0.24), {1, 3, 2}, "a quarter is kept, an eighth is not"),
    (Sampling(1, min_p=1.0), {1}, "only the best"),
    (Sampling(1, temperature=0.5, min_p=0.24), {1, 3}, "temperature first: it squares the quarter"),
    (Sampling(1, min_p=0.1, top_p=0.74), {1, 3}, "min_p first: two of what is left reach top_p"),
    (Sampling(1, logit_bias={0: 100.0}), {0}, "a bias that nothing stands against"),
    (Sampling(1, logit_bias={1: -100.0}), {0, 2, 3, 4}, "a bias that forbids"),
    (Sampling(1, temperature=0, logit_bias={1: -1.0}), {3}, "greedy, after the bias: 8/e is less than 4"),
]


@pytest.mark.parametrize("sampling, support, reason", SUPPORTS, ids=[reason for *_, reason in SUPPORTS])
def test_tokens_that_can_be_drawn(sampling, support, reason):
    assert set(draws(sampling)) == support
    assert set(draws(sampling, LOGITS + 1e4)) == support  # logits mean differences
    assert set(draws(sampling, LOGITS.to(torch.bfloat16))) == support


@pytest.mark.parametrize("top_p, kept", [(0.5, {1}), (0.75, {1, 3}), (0.875, {1, 3, 2}), (0.5000001, {1, 3})])
def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p(top_p, kept):
    assert set(_nucleus(PROBABILITIES, top_p).nonzero().flatten().tolist()) == kept  # sixteenths add up exactly


CHI_SQUARED_99_9 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}
DISTRIBUTIONS = [
    (Sampling(1), PROBABILITIES, "as the model says"),
    (Sampling(1, temperature=0.5), PROBABILITIES**2, "temperature 1/2 squares"),
    (Sampling(1, temperature=2.0), PROBABILITIES**0.5, "temperature 2 takes the root"),
    (Sampling(1, top_k=3), PROBABILITIES * torch.tensor([0, 1, 1, 1, 0]), "what is left keeps its shares"),
    (Sampling(1, top_p=0.74), PROBABILITIES * torch.tensor([0, 1, 0, 1, 0]), "also within a nucleus"),
]


@pytest.mark.parametrize("sampling, weights, reason", DISTRIBUTIONS, ids=[reason for *_, reason in DISTRIBUTIONS])
def test_distribution(sampling, weights, reason):
    count = 4000
    found, expected = draws(sampling, count=count), weights / weights.sum() * count
    possible = [token for token in ALL if expected[token] > 0]
    chi_squared = sum((found[token] - float(expected[token])) ** 2 / float(expected[token]) for token in possible)
    assert chi_squared < CHI_SQUARED_99_9[len(possible) - 1]


def test_seed_and_position_alone_decide():
    sampling, flat_V = Sampling(1), torch.zeros(1000)
    first = [draw_at(flat_V, sampling, 7, position) for position in range(20)]
    torch.manual_seed(99)  # the state of torch's own generator is not used
    assert [draw_at(flat_V, sampling, 7, position) for position in range(20)] == first
    assert [draw_at(flat_V, sampling, 7, position) for position in reversed(range(20))] == first[::-1]
    assert len(set(first)) > 15, "each position draws anew"
    assert [draw_at(flat_V, sampling, 8, position) for position in range(20)] != first
    assert isinstance(draw_at(flat_V, sampling, -(2**80), 0), int)  # any whole number will do


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    draw_at(LOGITS, Sampling(1), 0, 0)
    assert torch.equal(torch.get_rng_state(), before)


SEEN = [3, 3, 0, 2, 2, 2, 0]  # three tokens of prompt, four of answer
PENALTIES = [
    (Sampling(1), [0, 0, 0, 0, 0], "none"),
    (Sampling(1, presence_penalty=0.5), [-0.5, 0, -0.5, 0, 0], "of the answer, once each"),
    (Sampling(1, frequency_penalty=0.5), [-0.5, 0, -1.5, 0, 0], "of the answer, each time"),
    (Sampling(1, frequency_penalty=-1, presence_penalty=0.25), [0.75, 0, 2.75, 0, 0], "both, one of them a reward"),
    (Sampling(1, logit_bias={1: 3.0, 4: -2.0}), [0, 3, 0, 0, -2], "of the named tokens"),
    (Sampling(1, min_tokens=5), [0, 0, 0, 0, -torch.inf], "it may not end yet"),
    (Sampling(1, min_tokens=4), [0, 0, 0, 0, 0], "now it may"),
]


@pytest.mark.parametrize("sampling, added, reason", PENALTIES, ids=[row[-1] for row in PENALTIES])
def test_penalties_and_biases(sampling, added, reason):
    logits_V = torch.tensor([1.0, -2.0, 3.0, -4.0, 0.0], dtype=torch.float64)
    place = Place(sampling, 0, SEEN, 3, frozenset([4]))
    assert penalised(logits_V, place).tolist() == pytest.approx((logits_V + torch.tensor(added)).tolist())
    assert logits_V.tolist() == [1.0, -2.0, 3.0, -4.0, 0.0], "the logits are left alone"


def test_an_answer_of_which_every_token_is_an_end_may_end():
    place = Place(Sampling(1, min_tokens=5), 0, SEEN, 3, frozenset(ALL))
    assert torch.equal(penalised(LOGITS, place), LOGITS) and draw(LOGITS, place) in ALL


def test_repetition_penalty_counts_the_prompt_too():
    logits_V = torch.tensor([1.0, -2.0, 3.0, -4.0, 0.0], dtype=torch.float64)
    place = Place(Sampling(1, repetition_penalty=2.0), 0, SEEN, 3)
    assert penalised(logits_V, place).tolist() == [0.5, -2.0, 1.5, -8.0, 0.0]
    bias_first = Place(Sampling(1, repetition_penalty=2.0, logit_bias={3: 6.0}, presence_penalty=1), 0, SEEN, 3)
    assert penalised(logits_V, bias_first).tolist() == [-0.5, -2.0, 0.5, 1.0, 0.0], "bias, repetition, presence"


def test_a_reward_beyond_float64_is_only_a_reward():
    likely = Sampling(1, repetition_penalty=5e-324, logit_bias={0: 9.0})
    assert draw(LOGITS, Place(likely, 0, [0], 1)) == 0


def test_a_batch_is_its_rows_one_by_one():
    """Every kind of row at once: greedy, drawn, biased, penalised; each as it would be alone, in any order."""
    generator = torch.Generator().manual_seed(1)
    samplings = [
        Sampling(1, temperature=0),
        Sampling(1, temperature=0.8, top_p=0.9),
        Sampling(1, temperature=0, frequency_penalty=2.0),
        Sampling(1, top_k=7, min_p=0.05, presence_penalty=1.0, logprobs=2),
        Sampling(1, temperature=0, logprobs=0),
    ]
    places = [
        Place(sampling, seed, torch.randint(0, 50, (9,), generator=generator).tolist(), 4)
        for seed, sampling in enumerate(samplings)
    ]
    logits_SV = 2 * torch.randn(len(places), 50, generator=generator)
    together = sample(logits_SV, places)
    assert together == [sample(row[None], [place])[0] for row, place in zip(logits_SV, places, strict=True)]
    assert together == sample(logits_SV.flip(0), places[::-1])[::-1]
    assert [drawn.token_id for drawn in together] == [
        draw(row, place) for row, place in zip(logits_SV, places, strict=True)
    ]
    assert [drawn.logprobs is None for drawn in together] == [True, True, True, False, False]
    assert sample(logits_SV[:0], []) == []


def test_logprobs_are_the_models_own():
    """Neither temperature nor bias changes them."""
    sampling = Sampling(1, temperature=0.3, logit_bias={4: 100.0}, logprobs=3)
    (drawn,) = sample(LOGITS[None], [Place(sampling, 0, [], 0)])
    assert drawn.token_id == 4 and drawn.logprobs is not None
    assert drawn.logprobs.token.logprob == pytest.approx(math.log(1 / 16))
    assert [(one.token_id, one.logprob) for one in drawn.logprobs.top] == [
        (1, pytest.approx(math.log(8 / 16))),
        (3, pytest.approx(math.log(4 / 16))),
        (2, pytest.approx(math.log(2 / 16))),
    ]
    none, all_ = (Sampling(1, temperature=0, logprobs=count) for count in (0, 99))
    assert sample(LOGITS[None], [Place(none, 0, [], 0)])[0].logprobs.top == ()
    assert len(sample(LOGITS[None], [Place(all_, 0, [], 0)])[0].logprobs.top) == 5
    (told,) = told_prompt(LOGITS[None], [2], 1)
    assert told.token == (2, pytest.approx(math.log(2 / 16))) and [one.token_id for one in told.top] == [1]
