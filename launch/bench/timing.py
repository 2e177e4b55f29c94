"""Seconds of several contenders, so measured that a busy machine is unfair to nobody.

A round visits all contenders in turn, each with one sample; who begins moves on by one from round to round. What is
compared is what happened in the same round, and the median over the rounds is reported.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from statistics import median

ROUNDS = 7  # at least; more where samples are short
MOST_ROUNDS = 31
SECONDS = 10.0  # that a set of contenders may take before the rounds beyond ROUNDS are left out
SLOW_SECONDS, SLOW_FACTOR = 1.0, 20  # a sample longer than this, of calls so many times the fastest, is not repeated

Sample = Sequence[Callable[[], object]]  # calls that are timed together: one for each set of tokens


def time_in_turn(samples: dict[str, Sample]) -> dict[str, list[float]]:
    """Seconds of one call of each sample, by round; one that is hopelessly slow has a single call, before them."""
    for sample in samples.values():  # operators are chosen, memory is fetched
        _seconds(sample[:1])
    once = {what: _seconds(sample[:1]) for what, sample in samples.items()}
    fastest = min(once.values())
    slow = [s for s in samples if once[s] * len(samples[s]) > SLOW_SECONDS and once[s] > SLOW_FACTOR * fastest]
    kept = [what for what in samples if what not in slow]
    seconds = {what: [once[what]] if what in slow else [] for what in samples}
    round_seconds = sum(_seconds(samples[what]) * len(samples[what]) for what in kept)
    gc.collect()  # the contenders of the case before, too
    gc.freeze()  # or a collection would look through every library that is loaded: 0.3 s on somebody's account
    try:
        for number in range(min(MOST_ROUNDS, max(ROUNDS, round(SECONDS / round_seconds)))):
            first = number % len(kept)
            for what in kept[first:] + kept[:first]:
                seconds[what].append(_seconds(samples[what]))
    finally:
        gc.unfreeze()
    return seconds


def _seconds(sample: Sample) -> float:
    """Mean of a call."""
    start = time.perf_counter()
    for call in sample:
        call()
    return (time.perf_counter() - start) / len(sample)


def speed(seconds: list[float], of: list[float]) -> float:
    """How fast the first is beside the second: 2 is twice as fast. By the median over the rounds that both have."""
    return median(other / own for own, other in zip(seconds, of, strict=False))
