"""Attention to keys and values in pages, against the definition in float64: one new token a sequence, and many."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from numerics import assert_close

from expertmesh.kernels import paged_attention as module
from expertmesh.kernels import paged_attention_triton as kernels
from expertmesh.kernels.paged_attention import paged_attention, paged_attention_ref, paged_prefill, paged_prefill_ref
from expertmesh.kernels.tiles import CHIPS, GFX942, SM_90

F32, BF16 = torch.float32, torch.bfloat16


class Case(NamedTuple):
    lengths: list[int]
    heads: int
    groups: int
    d: int
    e: int  # 0: the values are the first half of the keys
    page: int
    window: int | None
    reason: str


CASES = [
    Case([], 4, 2, 8, 8, 4, None, "no sequences"),
    Case([1], 1, 1, 1, 1, 1, None, "one token, one of everything"),
    Case([1, 1], 4, 2, 16, 16, 16, None, "the first token of two sequences"),
    Case([4, 8, 5], 4, 2, 8, 8, 4, None, "lengths that are a page, two pages, and one more"),
    Case([0, 7, 0], 4, 2, 8, 8, 4, None, "places without a sequence"),
    Case([9, 30], 9, 3, 5, 7, 3, None, "odd sizes: heads in threes, pages of 3"),
    Case([40, 3], 4, 4, 16, 16, 16, None, "no sharing: as many key-value heads as query heads"),
    Case([70, 33], 20, 1, 24, 16, 16, None, "MFA: many heads on one key-value head, d and e differ"),
    Case([70, 33], 20, 1, 48, 0, 16, None, "MLA: the value is a part of the key"),
    Case([13, 3, 1], 6, 2, 8, 8, 8, 3, "a window smaller than a page"),
    Case([9, 10, 11], 4, 2, 8, 8, 4, 1, "a window of the token itself"),
    Case([40, 90], 4, 2, 8, 8, 8, 20, "a window that begins inside a page"),
    Case([16, 20], 4, 2, 8, 8, 8, 100, "a window longer than the sequences"),
    Case([300, 1, 129], 8, 2, 32, 32, 16, None, "long and short together: several parts, and one"),
]
LARGEST = [case for case in CASES if sum(case.lengths) > 100]


def inputs_for(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, keys, values, table, lengths. Pages in no order; what no sequence holds is NaN, and its table entry absurd."""
    generator = torch.Generator().manual_seed(sum(case.lengths) + case.d)
    needed = [-(-length // case.page) for length in case.lengths]
    pages = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    keys = torch.full((len(pages), case.page, case.groups, case.d), math.nan)
    values = torch.full((len(pages), case.page, case.groups, case.e or case.d), math.nan)
    table = torch.full((len(needed), max(needed, default=0) + 1), 2**30, dtype=torch.int32)
    for s, (length, count) in enumerate(zip(case.lengths, needed, strict=True)):
        for m in range(count):
            table[s, m] = page = pages.pop()
            filled = min(case.page, length - m * case.page)
            keys[page, :filled] = torch.randn(filled, case.groups, case.d, generator=generator)
            values[page, :filled] = torch.randn(filled, case.groups, values.shape[3], generator=generator)
    q = torch.randn(len(needed), case.heads, case.d, generator=generator)
    keys, values = keys.to(dtype), values.to(dtype)
    values = values if case.e else keys[..., : case.d // 2]
    return q.to(dtype), keys, values, table, torch.tensor(case.lengths, dtype=torch.int32)


def in_float64(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *rest: Any) -> tuple[Any, ...]:
    return q.double(), keys.double(), values.double(), *rest


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory is NaN, so that a number nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["by sequence", "triton, whole", "triton, parts"])
def way(request, monkeypatch):
    """How it is computed: whole sequences, or parts of at least one step, of which a few hold nothing."""
    monkeypatch.setattr(module, "by_triton", lambda tensor: request.param != "by sequence")
    monkeypatch.setattr(kernels, "PART_POSITIONS", 1)
    monkeypatch.setattr(kernels, "parts_for", lambda *_: 3 if request.param == "triton, parts" else 1)
    return request.param


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_one_new_token(case, dtype, way):
    if dtype == BF16 and way != "by sequence" and case not in LARGEST:
        return  # the interpreter is slow, and other operands show nothing new about bounds
    inputs = inputs_for(case, dtype)
    got = paged_attention(*inputs, window=case.window)
    assert got.dtype == dtype and got.is_contiguous()
    # Triton's interpreter truncates to bfloat16 where hardware rounds: an error of up to 2^-7.
    truncated = {"rms_error": 1e-2} if dtype == BF16 and way != "by sequence" else {}
    assert_close(got, paged_attention_ref(*in_float64(*inputs), window=case.window), **truncated)
    assert torch.equal(got, paged_attention(*inputs, window=case.window))


@pytest.mark.parametrize("heads", kernels.SHIPPED, ids=lambda heads: heads.name)
def test_tiles_of_models(heads, monkeypatch):
    """The widths of real models, which cut keys in two and heads over several programs; many sequences stay whole."""
    monkeypatch.setattr(module, "by_triton", lambda tensor: True)
    value = 0 if heads.shared else heads.e
    case = Case([70, 3], heads.shared_by, 1, heads.d, value, 16, None, heads.name)
    q, keys, values, table, lengths = inputs_for(case, BF16)
    values = keys[..., : heads.e] if heads.shared else values
    got = paged_attention(q, keys, values, table, lengths)
    assert_close(got, paged_attention_ref(*in_float64(q, keys, values, table, lengths)), rms_error=1e-2)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("heads", kernels.SHIPPED, ids=lambda heads: heads.name)
def test_the_buffers_of_a_tile_fit(heads, itemsize, chip):
    tile = kernels.attention_tile(heads.shared_by, heads.d, heads.e, itemsize, heads.shared, chip)
    width = heads.d + (0 if heads.shared else heads.e)
    queries = 0 if chip == GFX942 else tile.rows * heads.d  # there they lie in registers
    assert (queries + (tile.stages - 1) * tile.depth * width) * itemsize <= chip.shared_bytes


def test_few_sequences_are_cut_and_many_are_not():
    assert kernels.parts_for(8, 65536, SM_90) == 33, "one sequence, 8 key-value heads: two programs a multiprocessor"
    assert kernels.parts_for(8, 400, SM_90) == 2, "a part shorter than that is not worth the second kernel"
    assert kernels.parts_for(1, 65536, SM_90) == kernels.PARTS
    assert kernels.parts_for(400, 65536, SM_90) == 1


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_several_new_tokens(case, dtype):
    _, keys, values, table, lengths = inputs_for(case, dtype)
    queries = [min(length, (9, length, 2)[s % 3]) for s, length in enumerate(case.lengths)]  # some, all, few
    q = torch.randn(sum(queries), case.heads, case.d, generator=torch.Generator().manual_seed(1)).to(dtype)
    inputs = q, keys, values, table, case.lengths, queries
    got = paged_prefill(*inputs, window=case.window)
    assert got.dtype == dtype
    assert_close(got, paged_prefill_ref(*in_float64(*inputs), window=case.window))


def test_by_hand(way):
    """Two positions in two pages, keys 0 and log 3 for a query of 1: weights 1/4 and 3/4."""
    keys = torch.tensor([math.log(3), 0.0, 9.0]).view(3, 1, 1, 1)
    values = torch.tensor([8.0, 4.0, 9.0]).view(3, 1, 1, 1)
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    got = paged_attention(torch.ones(1, 1, 1), keys, values, table, torch.tensor([2], dtype=torch.int32), scale=1.0)
    assert_close(got, torch.full((1, 1, 1), 4 / 4 + 8 * 3 / 4))


def test_absorbed_mla_is_mla():
    """DeepSeek-V2, section 2.1.2: the key projection goes to the query, the value projection to the output."""
    generator = torch.Generator().manual_seed(0)
    heads, latent, rope, nope, value, length = 4, 6, 2, 5, 3, 11
    sizes = (
        (length, latent),
        (length, rope),
        (heads, nope, latent),
        (heads, value, latent),
        (heads, nope),
        (heads, rope),
    )
    c_Cr, rope_Cx, up_k, up_v, q_nope, q_rope = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes
    )
    scale = 1 / math.sqrt(nope + rope)
    scores_HC = torch.einsum("hn,hnr,cr->hc", q_nope, up_k, c_Cr) + torch.einsum("hx,cx->hc", q_rope, rope_Cx)
    want_He = torch.einsum("hc,cr,hvr->hv", (scores_HC * scale).softmax(-1), c_Cr, up_v)
    keys = torch.cat([c_Cr, rope_Cx], -1).view(1, length, 1, latent + rope)
    q = torch.cat([torch.einsum("hn,hnr->hr", q_nope, up_k), q_rope], -1)[None]
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    o_Hr = paged_attention(q, keys, keys[..., :latent], table, lengths, scale=scale)[0]
    assert_close(torch.einsum("hr,hvr->hv", o_Hr, up_v), want_He)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"q": torch.zeros(2, 4, 5)}, "do not fit"),
        ({"q": torch.zeros(2, 3, 8)}, "do not fit"),
        ({"values": torch.zeros(3, 5, 2, 8)}, "do not fit"),
        ({"table": torch.zeros(3, 2, dtype=torch.int32)}, "do not fit"),
        ({"q": torch.zeros(2, 4, 8, dtype=BF16)}, "cast"),
        ({"window": 0}, "1 or more"),
    ],
)
def test_says_what_is_wrong(changed, says):
    names = ("q", "keys", "values", "table", "lengths")
    good = (torch.zeros(2, 4, 8), *[torch.zeros(3, 4, 2, 8)] * 2, torch.zeros(2, 2), torch.ones(2))
    arguments = dict(zip(names, good, strict=True)) | {"window": None} | changed
    with pytest.raises(ValueError, match=says):
        paged_attention(*(arguments[name] for name in names), window=arguments["window"])


@pytest.mark.parametrize("queries", [[2, 2], [9, 1]], ids=["fewer than rows", "more than there are tokens"])
def test_prefill_says_what_is_wrong(queries):
    cache = torch.zeros(3, 4, 2, 8)
    with pytest.raises(ValueError, match="do not fit"):
        paged_prefill(torch.zeros(10, 4, 8), cache, cache, torch.zeros(2, 2, dtype=torch.int32), [8, 8], queries)
