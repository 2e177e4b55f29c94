"""Experts of which each token wakes a few units: against the equation, and how many are awake."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expert_twin import COUNTS, assert_equals_twin
from twin import Weights

from expertmesh.kernels.rows import Rows
from expertmesh.kernels.statistical_top_k import statistical_top_k_ref
from expertmesh.system.model.experts_config import SparkConfig
from expertmesh.system.model.spark_experts import SparkExperts
from expertmesh.system.model.weights import initialise

WIDTH, KEPT = 6, 3


def made(predictor_width: int | None, width: int = WIDTH, hidden: int = 11, kept: int = KEPT) -> SparkExperts:
    config = SparkConfig(kind="spark", hidden_size=hidden, kept=kept, predictor_width=predictor_width)
    experts = SparkExperts(config, width, range(4))
    initialise(experts, 3, 0.5)
    return experts


PREDICTORS = [(None, "both read the whole token"), (2, "a narrow one"), (5, "all but one number"), (1, "one number")]


@pytest.mark.parametrize("predictor, reason", PREDICTORS, ids=[reason for _, reason in PREDICTORS])
@pytest.mark.parametrize("counts, why", COUNTS, ids=[why for _, why in COUNTS])
def test_equals_the_equation(predictor, reason, counts, why):
    def twin(w: Weights, x_D: torch.Tensor) -> torch.Tensor:
        a, b = (x_D, x_D) if predictor is None else (x_D[:predictor], x_D[predictor:])
        top_F = statistical_top_k_ref((w["gate_proj.weight"] @ a)[None], KEPT)[0]
        return w["down_proj.weight"] @ (F.gelu(top_F) * (w["up_proj.weight"] @ b))

    assert_equals_twin(made(predictor), WIDTH, twin, counts)


@pytest.mark.parametrize("predictor", [None, 64])
def test_units_that_sleep_do_not_matter(predictor):
    """About `kept` of them are awake; what down has for the others changes nothing."""
    experts = made(predictor, width=128, hidden=1024, kept=82)
    x_RD, counts_E = torch.randn(1, 128, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 0])
    y_RD = experts(Rows(x_RD, None, counts_E))
    y_RD.sum().backward()
    awake_F = experts.down.grad[1].abs().sum(0) > 0
    assert abs(int(awake_F.sum()) - 82.2) < 4 * 5.7
    experts.down.data[1, :, ~awake_F] = 9.0
    assert torch.equal(experts(Rows(x_RD, None, counts_E)), y_RD)


def test_parameters_are_counted():
    for predictor, expected in ((None, 11 * 3 * WIDTH), (2, 11 * 2 * WIDTH)):
        experts = made(predictor)
        assert sum(p.numel() for p in experts.parameters()) == 4 * experts.config.num_params(WIDTH) == 4 * expected
