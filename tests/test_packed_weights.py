"""Packed weights answer as the weights do, never for others, and are gone with them."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close
from torch import nn

from expertmesh.kernels import packed_weights as module
from expertmesh.kernels.grouped_swiglu import grouped_swiglu, grouped_swiglu_ref
from expertmesh.kernels.packed_weights import packed

SIZES = [  # rows of each expert, D, F, why
    ([3, 0, 17, 1], 7, 13, "odd sizes, and an expert with none"),
    ([0, 1, 0], 32, 48, "one row"),
    ([0, 150], 64, 32, "more rows than the order was chosen for"),
]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def experts(counts: list[int], d: int, f: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Rows, counts, gate_up, down, and weights of the rows."""
    generator = torch.Generator().manual_seed(d)
    shapes = (sum(counts), d), (len(counts), 2 * f, d), (len(counts), d, f)
    rows_RD, gate_up, down = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    weights_R = torch.rand(sum(counts), generator=generator)
    return rows_RD, torch.tensor(counts), nn.Parameter(gate_up), nn.Parameter(down), weights_R


@BOTH
@pytest.mark.parametrize(("counts", "d", "f", "why"), SIZES, ids=[row[-1] for row in SIZES])
def test_answers_are_those_of_the_weights(counts, d, f, why, dtype):
    rows_RD, counts_E, gate_up, down, weights_R = experts(counts, d, f, dtype)
    index_R = torch.arange(len(rows_RD)).flip(0)
    wide = [t.detach().double() for t in (gate_up, down, weights_R)]
    want = grouped_swiglu_ref(rows_RD.double(), index_R, counts_E, *wide)
    with torch.inference_mode():
        plain, first, again = (grouped_swiglu(rows_RD, index_R, counts_E, gate_up, down, weights_R) for _ in range(3))
        # A CPU without bfloat16 products has no order for them: nothing is kept, and answers are the same.
        kept = dtype is torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert (packed(gate_up) is not None) == kept
    for got in (plain, first):
        assert_close(got, want, **({"max_error": 4e-2, "rms_error": 2e-2} if dtype == torch.bfloat16 else {}))
    assert torch.equal(first, again)


def change_in_place(weights: nn.Parameter) -> None:
    with torch.no_grad():
        weights.mul_(2)


def change_storage(weights: nn.Parameter) -> None:
    weights.data = 2 * weights.data


@pytest.mark.parametrize("change", [change_in_place, change_storage])
def test_weights_that_changed_are_packed_anew(change):
    weights_ENK, rows_nK = nn.Parameter(torch.randn(2, 5, 8)), torch.randn(3, 8)
    for _ in range(2):
        with torch.inference_mode():
            assert packed(weights_ENK) is None, "what is seen for the first time may be gone at once"
            for expert in range(2):
                got = packed(weights_ENK).multiply(rows_nK, weights_ENK, expert)
                assert_close(got, rows_nK @ weights_ENK[expert].T)
        change(weights_ENK)


def test_are_gone_with_the_weights():
    weights_ENK, before = nn.Parameter(torch.randn(2, 5, 8)), len(module._seen)
    with torch.inference_mode():
        packed(weights_ENK)
    assert len(module._seen) == before + 1
    del weights_ENK
    assert len(module._seen) == before


def test_training_and_what_cannot_be_watched_keep_nothing():
    before = len(module._seen)
    weights_ENK = nn.Parameter(torch.randn(2, 5, 8))
    with torch.no_grad():  # a validation in the middle of training
        assert packed(weights_ENK) is None and packed(weights_ENK) is None
    with torch.inference_mode():
        unwatched = torch.randn(2, 5, 8)  # torch counts no writes to a tensor of inference mode
        assert packed(unwatched) is None and packed(unwatched) is None
        assert packed(weights_ENK.double()) is None
    assert len(module._seen) == before


def test_a_torch_without_the_operators_packs_nothing(monkeypatch):
    monkeypatch.setattr(module, "is_packable", lambda dtype: False)
    weights_ENK = nn.Parameter(torch.randn(2, 5, 8))
    with torch.inference_mode():
        assert packed(weights_ENK) is None and packed(weights_ENK) is None
