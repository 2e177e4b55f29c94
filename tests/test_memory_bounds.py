"""A kernel that reads or writes beyond what it was given does not get away with it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterError


@triton.jit
def _double(x_ptr, y_ptr, N, LOADED: tl.constexpr, STORED: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + n, mask=n < LOADED, other=0.0)
    tl.store(y_ptr + n, 2 * x, mask=n < STORED)


def doubled(x_N: torch.Tensor, y_N: torch.Tensor, loaded: int, stored: int) -> torch.Tensor:
    _double[(2,)](x_N, y_N, len(x_N), LOADED=loaded, STORED=stored, BLOCK=4)
    return y_N


def test_what_is_inside_is_let_through():
    x_N = torch.randn(6)
    torch.testing.assert_close(doubled(x_N, torch.empty(6), 6, 6), 2 * x_N)


@pytest.mark.parametrize(("loaded", "stored"), [(7, 6), (8, 6), (6, 7)], ids=["load by one", "load", "store"])
def test_what_is_outside_fails(loaded: int, stored: int):
    with pytest.raises(InterpreterError, match="are not of one tensor"):
        doubled(torch.randn(6), torch.empty(6), loaded, stored)


def test_a_neighbour_in_memory_is_outside():
    both = torch.randn(12)
    with pytest.raises(InterpreterError, match="are not of one tensor"):
        doubled(both[:6], both[6:], 8, 6)
