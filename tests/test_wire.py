"""Each format gives rows back within its bound, in their dtype, and takes the bytes that it says."""

from __future__ import annotations

import pytest
import torch

from expertmesh.parallel.wire import WIRES

SHAPES = [(0, 8), (1, 1), (1, 6), (5, 7), (3, 64)]  # no rows; one number; one row of an odd number of bytes; odd; plain
BOUNDS = {"native": 0.0, "bf16": 2**-8, "fp8": 2**-4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", WIRES)
def test_rows_come_back(name, shape, dtype):
    wire = WIRES[name]
    x_RD = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    x_RD *= torch.logspace(-20, 20, len(x_RD))[:, None].to(dtype)  # each row keeps its own size
    packed_RW = wire.pack(x_RD.T.contiguous().T)
    assert packed_RW.is_contiguous()
    assert packed_RW.shape[1] * packed_RW.element_size() == wire.row_bytes(shape[1], dtype)
    back_RD = wire.unpack(packed_RW, dtype)
    assert back_RD.dtype == dtype and back_RD.shape == shape
    largest_R1 = x_RD.abs().amax(1, keepdim=True) if shape[1] else x_RD
    # Small numbers of an FP8 row are off by a share of its largest: 2^-10 / 448.
    slack = largest_R1 * (2**-10 / 448 if name == "fp8" else 0)
    assert ((back_RD - x_RD).abs() <= x_RD.abs() * (BOUNDS[name] * 1.01) + slack * 1.01).all()
    if name == "native" or (name == "bf16" and dtype is torch.bfloat16):
        assert torch.equal(back_RD, x_RD)


@pytest.mark.parametrize("name", WIRES)
def test_a_row_does_not_depend_on_the_others(name):
    wire = WIRES[name]
    x_RD = torch.randn(6, 10, generator=torch.Generator().manual_seed(2))
    together_RD = wire.unpack(wire.pack(x_RD), x_RD.dtype)
    alone_RD = torch.cat([wire.unpack(wire.pack(row_1D), x_RD.dtype) for row_1D in x_RD.split(1)])
    assert torch.equal(together_RD, alone_RD)


def test_fp8_keeps_the_sign_and_the_largest_number_of_a_row():
    x_RD = torch.tensor([[3.0, -7.0, 0.0], [0.0, 0.0, 0.0], [-1e-20, 1e-20, 0.0]])
    back_RD = WIRES["fp8"].unpack(WIRES["fp8"].pack(x_RD), torch.float32)
    assert torch.equal(back_RD.sign(), x_RD.sign())
    assert torch.allclose(back_RD.abs().amax(1), x_RD.abs().amax(1), rtol=1e-6, atol=0)
