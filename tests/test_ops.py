"""The kernels as operations of torch: fakes agree with what comes out, and a tracer needs not look in."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from expertmesh.kernels import grouped_gemm as grouped_gemm_module
from expertmesh.kernels import grouped_swiglu as grouped_swiglu_module
from expertmesh.kernels import paged_attention as paged_attention_module
from expertmesh.kernels import router_sums as router_sums_module
from expertmesh.kernels import routing, rows
from expertmesh.kernels.combine_triton import combine_triton
from expertmesh.kernels.grouped_gemm import grouped_gemm
from expertmesh.kernels.grouped_swiglu import grouped_swiglu
from expertmesh.kernels.paged_attention import paged_attention
from expertmesh.kernels.quantised_gemm import quantised_gemm, rows_for
from expertmesh.kernels.quantised_weights import QuantisedWeights, quantise_weights
from expertmesh.kernels.router_sums import router_sums
from expertmesh.kernels.routing import route
from expertmesh.kernels.scheme import Scheme
from expertmesh.kernels.zero_computation import ZeroComputation

T, D, F, E, R = 5, 8, 6, 3, 7


def layer(dtype: torch.dtype):
    """Every operation of a layer, forward and backward; returns all that it makes."""
    shapes = (T, D), (E, 2 * F, D), (E, D, F)
    x_TD, gate_up, down = (torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    logits_TN = torch.zeros(T, E + 3, requires_grad=True)
    mix, constant = torch.zeros(1, 2, D, dtype=dtype), torch.zeros(1, D, dtype=dtype)
    slots_R = torch.arange(R)
    index_R, counts_E = slots_R % T, torch.tensor([4, 0, 3])
    routed = route(logits_TN, 2, "paper")
    *sums, _ = router_sums(routed.scores_TN, routed.experts_TK)
    rows_RD = grouped_swiglu(x_TD, index_R, counts_E, gate_up, down, routed.weights_TK.flatten()[slots_R])
    rows_RD = rows_RD + grouped_gemm(grouped_gemm(rows_RD, down.transpose(1, 2).contiguous(), counts_E), down, counts_E)
    zero = ZeroComputation(x_TD, routed.experts_TK, E, mix, constant, 1)
    y_TD = combine_triton(rows_RD, slots_R, routed.weights_TK, False, zero)
    total = y_TD.float().sum() + sum(part.square().sum() for part in sums[:3])
    grads = torch.autograd.grad(total, (x_TD, gate_up, down, logits_TN))
    return routed.experts_TK, routed.weights_TK, *sums, rows_RD, y_TD, *grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_of_fake_tensors_has_the_shapes_and_dtypes_of_a_real_one(dtype, monkeypatch):
    for module in (grouped_gemm_module, grouped_swiglu_module, router_sums_module, routing, rows):
        monkeypatch.setattr(module, "by_triton", lambda tensor: True)
    with FakeTensorMode():
        fakes = layer(dtype)
    for fake, tensor in zip(fakes, layer(dtype), strict=True):
        assert type(fake).__name__ == "FakeTensor"
        assert (fake.shape, fake.dtype, fake.stride()) == (tensor.shape, tensor.dtype, tensor.stride())


@pytest.mark.parametrize("width", [8, 6], ids=["values beside the keys", "values in the keys"])
def test_attention_to_pages_of_fake_tensors_has_the_shape_of_a_real_one(width, monkeypatch):
    monkeypatch.setattr(paged_attention_module, "by_triton", lambda tensor: True)

    def answer():
        q_SHd, keys_PBGd = torch.zeros(2, 4, 8), torch.zeros(3, 4, 2, 8)
        table_SM, lengths_S = torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
        return paged_attention(q_SHd, keys_PBGd, keys_PBGd[..., :width], table_SM, lengths_S, window=3)

    with FakeTensorMode():
        fake = answer()
    assert (fake.shape, fake.dtype, fake.stride()) == (answer().shape, torch.float32, answer().stride())


@pytest.mark.parametrize("scheme", Scheme)
def test_quantised_products_of_fake_tensors_have_the_shape_of_real_ones(scheme):
    weights = quantise_weights(torch.ones(E, 8, 128), scheme)  # looks for infinities, which a fake cannot tell

    def answer(weights: QuantisedWeights) -> torch.Tensor:
        rows = rows_for(scheme)(torch.ones(T, 128))
        return quantised_gemm(rows, torch.arange(R) % T, torch.tensor([4, 0, 3]), weights, torch.bfloat16)

    with FakeTensorMode() as mode:
        fake = answer(QuantisedWeights(*(mode.from_tensor(w) if isinstance(w, torch.Tensor) else w for w in weights)))
    assert (fake.shape, fake.dtype, fake.stride()) == ((R, 8), torch.bfloat16, answer(weights).stride())


def test_experts_compile_to_one_graph():
    def experts(x_TD, gate_up, down, index_R, counts_E):
        return grouped_swiglu(x_TD, index_R, counts_E, gate_up, down).square()

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=generator).requires_grad_() for s in ((T, D), (E, 2 * F, D), (E, D, F))]
    rest = torch.tensor([4, 2, 0, 0, 1, 3, 4]), torch.tensor([4, 0, 3])
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    results = []
    for function in (experts, compiled):
        out = function(*inputs, *rest)
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)
