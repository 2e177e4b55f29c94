"""Seconds of several contenders, so measured that a busy machine is unfair to nobody.

A round visits all contenders in turn, each with one sample; who begins moves on by one from round to round. What is
compared is what happened in the same round, and the median over the rounds is reported.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from statistics import median

ROUNDS = 7  # at least; more where samples are short
MOST_ROUNDS = 31
SECONDS = 10.0  # that a set of contenders may take before the rounds beyond ROUNDS are left out
SLOW_SECONDS, SLOW_FACTOR = 1.0, 20  # a sample longer than this and than so many of the fastest is taken once

Sample = Callable[[], None]


def time_in_turn(samples: dict[str, Sample]) -> dict[str, list[float]]:
    """Seconds of each sample by round; one that is hopelessly slow has the first round alone."""
    for sample in samples.values():  # caches fill, operators are chosen, memory is fetched
        sample()
    warm = {what: _seconds(sample) for what, sample in samples.items()}
    slow = {s for s, time in warm.items() if time > max(SLOW_SECONDS, SLOW_FACTOR * min(warm.values()))}
    kept = [what for what in samples if what not in slow]
    rounds = round(SECONDS / sum(warm[what] for what in kept))
    seconds = {what: [time] if what in slow else [] for what, time in warm.items()}
    gc.collect()  # the contenders of the case before, too
    gc.freeze()  # or a collection would look through every library that is loaded: 0.3 s on somebody's account
    try:
        for number in range(min(MOST_ROUNDS, max(ROUNDS, rounds))):
            first = number % len(kept)
            for what in kept[first:] + kept[:first]:
                seconds[what].append(_seconds(samples[what]))
    finally:
        gc.unfreeze()
    return seconds


def _seconds(sample: Sample) -> float:
    start = time.perf_counter()
    sample()
    return time.perf_counter() - start


def speed(seconds: list[float], of: list[float]) -> float:
    """How fast the first is beside the second: 2 is twice as fast. By the median over the rounds that both have."""
    return median(other / own for own, other in zip(seconds, of, strict=False))
