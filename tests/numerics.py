"""One way to compare tensors, for every test: a maximum and a root-mean-square bound, and the worst place named."""

from __future__ import annotations

import torch

# Relative to the largest magnitude of the expected tensor: (largest error, root-mean-square error).
BOUNDS = {
    torch.float64: (1e-10, 1e-11),
    torch.float32: (2e-5, 2e-6),
    torch.bfloat16: (2e-2, 5e-3),
}


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    max_error: float | None = None,
    rms_error: float | None = None,
    what: str = "tensor",
) -> None:
    """Compare `actual` with `expected`; the bounds follow the dtype of `actual` unless given."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    default_max, default_rms = BOUNDS.get(actual.dtype, (0.0, 0.0))
    bound_max = default_max if max_error is None else max_error
    bound_rms = default_rms if rms_error is None else rms_error
    got, want = actual.detach().double(), expected.detach().double()
    assert torch.isfinite(got).all(), f"{what}: not finite"
    scale = want.abs().max().clamp_min(1e-30)
    error = (got - want).abs() / scale
    worst = int(error.argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    rms = error.pow(2).mean().sqrt()
    assert error.max() <= bound_max and rms <= bound_rms, (
        f"{what}: largest error {error.max():.3e} (bound {bound_max:.1e}), rms {rms:.3e} (bound {bound_rms:.1e}); "
        f"worst at {place}: {got.flatten()[worst]:.8g}, expected {want.flatten()[worst]:.8g}"
    )
