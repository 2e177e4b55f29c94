"""Tuning: the fastest tile of a product wins, unless its result is wrong. Clocks are made up, kernels interpreted."""

from __future__ import annotations

import pytest
import torch

from expertmesh.kernels import tune as module
from expertmesh.kernels.tiles import CHIPS, SM_90, Tile
from expertmesh.kernels.tune import Contest, Layer, candidates, contests, tune
from expertmesh.kernels.tuned_tiles import KERNELS, Product, Timed

LAYER = Layer(tokens=5, experts=2, top_k=2, hidden=16, ffn=8, dtype=torch.float32)
RULE, FAST, SLOW, WRONG = Tile(16, 32, 32, 4, 3), Tile(32, 32, 32, 4, 3), Tile(16, 64, 32, 4, 3), Tile(64, 64, 32, 8, 2)
PRODUCT = Product("multiply", 8, 24, 16, "float32", "sm_90")


def test_every_kernel_with_a_tile_is_measured_at_the_sizes_that_it_runs_at(monkeypatch):
    """The products that training looks up are those that are measured."""
    asked = set()
    for user in ("grouped_gemm_triton", "grouped_swiglu_triton"):
        monkeypatch.setattr(f"expertmesh.kernels.{user}.tile_of", lambda product, rule: asked.add(product) or rule)
    measured = set()
    for contest in contests(LAYER, torch.device("cpu")):
        assert torch.isfinite(contest.launch(contest.rule)).all()
        assert torch.isfinite(contest.launch(None)).all()  # as training calls it
        measured.add(contest.product)
    assert measured == asked and {product.kernel for product in measured} == set(KERNELS)


def test_the_fastest_right_tile_wins(monkeypatch):
    lines: list[str] = []

    def launch(tile: Tile) -> torch.Tensor:
        return torch.full((3,), 2.0 if tile == WRONG else 1.0)

    times = {RULE: 3.0, FAST: 2.0, SLOW: 4.0, WRONG: 1.0}
    monkeypatch.setattr(module, "contests", lambda *_: [Contest(PRODUCT, RULE, 1, launch)])
    monkeypatch.setattr(module, "candidates", lambda *_: list(times))
    found = tune(LAYER, torch.device("cpu"), lambda call: times[call.args[0]], lines.append)
    assert found == [Timed(PRODUCT, FAST, 2.0, 3.0)]
    assert "wrong result" in lines[0] and "1.50" in lines[1]


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("accumulators", [1, 2])
def test_candidates_fit_the_chip_and_begin_with_the_rule(accumulators, chip):
    rule = Tile(64, 128, 32, 4, 2)
    near = candidates(rule, accumulators, 2, chip)
    assert near[0] == rule and len(near) == len(set(near)) > 10
    for tile in near[1:]:
        assert (tile.rows + accumulators * tile.columns) * 32 * 2 * (tile.stages - 1) <= chip.shared_bytes
        assert accumulators * tile.rows * tile.columns <= 128 * tile.warps * 32


def test_a_tile_of_the_rule_is_among_the_candidates_of_every_height():
    assert Tile(16, 32, 64, 4, 3) in candidates(Tile(16, 32, 64, 4, 3), 1, 2, SM_90)
