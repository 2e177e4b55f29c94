"""Rows out of their sources and back, both ways (embedding_bag, Triton in its interpreter), against float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from numerics import assert_close

from expertmesh.kernels import rows as module
from expertmesh.kernels.rows import gather_rows, gather_rows_ref


class Case(NamedTuple):
    sources: int
    rows: int
    d: int
    reason: str


CASES = [
    Case(0, 0, 5, "no sources"),
    Case(4, 0, 5, "no rows: every source gets 0"),
    Case(1, 1, 5, "one row"),
    Case(1, 9, 4, "all rows of one source"),
    Case(9, 30, 13, "odd sizes; some sources are read by nobody"),
    Case(3, 5, 1040, "wider than one block"),
]


@pytest.fixture(params=[False, True], ids=["bags", "triton"])
def way(request, monkeypatch):
    monkeypatch.setattr(module, "by_triton", lambda tensor: request.param)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_gather_and_its_gradient(case, dtype, way):
    generator = torch.Generator().manual_seed(case.rows)
    source_XD = torch.randn(case.sources, case.d, generator=generator).to(dtype).requires_grad_()
    index_R = torch.randint(0, max(case.sources, 1), (case.rows,), generator=generator)
    grad_RD = torch.randn(case.rows, case.d, generator=generator).to(dtype)
    wide_XD = source_XD.detach().double().requires_grad_()
    rows_RD, expected_RD = gather_rows(source_XD, index_R), gather_rows_ref(wide_XD, index_R)
    assert rows_RD.dtype == dtype and torch.equal(rows_RD.double(), expected_RD)
    (got,) = torch.autograd.grad(rows_RD, source_XD, grad_RD)
    (want,) = torch.autograd.grad(expected_RD, wide_XD, grad_RD.double())
    assert got.dtype == dtype
    assert_close(got, want, what="gradient of the source")
    (again,) = torch.autograd.grad(gather_rows(source_XD, index_R), source_XD, grad_RD)
    assert torch.equal(got, again)


def test_bfloat16_rows_are_summed_in_float32(way):
    """1 + 1/256 + 1/256 is a bfloat16 number, but adding one 1/256 at a time rounds back to 1 each time."""
    source_XD = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    rows_RD = torch.tensor([[1.0], [1 / 256], [1 / 256]], dtype=torch.bfloat16)
    gather_rows(source_XD, torch.zeros(3, dtype=torch.int64)).backward(rows_RD)
    assert source_XD.grad.item() == 1 + 1 / 128


def test_gradcheck():
    source_XD = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, torch.tensor([2, 0, 2])), (source_XD,))
