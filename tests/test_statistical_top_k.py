"""The threshold that stands for a top-k: how many it keeps, what it takes no notice of, its gradient."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close

from expertmesh.kernels.statistical_top_k import statistical_top_k, statistical_top_k_ref


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CASES = [
    (0, 8, 3, "no rows"),
    (1, 2, 1, "the narrowest row"),
    (5, 33, 32, "all but one kept"),
    (7, 17, 5, "odd sizes"),
]


@pytest.mark.parametrize("count, width, kept, reason", CASES, ids=[case[-1] for case in CASES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_definition(count, width, kept, reason, dtype):
    x_RF, twin_RF = rows(count, width).to(dtype).requires_grad_(), rows(count, width).requires_grad_()
    y_RF, expected_RF = statistical_top_k(x_RF, kept), statistical_top_k_ref(twin_RF, kept)
    weights_RF = rows(count, width, seed=1)
    (y_RF * weights_RF).sum().backward()
    (expected_RF * weights_RF).sum().backward()
    assert y_RF.dtype == dtype
    assert_close(y_RF, expected_RF)
    assert_close(x_RF.grad, twin_RF.grad, what="gradient")


# Means and standard deviations as computed for normal rows; the mean of 8 rows must lie within 4 of its own deviations.
@pytest.mark.parametrize("width, kept, mean, deviation", [(13824, 1106, 1103, 21), (1024, 82, 82.2, 5.7)])
def test_normal_rows_keep_what_was_asked(width, kept, mean, deviation):
    counts_R = (statistical_top_k(rows(8, width).float(), kept) > 0).sum(1).double()
    assert ((counts_R - mean).abs() < 4 * deviation).all()
    assert abs(counts_R.mean() - mean) < 4 * deviation / 8**0.5


def test_shift_changes_nothing_and_a_factor_goes_through():
    x_RF = rows(3, 40)
    y_RF = statistical_top_k(x_RF, 9)
    assert_close(statistical_top_k(x_RF + 7.5, 9), y_RF)
    assert_close(statistical_top_k(3.0 * x_RF, 9), 3.0 * y_RF)


def test_those_kept_are_the_largest():
    x_RF = rows(4, 50)
    for x_F, y_F in zip(x_RF, statistical_top_k(x_RF, 10), strict=True):
        kept = int((y_F > 0).sum())
        assert set(y_F.nonzero().flatten().tolist()) == set(x_F.topk(kept).indices.tolist())


def test_nearly_all_are_kept_where_nearly_all_are_asked_for():
    assert ((statistical_top_k(rows(4, 1000), 999) > 0).sum(1) >= 995).all()


def test_statistics_of_bfloat16_are_float32():
    x_RF = (rows(2, 4096) + 100.3).bfloat16()  # near 100 its numbers are 0.5 apart: a rounded mean is 0.2 off
    assert_close(statistical_top_k(x_RF, 400), statistical_top_k_ref(x_RF.double(), 400))


def test_gradient_goes_through_mean_and_deviation():
    x_RF = rows(3, 12).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: statistical_top_k(x, 4), x_RF)
    statistical_top_k(x_RF, 4).sum().backward()
    below_RF = statistical_top_k(x_RF, 4) == 0
    assert (x_RF.grad[below_RF] != 0).all(), "those below the threshold move it"


def test_equal_numbers_give_no_gradient_that_is_not_finite():
    x_RF = torch.zeros(2, 6, requires_grad=True)
    statistical_top_k(x_RF, 4).sum().backward()
    assert torch.isfinite(x_RF.grad).all()


@pytest.mark.parametrize("kept", [0, 6])
def test_what_is_refused(kept):
    with pytest.raises(ValueError, match=f"kept is {kept}; it must be from 1"):
        statistical_top_k(rows(1, 6), kept)
