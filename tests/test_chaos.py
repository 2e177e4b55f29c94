"""Drills: read as they are written, come where they are told, and once."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from pydantic import ValidationError

from expertmesh.launch.chaos import ChaosConfig, Place, parse_place, strike

NONE = frozenset[int]()


def test_a_place():
    assert parse_place("trainer:12@step=5") == Place(12, 5)


@pytest.mark.parametrize(
    "text", ["", "trainer:1", "ffn:1@step=5", "trainer:1@step=0", "trainer:-1@step=5", "trainer:1@step=5x"]
)
def test_what_is_no_place(text):
    with pytest.raises(ValidationError, match="a drill reads trainer:RANK@step=STEP"):
        ChaosConfig(kill=text)


@pytest.mark.parametrize("key, number", [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_a_signal_comes_once(monkeypatch, key, number):
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, signal: sent.append((pid, signal)))
    chaos, model = ChaosConfig(**{key: "trainer:1@step=5"}), torch.nn.Linear(2, 2)
    for rank, step in [(0, 5), (1, 4), (1, 6)]:
        strike(chaos, rank, step, NONE, model)
    strike(chaos.survived(1), 1, 5, NONE, model)
    assert not sent, "another rank, another step, or it came before"
    strike(chaos.survived(0), 1, 5, NONE, model)
    assert sent == [(os.getpid(), number)]


def test_a_nan_comes_with_its_batch():
    chaos = ChaosConfig(nan="trainer:0@step=5")
    for drills, skip, spoilt in [
        (chaos, NONE, True),
        (chaos.survived(0), NONE, True),
        (chaos, frozenset({5}), False),
    ]:
        model = torch.nn.Linear(2, 2)
        strike(drills, 0, 5, skip, model)
        assert bool(model.weight.isnan().any()) == spoilt
