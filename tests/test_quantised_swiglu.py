"""Quantised SwiGLU experts: steps in order against the same steps by hand, and near the unrounded definition."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close
from torch.nn import functional

from expertmesh.kernels import quantise as quantise_module
from expertmesh.kernels import quantised_gemm as module
from expertmesh.kernels.quantise import dequantise_rows
from expertmesh.kernels.quantised_gemm import quantised_gemm_ref, rows_for
from expertmesh.kernels.quantised_swiglu import quantised_swiglu, quantised_swiglu_ref
from expertmesh.kernels.quantised_weights import quantise_weights
from expertmesh.kernels.scheme import Scheme

COUNTS = [
    pytest.param([0, 0], id="no rows"),
    pytest.param([1, 0], id="one row"),
    pytest.param([0, 9], id="all on one expert"),
    pytest.param([7, 12], id="both have rows"),
]


def inputs_for(counts: list[int], scheme: Scheme, d: int = 40, f: int = 150):
    generator = torch.Generator().manual_seed(sum(counts))
    R = sum(counts)
    source_XD = torch.randn(R + 2, d, generator=generator)
    index_R = torch.randint(R + 2, (R,), generator=generator)
    gate_up = quantise_weights(torch.randn(2, 2 * f, d, generator=generator) * d**-0.5, scheme, parts=2)
    down = quantise_weights(torch.randn(2, d, f, generator=generator) * f**-0.5, scheme)
    return source_XD, index_R, torch.tensor(counts), gate_up, down, torch.rand(R, generator=generator)


@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("counts", COUNTS)
def test_near_the_definition_and_equal_to_its_steps(counts, scheme):
    source_XD, index_R, counts_E, gate_up, down, weights_R = inputs_for(counts, scheme)
    got = quantised_swiglu(source_XD, index_R, counts_E, gate_up, down, weights_R)
    want = quantised_swiglu_ref(source_XD, index_R, counts_E, gate_up, down, weights_R)
    assert_close(got, want, max_error=0.1, rms_error=0.02, what="beside rows that are not rounded")
    quantise = rows_for(scheme)
    h_RG = quantised_gemm_ref(quantise(source_XD), index_R, counts_E, gate_up).float()
    gate_RF, up_RF = h_RG.chunk(2, dim=1)
    a = dequantise_rows(quantise(functional.silu(gate_RF) * up_RF), torch.float32)
    steps = quantised_gemm_ref(quantise(a), None, counts_E, down) * weights_R[:, None].double()
    # A last bit of h may tip a tie of FP8: one hidden unit of 150 then moves by an eighth.
    assert_close(got, steps, max_error=5e-3, rms_error=1e-3, what="beside the same steps")


@pytest.mark.parametrize("scheme", Scheme)
def test_by_triton(scheme, monkeypatch):
    inputs = inputs_for([7, 12], scheme)
    want = quantised_swiglu(*inputs)
    monkeypatch.setattr(module, "by_triton", lambda tensor: True)
    monkeypatch.setattr(quantise_module, "by_triton", lambda tensor: True)
    assert_close(quantised_swiglu(*inputs), want, max_error=5e-3, rms_error=1e-3)


@pytest.mark.parametrize("scheme", Scheme)
def test_a_row_is_weighed_exactly(scheme):
    """A power of two as the gate weight changes the exponent of the answer and nothing else."""
    source_XD, index_R, counts_E, gate_up, down, weights_R = inputs_for([7, 12], scheme)
    plain = quantised_swiglu(source_XD, index_R, counts_E, gate_up, down)
    half = quantised_swiglu(source_XD, index_R, counts_E, gate_up, down, torch.full_like(weights_R, 0.5))
    assert torch.equal(half, plain / 2)


def test_bfloat16_stays_bfloat16():
    source_XD, *rest = inputs_for([3, 4], Scheme.FP8_BLOCK)
    assert quantised_swiglu(source_XD.bfloat16(), *rest).dtype == torch.bfloat16


def test_says_what_is_wrong():
    source_XD, index_R, counts_E, gate_up, down, _ = inputs_for([3, 4], Scheme.FP8_BLOCK)
    with pytest.raises(ValueError, match="do not fit"):
        quantised_swiglu(source_XD, index_R, counts_E, gate_up._replace(parts=1), down)
    with pytest.raises(ValueError, match="do not fit"):
        quantised_swiglu(source_XD, index_R, counts_E, gate_up, down._replace(scheme=Scheme.FP8_CHANNEL))
