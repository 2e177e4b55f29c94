"""Stick-breaking attention against its definition in float64: values, gradients, and what the stick leaves over."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from numerics import assert_close

from expertmesh.kernels.stick_breaking import stick_breaking, stick_breaking_ref


class Case(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    window: int | None
    reason: str


CASES = [
    Case(2, 4, 4, 6, 6, None, "whole sequences, a key-value head for each head"),
    Case(1, 6, 2, 5, 5, None, "grouped heads"),
    Case(1, 3, 1, 7, 7, None, "one key-value head"),
    Case(2, 4, 2, 9, 9, 3, "a window"),
    Case(1, 4, 2, 9, 9, 1, "a window of the token alone"),
    Case(1, 2, 2, 3, 8, None, "the last queries of a longer sequence"),
    Case(1, 2, 1, 1, 8, None, "one query, as in decoding"),
    Case(1, 1, 1, 1, 1, None, "one token"),
    Case(0, 2, 2, 4, 4, None, "no sequences"),
    Case(1, 2, 1, 0, 3, None, "no queries"),
]


def inputs(case: Case, key_width: int = 5, value_width: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(case.keys)
    shapes = (
        (case.batch, case.heads, case.queries, key_width),
        (case.batch, case.kv_heads, case.keys, key_width),
        (case.batch, case.kv_heads, case.keys, value_width),
    )
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def visible_to(case: Case) -> torch.Tensor:
    """Key j of query i, both counted from the end, by the definition of a causal window."""
    at_S1 = torch.arange(case.keys - case.queries, case.keys)[:, None]
    back_SC = at_S1 - torch.arange(case.keys)
    return (back_SC >= 0) & (back_SC < (case.window or case.keys + 1))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_equals_its_definition(case):
    fast, slow, visible = inputs(case), inputs(case), visible_to(case)
    got, want = stick_breaking(*fast, visible), stick_breaking_ref(*slow, visible)
    assert_close(got, want)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (got * grad).sum().backward()
    (want * grad + 0 * sum(t.sum() for t in slow)).sum().backward()
    for name, mine, theirs in zip("qkv", fast, slow, strict=True):
        assert_close(mine.grad, theirs.grad, what=f"gradient of {name}")


def test_each_sequence_may_see_its_own_keys():
    """Holes that a mixture of depths leaves: an unseen key takes nothing, as if it were not there."""
    q, k, v = inputs(Case(2, 2, 1, 6, 6, None, ""))
    seen_BC = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    visible = torch.ones(6, 6, dtype=torch.bool).tril() & seen_BC[:, None, None, :]
    o_BHSe = stick_breaking(q, k, v, visible)
    assert_close(o_BHSe, stick_breaking_ref(q, k, v, visible))
    for b in range(2):
        kept = seen_BC[b]
        alone = stick_breaking(*(t[b : b + 1, :, kept] for t in (q, k, v)), torch.ones(sum(kept), sum(kept)).tril() > 0)
        assert_close(o_BHSe[b : b + 1, :, kept], alone)


def logits_of(rows_SC: torch.Tensor) -> list[torch.Tensor]:
    """q, k and v with these logits, and weights for answers: key j's value is the j-th unit vector."""
    queries, keys = rows_SC.shape
    scale = keys**0.5  # the width of the keys
    unit = torch.eye(keys, dtype=rows_SC.dtype)
    return [(rows_SC * scale)[None, None], unit[None, None], unit[None, None]]


def test_half_a_quarter_an_eighth_from_the_nearest_back():
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    weights_SC = stick_breaking(*logits_of(torch.zeros(5, 5, dtype=torch.float64)), causal)[0, 0]
    assert_close(weights_SC[4], 0.5 ** torch.tensor([5.0, 4, 3, 2, 1], dtype=torch.float64))
    assert_close(weights_SC[1], torch.tensor([0.25, 0.5, 0, 0, 0], dtype=torch.float64))


def test_what_is_handed_out_and_what_is_kept_make_one():
    """sum of a + product of (1 - b) = 1."""
    logits_SC = 3 * torch.randn(40, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    weights_SC = stick_breaking(*logits_of(logits_SC), causal)[0, 0]
    kept_S = (1 - logits_SC.sigmoid()).masked_fill(~causal, 1.0).prod(-1)
    assert (kept_S > 1e-12).any(), "a rest that shows"
    assert_close(weights_SC.sum(-1) + kept_S, torch.ones(40, dtype=torch.float64))


def test_a_large_logit_leaves_the_small_ones_their_digits():
    """Nearer keys are asked first: what lies behind a key that takes all does not blur what lies before it."""
    logits_1C = torch.tensor([[0.3, 5000.0, -0.7, 0.2]])
    weights_C = stick_breaking(*logits_of(logits_1C), torch.ones(1, 4, dtype=torch.bool))[0, 0, 0]
    last, third = torch.tensor([0.2, -0.7], dtype=torch.float64).sigmoid()
    rest = (1 - last) * (1 - third)
    assert_close(weights_C, torch.stack([0 * rest, rest, (1 - last) * third, last]))


@pytest.mark.parametrize("logit", [-1e4, 1e4], ids=["nobody takes anything", "the nearest takes all"])
def test_extreme_logits_have_finite_answers_and_gradients(logit):
    q, k, v = (t.requires_grad_() for t in logits_of(torch.full((3, 3), logit)))
    o_BHSe = stick_breaking(q, k, v, torch.ones(3, 3, dtype=torch.bool).tril())
    assert torch.equal(o_BHSe[0, 0], torch.eye(3) * (logit > 0))
    o_BHSe.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))


def test_bfloat16_is_computed_in_float32():
    """The whole of it: a product of 200 factors in bfloat16 would be off by far more than one rounding."""
    q, k, v = (t.detach().bfloat16() for t in inputs(Case(1, 2, 1, 200, 200, None, "")))
    causal = torch.ones(200, 200, dtype=torch.bool).tril()
    o_BHSe = stick_breaking(q, k, v, causal)
    assert o_BHSe.dtype == torch.bfloat16
    assert torch.equal(o_BHSe, stick_breaking(q.float(), k.float(), v.float(), causal).bfloat16())
