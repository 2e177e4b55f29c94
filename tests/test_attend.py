"""What a query sees, one query at a time in float64; and serving from a cache sees what training sees."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from bites import Bite, attend_of, cache_for
from numerics import assert_close
from tiny import context_of

from expertmesh.parallel.dispatchers import LocalDispatcher
from expertmesh.system.model.attend import CausalAttend, Look, attend_to
from expertmesh.system.model.block import build_attention
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.context import Context
from expertmesh.system.model.weights import initialise

HEADS, GROUPS = 4, 2


def qkv(tokens: int, seed: int = 0) -> list[torch.Tensor]:
    """q_THd, k_TGd, v_TGe."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (tokens, HEADS, 6), (tokens, GROUPS, 6), (tokens, GROUPS, 3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def twin(q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGe: torch.Tensor, look: Look, seen: list[int]) -> torch.Tensor:
    """The answers of one sequence, to the tokens that are seen, in order."""
    rows = [v_TGe.new_zeros(0, HEADS, v_TGe.shape[-1])]
    for s in seen:
        visible = [p for p in seen if p <= s and (look.window is None or p > s - look.window)]
        heads = []
        for head in range(HEADS):
            shared = head // (HEADS // GROUPS)
            scores_P = torch.stack([q_THd[s, head] @ k_TGd[p, shared] for p in visible]) / q_THd.shape[-1] ** 0.5
            shares_P = scores_P.softmax(-1)
            if look.weighting == "stick_breaking":
                nearer = [(1 - scores_P[i + 1 :].sigmoid()).prod() for i in range(len(visible))]
                shares_P = scores_P.sigmoid() * torch.stack(nearer)
            heads.append(shares_P @ v_TGe[visible, shared])
        rows.append(torch.stack(heads)[None])
    return torch.cat(rows)


LOOKS = [
    (Look(), "all of what came before"),
    (Look(window=3), "a window"),
    (Look(window=1), "a window of the token alone"),
    (Look(window=50), "a window longer than everything"),
    (Look(weighting="stick_breaking"), "stick-breaking"),
    (Look(3, "stick_breaking"), "stick-breaking in a window"),
]
EACH_LOOK = pytest.mark.parametrize("look", [look for look, _ in LOOKS], ids=[reason for _, reason in LOOKS])

CHOSEN = [
    ([[1, 1, 1, 1, 1]], "all of them"),
    ([[1, 0, 1, 1, 0], [1, 1, 0, 0, 1]], "not the same ones in each sequence"),
    ([[0, 0, 1, 0, 1], [1, 1, 1, 1, 1]], "not the first, so that some queries see nothing"),
    ([[0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], "nobody, and one alone"),
    ([], "no sequences"),
]


@EACH_LOOK
@pytest.mark.parametrize("rows, reason", CHOSEN, ids=[reason for _, reason in CHOSEN])
def test_unchosen_tokens_are_neither_asked_nor_seen(look, rows, reason):
    chosen_T = torch.tensor(rows, dtype=torch.bool).flatten()
    fast, slow = qkv(len(chosen_T)), qkv(len(chosen_T))
    got_THe = CausalAttend(5).among(chosen_T)(0, *(t[chosen_T] for t in fast), look)
    sequences = zip(*(t.unflatten(0, (len(rows), 5)) for t in slow), strict=True)
    seen = [[s for s, chosen in enumerate(row) if chosen] for row in rows]
    want_THe = torch.cat(
        [slow[2].new_zeros(0, HEADS, 3), *(twin(*s, look, p) for s, p in zip(sequences, seen, strict=True))]
    )
    assert_close(got_THe, want_THe)

    grad = torch.randn(want_THe.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (got_THe * grad).sum().backward()
    (want_THe * grad + 0 * sum(t.sum() for t in slow)).sum().backward()
    for name, mine, theirs in zip("qkv", fast, slow, strict=True):
        assert_close(mine.grad, theirs.grad, what=f"gradient of {name}")


@EACH_LOOK
def test_without_a_choice_all_are_seen(look):
    tensors = qkv(10)
    want_THe = torch.cat([twin(*(t[half] for t in tensors), look, list(range(5))) for half in (slice(5), slice(5, 10))])
    assert_close(CausalAttend(5)(0, *tensors, look), want_THe)


@EACH_LOOK
@pytest.mark.parametrize("queries", [0, 1, 2, 5], ids="{} queries".format)
def test_queries_stand_at_the_last_places(look, queries):
    tensors = qkv(5)
    q_BHSd, k_BGCd, v_BGCe = (t.transpose(0, 1)[None] for t in tensors)
    got_THe = attend_to(q_BHSd[:, :, 5 - queries :], k_BGCd, v_BGCe, look)[0].transpose(0, 1)
    assert_close(got_THe, twin(*tensors, look, list(range(5)))[5 - queries :])


class Served(NamedTuple):
    attention: dict[str, Any]
    reason: str


MLA = {"kind": "mla", "heads": 3, "kv_rank": 5, "nope_head_dim": 4, "rope_head_dim": 2, "value_head_dim": 3}
MIXTURE = {"kind": "mixture", "experts": 4, "top_k": 2, "heads": 2, "kv_heads": 2, "head_dim": 4}
SERVED = [
    Served({"heads": 4, "kv_heads": 2, "head_dim": 4, "rope_theta": None, "weighting": "stick_breaking"}, "sticks"),
    Served({"heads": 4, "kv_heads": 2, "head_dim": 4, "weighting": "stick_breaking", "sliding_window": 3}, "a window"),
    Served({"heads": 4, "kv_heads": 2, "head_dim": 4, "output_gate": "head"}, "a gate for each head"),
    Served({"heads": 4, "kv_heads": 2, "head_dim": 4, "output_gate": "element"}, "a gate for each number"),
    Served(
        {
            **MIXTURE,
            "kv_bias": True,
            "rope_theta": None,
            "weighting": "stick_breaking",
            "gate": {"hidden_size": 5, "activation": "gelu", "bias": True},
        },
        "ModuleFormer",
    ),
    Served({**MIXTURE, "top_k": 4}, "BAM, shared keys"),
    Served(MLA, "MLA, absorbed"),
    Served({**MLA, "query_rank": 7}, "MLA with narrow queries, absorbed"),
    Served({**MIXTURE, "top_k": 4, "own_kv": True, "heads": 4}, "BAM, keys of its own for each expert"),
]

# The steps in which two requests of 9 and 6 tokens are served; those of one token come first.
STEPS = [
    ([[Bite(0, 0, 9), Bite(1, 0, 6)]], "whole prompts"),
    ([[Bite(0, p, 1)] for p in range(9)] + [[Bite(1, p, 1)] for p in range(6)], "token by token"),
    ([[Bite(0, 0, 1), Bite(1, 0, 4)], [Bite(0, 1, 7)], [Bite(0, 8, 1), Bite(1, 4, 2)]], "in bites, in company"),
]


@pytest.mark.parametrize("served", SERVED, ids=lambda served: served.reason)
@pytest.mark.parametrize("steps, reason", STEPS, ids=[reason for _, reason in STEPS])
def test_cached_decoding_is_the_full_forward(served, steps, reason):
    width, layers = 12, 2
    config = ModelConfig(layers=layers, hidden_size=width, context_length=9, attention=served.attention)
    attention = build_attention(config).double()
    initialise(attention, seed=2, standard_deviation=0.5)
    generator = torch.Generator().manual_seed(4)
    requests = [torch.randn(length, width, generator=generator, dtype=torch.float64) for length in (9, 6)]
    full = [attention(x_SD, context_of(len(x_SD)))[0] for x_SD in requests]

    cache = cache_for(config)
    cache.keys_LPBGd, values = cache.keys_LPBGd.double(), cache.values_LPBGe.double()
    cache.values_LPBGe = cache.keys_LPBGd[..., : values.shape[-1]] if cache.values_in_keys else values
    with torch.no_grad():
        for bites in steps:
            places = [(bite.slot, bite.place) for bite in bites]
            positions_T = torch.cat([torch.arange(place.start, place.stop) for _, place in places])
            context = Context(positions_T, attend_of(cache, bites), LocalDispatcher(), layer=1)
            y_TD, _ = attention(torch.cat([requests[slot][place] for slot, place in places]), context)
            want_TD = torch.cat([full[slot][place] for slot, place in places])
            # Gates, positions and the router compute in float32 whatever the model.
            assert_close(y_TD.float(), want_TD.detach())


@EACH_LOOK
@pytest.mark.parametrize("steps, reason", STEPS, ids=[reason for _, reason in STEPS])
def test_a_cache_does_not_see_what_was_not_chosen(look, steps, reason):
    chosen = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1]).bool(), torch.tensor([0, 1, 0, 1, 1, 0]).bool()
    tensors = [[t.detach().float() for t in qkv(len(chosen_S), slot)] for slot, chosen_S in enumerate(chosen)]
    full = [
        CausalAttend(len(chosen_S)).among(chosen_S)(0, *(t[chosen_S] for t in tensors[slot]), look)
        for slot, chosen_S in enumerate(chosen)
    ]
    config = ModelConfig(
        layers=1,
        context_length=9,
        attention={"heads": HEADS, "kv_heads": GROUPS, "head_dim": 6},
        moe={"gating_residual": False},
        depth={"layers": [0]},
    )
    cache = cache_for(config)
    cache.values_LPBGe = cache.values_LPBGe[..., :3].contiguous()
    cache.seen_LPB.fill_(True)  # what earlier requests left behind
    for bites in steps:
        places = [(bite.slot, bite.place) for bite in bites]
        chosen_T = torch.cat([chosen[slot][place] for slot, place in places])
        q_THd, k_TGd, v_TGe = (
            torch.cat([tensors[slot][i][place] for slot, place in places])[chosen_T] for i in range(3)
        )
        got_THe = attend_of(cache, bites).among(chosen_T)(0, q_THd, k_TGd, v_TGe, look)
        asked = [chosen[slot].cumsum(0)[place][chosen[slot][place]] - 1 for slot, place in places]
        assert_close(got_THe, torch.cat([full[slot][rows] for (slot, _), rows in zip(places, asked, strict=True)]))
