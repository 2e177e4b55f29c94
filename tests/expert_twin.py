"""Routed experts of any kind against one function of one token: rows, gradients, and the corner cases of the counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from numerics import assert_close
from twin import Weights, shared_gradients, shared_weights

from expertmesh.kernels.rows import Rows
from expertmesh.system.model.context import Context
from expertmesh.system.model.experts import RoutedExperts

Twin = Callable[[Weights, torch.Tensor], torch.Tensor]
"""(the tensors of one expert by their names in a checkpoint, x_D) -> E(x), in float64."""

COUNTS = [
    ([3, 0, 2, 6], "an expert with no rows"),
    ([0, 0, 0, 0], "no rows"),
    ([0, 1, 0, 0], "one row"),
    ([0, 0, 0, 5], "all rows on one expert"),
]


def assert_equals_twin(
    experts: RoutedExperts, width: int, twin: Twin, counts: list[int], context: Context | None = None
) -> None:
    """Output, gradient of the rows and of every weight."""
    generator = torch.Generator().manual_seed(sum(counts))
    rows_RD, grad_RD = (torch.randn(sum(counts), width, generator=generator) for _ in range(2))
    rows_RD.requires_grad_()
    y_RD = experts(Rows(rows_RD, None, torch.tensor(counts)), context)
    (y_RD * grad_RD).sum().backward()

    wide_RD, w = rows_RD.detach().double().requires_grad_(), shared_weights(experts)
    answers, rows = [wide_RD.new_zeros(0, width)], iter(wide_RD)
    for expert, count in enumerate(counts):
        own = {name.removeprefix(f".{expert}."): t for name, t in w.items() if name.startswith(f".{expert}.")}
        answers += [twin(own, next(rows))[None] for _ in range(count)]
    expected_RD = torch.cat(answers)
    ((expected_RD * grad_RD.double()).sum() + 0 * sum(t.sum() for t in [*w.values(), wide_RD])).backward()

    assert_close(y_RD, expected_RD, what="output")
    assert_close(rows_RD.grad, wide_RD.grad, what="gradient of the rows")
    for name, gradient in shared_gradients(experts).items():
        assert_close(gradient, w[name].grad, what=f"gradient of {name}")
