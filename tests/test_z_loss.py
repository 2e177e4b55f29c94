"""The z-loss against its equation, and what it pulls at."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close

from expertmesh.kernels.z_loss import z_loss, z_loss_ref


@pytest.mark.parametrize("tokens, experts", [(0, 4), (1, 1), (7, 12), (33, 5)])
def test_equals_the_equation(tokens, experts):
    logits_TN = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0)).requires_grad_()
    twin_TN = logits_TN.detach().clone().requires_grad_()
    loss, expected = z_loss(logits_TN), z_loss_ref(twin_TN)
    loss.backward()
    expected.backward()
    assert_close(loss, expected)
    assert_close(logits_TN.grad, twin_TN.grad)


def test_large_logits_cost_their_square_and_do_not_overflow():
    assert z_loss(torch.full((3, 1), 200.0)) == pytest.approx(200.0**2)


def test_the_gradient_draws_logits_together_where_their_sum_is_too_large():
    logits_TN = torch.tensor([[3.0, 1.0]], requires_grad=True)
    z_loss(logits_TN).backward()
    assert (logits_TN.grad > 0).all()
