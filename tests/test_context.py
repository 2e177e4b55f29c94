"""Lots of a training step: the same for a sequence on whatever rank, another for each step, layer and purpose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expertmesh.system.model.context import TrainingStep

CPU = torch.device("cpu")
STEP = TrainingStep(step=3, steps=11, seed=5, sequences=range(4), sequence_length=6)


def lots(step: TrainingStep = STEP, layer: int = 2, purpose: str = "router", width: int = 7) -> torch.Tensor:
    return step.lots(layer, purpose, width, CPU)


def test_a_sequence_has_its_lots_whatever_rank_holds_it():
    whole = lots().view(4, 6, 7)
    for held in (range(0, 2), range(2, 4), range(1, 2), range(0, 4)):
        part = lots(replace(STEP, sequences=held))
        assert torch.equal(part.view(len(held), 6, 7), whole[held.start : held.stop])
    assert len({tuple(row.tolist()) for row in whole.flatten(0, 1)}) == 24, "each token has its own"


OTHERS = [
    (lots(replace(STEP, step=4)), "step"),
    (lots(replace(STEP, seed=6)), "seed"),
    (lots(layer=3), "layer"),
    (lots(purpose="capacity"), "purpose"),
]


@pytest.mark.parametrize("other, what", OTHERS, ids=[what for _, what in OTHERS])
def test_another_one_has_other_lots(other, what):
    assert (lots() != other).all()
    assert torch.equal(lots(), lots(replace(STEP, steps=99))), "the length of the run is no part of it"


def test_uniform_in_the_open_interval():
    u = lots(replace(STEP, sequence_length=5000), width=10).double()
    assert u.dtype == torch.float64 and lots().dtype == torch.float32
    assert u.min() > 0 and u.max() < 1 and 1 - u.max().float() > 0
    assert u.mean().item() == pytest.approx(0.5, abs=2e-3)
    counts = torch.histc(u, bins=20, min=0, max=1) / u.numel()
    assert (counts - 0.05).abs().max() < 2e-3, "200,000 draws; a bin's standard deviation is 0.0005"
    neighbours = torch.corrcoef(torch.stack([u[:-1].flatten(), u[1:].flatten()]))[0, 1]
    assert abs(neighbours) < 0.01


def test_sequences_that_draw_zero_and_one_stay_inside(monkeypatch):
    """A Gumbel variable is -log(-log(u)): neither end may come up."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64))
    u = lots(replace(STEP, sequences=range(1), sequence_length=1), width=2)
    assert u.min() > 0 and u.max() < 1 and torch.isfinite(-torch.log(-torch.log(u))).all()


@pytest.mark.parametrize("sequences, length, width", [(range(0), 6, 7), (range(4), 0, 7), (range(1), 1, 1)])
def test_shapes(sequences, length, width):
    found = lots(replace(STEP, sequences=sequences, sequence_length=length), width=width)
    assert found.shape == (len(sequences) * length, width)


@pytest.mark.parametrize("step, steps, progress", [(1, 11, 0.0), (6, 11, 0.5), (11, 11, 1.0), (1, 1, 0.0)])
def test_progress(step, steps, progress):
    assert replace(STEP, step=step, steps=steps).progress == progress
