"""The next token: which tokens can be drawn, how often, and that seed and position alone decide."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from expertmesh.system.serve.request import Sampling
from expertmesh.system.serve.sampler import _nucleus, sample

# Sixteenths, in no order: a softmax of their logarithms gives them back.
PROBABILITIES = torch.tensor([1, 8, 2, 4, 1]) / 16
LOGITS = PROBABILITIES.log()
ALL = {0, 1, 2, 3, 4}


def draws(sampling: Sampling, logits_V: torch.Tensor = LOGITS, count: int = 400, seed: int = 0) -> Counter[int]:
    return Counter(sample(logits_V, sampling, seed, position) for position in range(count))


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
    first = [sample(flat_V, sampling, 7, position) for position in range(20)]
    torch.manual_seed(99)  # the state of torch's own generator is not used
    assert [sample(flat_V, sampling, 7, position) for position in range(20)] == first
    assert [sample(flat_V, sampling, 7, position) for position in reversed(range(20))] == first[::-1]
    assert len(set(first)) > 15, "each position draws anew"
    assert [sample(flat_V, sampling, 8, position) for position in range(20)] != first
    assert isinstance(sample(flat_V, sampling, -(2**80), 0), int)  # any whole number will do


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    sample(LOGITS, Sampling(1), 0, 0)
    assert torch.equal(torch.get_rng_state(), before)
