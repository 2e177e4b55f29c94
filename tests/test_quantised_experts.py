"""The module of quantised experts: its kernel's answers, its names in a checkpoint, bytes that stay bytes."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close
from pydantic import ValidationError

from expertmesh.kernels.quantised_swiglu import quantised_swiglu_ref
from expertmesh.kernels.quantised_weights import quantise_weights
from expertmesh.kernels.rows import Rows
from expertmesh.kernels.scheme import Scheme
from expertmesh.system.model.build_experts import build_experts
from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.model.quantised_experts import QuantisedExperts
from expertmesh.system.model.weights import weights

D, F, E = 20, 150, 3


def experts_of(scheme: Scheme, shard: range = range(E)) -> QuantisedExperts:
    config = MoEConfig(ffn_experts=E, expert={"hidden_size": F}, quantization={"scheme": scheme})
    experts = build_experts(config, D, shard)
    assert isinstance(experts, QuantisedExperts)
    return experts


def filled(scheme: Scheme):
    """The module, by the names that a checkpoint has, and the weights it was filled from."""
    generator = torch.Generator().manual_seed(1)
    matrices = {
        f"experts.{e}.{name}.weight": torch.randn(shape, generator=generator) * 0.2
        for e in range(E)
        for name, shape in (("gate_proj", (F, D)), ("up_proj", (F, D)), ("down_proj", (D, F)))
    }
    stored = {}
    for name, matrix in matrices.items():
        quantised = quantise_weights(matrix[None], scheme)
        stored[name], stored[name + "_scale_inv"] = quantised.values[0], quantised.scales[0]
        if quantised.factors_EP is not None:
            stored[name + "_factor"] = quantised.factors_EP[0]
    experts = experts_of(scheme)
    module = torch.nn.ModuleDict({"experts": experts})
    with torch.no_grad():
        for weight in weights(module):
            assert weight.is_expert and not weight.parameter.requires_grad
            for name, view in weight.split(weight.parameter).items():
                view.copy_(stored.pop(name))
    assert not stored, "all that was stored has a place"
    return experts, matrices


@pytest.mark.parametrize("scheme", Scheme)
def test_answers_are_the_kernels_with_the_weights_of_those_names(scheme):
    experts, matrices = filled(scheme)

    def stacked(*names: str) -> torch.Tensor:
        return torch.stack([torch.cat([matrices[f"experts.{e}.{name}.weight"] for name in names]) for e in range(E)])

    gate_up = quantise_weights(stacked("gate_proj", "up_proj"), scheme, parts=2)
    down = quantise_weights(stacked("down_proj"), scheme)
    generator = torch.Generator().manual_seed(2)  # of a thousand draws four are beyond the bounds
    source_XD, weights_R = torch.randn(4, D, generator=generator), torch.rand(5, generator=generator)
    rows = Rows(source_XD, torch.tensor([0, 3, 1, 1, 2]), torch.tensor([2, 0, 3]), weights_R)
    want = quantised_swiglu_ref(rows.source_XD, rows.index_R, rows.counts_E, gate_up, down, rows.weights_R)
    assert_close(experts(rows), want, max_error=0.1, rms_error=0.03)


@pytest.mark.parametrize("scheme", Scheme)
def test_a_change_of_dtype_leaves_the_bytes_alone(scheme):
    experts, _ = filled(scheme)
    rows = Rows(torch.randn(5, D), None, torch.tensor([2, 0, 3]))
    before = experts(rows), {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    experts.to(dtype=torch.bfloat16).float().half()
    for name, tensor in experts.state_dict().items():
        assert tensor.dtype == before[1][name].dtype and torch.equal(tensor.float(), before[1][name].float()), name
    assert torch.equal(experts(rows), before[0])


def test_a_module_that_moves_takes_them_along():
    assert all(p.is_meta for p in experts_of(Scheme.INT4_FP8).to("meta").parameters())


@pytest.mark.parametrize("scheme", Scheme)
def test_no_experts_here(scheme):
    assert experts_of(scheme, range(0))(Rows(torch.randn(0, D), None, torch.zeros(0, dtype=torch.int64))).shape == (
        0,
        D,
    )


@pytest.mark.parametrize(
    "expert",
    [{"kind": "mlp", "hidden_size": 8}, {"hidden_size": 8, "nested": [0.5, 1]}],
    ids=["no SwiGLU", "nested"],
)
def test_what_cannot_be_quantised_is_said(expert):
    with pytest.raises(ValidationError, match="quantization: experts are"):
        MoEConfig(expert=expert, quantization={"scheme": "fp8-block"})
