"""Matrices in factors: against whole matrices built by hand, their sizes, their start, and the guide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expert_twin import COUNTS, Twin, assert_equals_twin
from numerics import assert_close
from tiny import context_of, training_step
from twin import Weights

from expertmesh.kernels.rows import Rows
from expertmesh.system.model.context import Context, TrainingStep
from expertmesh.system.model.experts_config import StructuredConfig
from expertmesh.system.model.structured_experts import MATRICES, StructuredExperts, guidance, shuffle
from expertmesh.system.model.weights import initialise

WIDTH, HIDDEN, EXPERTS = 8, 12, 4
LOW_RANK = {"form": "low_rank", "rank": 3}
BLOCK_DENSE = {"form": "block_dense", "rank": 6, "blocks": 2}
BLOCK_SHUFFLE = {"form": "block_shuffle", "blocks": 4}
FORMS = [
    ({"form": "low_rank", "rank": 1}, "rank 1"),
    (LOW_RANK, "low rank"),
    ({"form": "block_dense", "rank": 5}, "one block is low rank"),
    (BLOCK_DENSE, "block-dense"),
    (BLOCK_SHUFFLE, "block-shuffle, blocks of fewer numbers than there are blocks"),
    ({"form": "block_shuffle", "blocks": 2}, "block-shuffle"),
]
EACH_FORM = pytest.mark.parametrize("form, reason", FORMS, ids=[reason for _, reason in FORMS])


def made(form: dict[str, Any], spread: float = 0.5, **more: Any) -> StructuredExperts:
    config = StructuredConfig(kind="structured", hidden_size=HIDDEN, **form, **more)
    experts = StructuredExperts(config, WIDTH, range(EXPERTS))
    initialise(experts, 3, spread)
    return experts


def at(progress: float) -> Context:
    """A pass at that part of training."""
    return context_of(4, training=TrainingStep(1 + round(1000 * progress), 1001, 0, range(1), 4))


def whole(form: dict[str, Any], w: Weights, matrix: str) -> torch.Tensor:
    """U S V written out, from the two factors as they are stored."""
    inner, outer = (w[f"{matrix}_proj.{part}.weight"] for part in ("inner", "outer"))
    blocks = form.get("blocks", 1)
    v = torch.block_diag(*inner.chunk(blocks))
    if form["form"] != "block_shuffle":
        return outer @ v
    r, s = len(v), len(v) // blocks
    permutation = torch.zeros(r, r, dtype=v.dtype)
    for block in range(blocks):
        for number in range(s):
            permutation[number * blocks + block, block * s + number] = 1
    return torch.block_diag(*outer.chunk(blocks)) @ permutation @ v


def twin(form: dict[str, Any], guide: float = 0) -> Twin:
    def answer(w: Weights, x_D: torch.Tensor) -> torch.Tensor:
        def times(matrix: str, x: torch.Tensor) -> torch.Tensor:
            y = whole(form, w, matrix) @ x
            return y if guide == 0 else guide * w[f"{matrix}_proj.guide.weight"] @ x + (1 - guide) * y

        return times("down", F.silu(times("gate", x_D)) * times("up", x_D))

    return answer


@EACH_FORM
@pytest.mark.parametrize("counts, why", COUNTS, ids=[why for _, why in COUNTS])
def test_equals_the_equation(form, reason, counts, why):
    assert_equals_twin(made(form), WIDTH, twin(form), counts)


@pytest.mark.parametrize("form", [LOW_RANK, BLOCK_DENSE, BLOCK_SHUFFLE], ids=lambda form: form["form"])
@pytest.mark.parametrize("counts, why", COUNTS, ids=[why for _, why in COUNTS])
def test_guided_equals_the_equation(form, counts, why):
    experts = made(form, guided=True)
    for matrix in MATRICES:  # away from its start, where it would change nothing
        experts.get_parameter(f"{matrix}_guide").data.mul_(1.5)
    assert_equals_twin(experts, WIDTH, twin(form, guidance(0.2)), counts, at(0.2))


@EACH_FORM
def test_merged_is_the_product_of_the_factors(form, reason):
    experts = made(form).double()
    rows_RD, counts_E = torch.randn(10, WIDTH, dtype=torch.float64), torch.tensor([4, 0, 1, 5])
    merged = {matrix: experts.merged(matrix) for matrix in MATRICES}
    assert {matrix: tuple(t.shape[1:]) for matrix, t in merged.items()} == {
        "gate": (HIDDEN, WIDTH),
        "up": (HIDDEN, WIDTH),
        "down": (WIDTH, HIDDEN),
    }
    expert_R = torch.arange(EXPERTS).repeat_interleave(counts_E)
    gate_RF, up_RF = (torch.einsum("rfd,rd->rf", merged[matrix][expert_R], rows_RD) for matrix in ("gate", "up"))
    y_RD = torch.einsum("rdf,rf->rd", merged["down"][expert_R], F.silu(gate_RF) * up_RF)
    assert_close(experts(Rows(rows_RD, None, counts_E)), y_RD)


@EACH_FORM
def test_at_the_start_the_guide_changes_nothing_whatever_its_share(form, reason):
    experts, plain = made(form, guided=True).double(), made(form).double()
    rows_RD, counts_E = torch.randn(10, WIDTH, dtype=torch.float64), torch.tensor([4, 0, 1, 5])
    expected_RD = plain(Rows(rows_RD, None, counts_E))
    assert torch.equal(experts(Rows(rows_RD, None, counts_E)), expected_RD), "a worker of the FFN pool"
    assert torch.equal(experts(Rows(rows_RD, None, counts_E), context_of(10)), expected_RD), "serving, validation"
    for progress in (0, 0.1, 0.25, 0.4, 0.5, 1):
        # The guide is the product, rounded to float32.
        assert_close(experts(Rows(rows_RD, None, counts_E), at(progress)), expected_RD, max_error=1e-6, rms_error=1e-7)


def test_the_guide_fades_and_is_gone_after_half_of_training():
    shares = [guidance(i / 20) for i in range(21)]
    assert shares[0] == 1 and shares[5] == pytest.approx(0.5) and shares[10:] == [0] * 11
    assert all(before > after for before, after in zip(shares[:10], shares[1:11], strict=True))
    for progress, has_gradient in ((0.3, True), (0.5, False)):
        experts = made(LOW_RANK, guided=True)
        experts(Rows(torch.randn(4, WIDTH), None, torch.tensor([1, 1, 1, 1])), at(progress)).sum().backward()
        assert (experts.gate_guide.grad is not None) == has_gradient


def test_at_the_first_step_only_the_guide_learns():
    experts = made(BLOCK_DENSE, guided=True)
    rows = Rows(torch.randn(4, WIDTH), None, torch.tensor([1, 1, 1, 1]))
    experts(rows, context_of(4, training=training_step(4))).sum().backward()
    assert not experts.up_inner.grad.any() and experts.up_guide.grad.any()


# Of one [4D, D] and one [D, 4D] matrix with D = 2048 (the paper's table of a 1.27B model): the sizes of their factors.
# There the FFNs of 24 layers, the first of them dense, have these millions; dense ones have 805.
TABLE = [
    ({"form": "low_rank", "rank": 1024}, 516),
    ({"form": "block_dense", "rank": 1536, "blocks": 4}, 486),
    ({"form": "block_shuffle", "blocks": 2}, 516),
    ({"form": "low_rank", "rank": 512}, 275),
    ({"form": "block_dense", "rank": 768, "blocks": 4}, 260),
    ({"form": "block_shuffle", "blocks": 4}, 275),
]


@pytest.mark.parametrize("form, millions", TABLE, ids=str)
def test_published_sizes(form, millions):
    config = StructuredConfig(kind="structured", hidden_size=8192, **form)
    dense = 2 * 8192 * 2048
    factors = config.factor_params(2048, 8192) + config.factor_params(8192, 2048)
    assert round((dense + 23 * factors) / 1e6) == millions


@EACH_FORM
@pytest.mark.parametrize("guided", [False, True])
def test_parameters_are_counted(form, reason, guided):
    experts = made(form, guided=guided)
    assert sum(p.numel() for p in experts.parameters()) == EXPERTS * experts.config.num_params(WIDTH)
    if form["form"] == "low_rank":
        assert experts.config.factor_params(WIDTH, HIDDEN) == form["rank"] * (WIDTH + HIDDEN)


@pytest.mark.parametrize("width, blocks", [(12, 1), (12, 2), (12, 3), (12, 12), (6, 2)])
def test_the_shuffle_is_a_permutation(width, blocks):
    dealt = shuffle(torch.arange(width)[None], blocks)[0]
    assert dealt.sort().values.tolist() == list(range(width))
    assert torch.equal(dealt, torch.arange(width)) == (blocks in (1, width))
    size = width // blocks
    if size >= blocks:  # each block of the second factor reads from every block of the first
        assert all({int(i) // size for i in read} == set(range(blocks)) for read in dealt.split(size))


@pytest.mark.parametrize(
    "form",
    [
        {"form": "low_rank", "rank": 32},
        {"form": "block_dense", "rank": 64, "blocks": 4},
        {"form": "block_shuffle", "blocks": 4},
    ],
    ids=str,
)
def test_initial_products_are_as_loud_as_a_whole_matrix(form):
    config = StructuredConfig(kind="structured", hidden_size=256, **form)
    experts = StructuredExperts(config, 128, range(2))
    initialise(experts, 0, 0.02)
    for matrix, inputs in (("gate", 128), ("up", 128), ("down", 256)):
        variance = experts.merged(matrix).square().sum(dim=2).mean().item()  # of an output, of inputs of variance 1
        assert variance == pytest.approx(inputs * 0.02**2, rel=0.15), matrix
