"""The bench compares before it times: every peer agrees with a float64 loop, and a wrong one is caught."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from numerics import assert_close
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from expertmesh.launch.bench import cases, timing
from expertmesh.launch.bench.cases import DTYPES, QUICK, TAUS, Case, Grid, change_grid, choose, draw, draw_plus_plus
from expertmesh.launch.bench.layer import Layer, ours
from expertmesh.launch.bench.limits import libraries, limits
from expertmesh.launch.bench.moe import Row, bench_moe
from expertmesh.launch.bench.peers import Peer, all_peers, one_rank
from expertmesh.launch.bench.reference import disagreement, expected
from expertmesh.launch.bench.table import table
from expertmesh.launch.cli import app
from expertmesh.system.model.moe import MoE

KEYS = {"what", "dtype", "tokens", "experts", "top_k", "pass", "seconds", "ratio_to_limit", "ratio_to_ours"}
SIZES = [  # tokens, experts, top_k, why
    (1, 8, 1, "one token, one choice: DeepSpeed and Megatron-Core weight it by its probability, the others by 1"),
    (7, 16, 2, "odd; more experts than half of the slots, so some have no row"),
    (9, 8, 8, "every token on every expert"),
]


def tiny(tokens: int, experts: int, top_k: int, dtype: str = "float32") -> Case:
    return Case(dtype, tokens, experts, top_k, hidden_size=32, ffn_size=48)


def tiny_grid() -> Grid:
    return Grid((5,), (8,), (2,), ("float32",), hidden_size=32, ffn_size=48)


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    """One round, and one set of tokens even for a few of them: nothing here looks at a time."""
    with pytest.MonkeyPatch.context() as patch, one_rank():
        patch.setattr(cases, "DECODE_TOKENS", 0)
        patch.setattr(timing, "ROUNDS", 1)
        patch.setattr(timing, "MOST_ROUNDS", 1)
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "experts", "top_k", "why"), SIZES, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("peer", all_peers(), ids=lambda peer: peer.what)
def test_peer_agrees_with_the_float64_loop(peer, tokens, experts, top_k, why, dtype):
    problem = draw(tiny(tokens, experts, top_k, dtype))
    layer, right = peer.build(problem), expected(problem, peer.renormalises(top_k))
    assert not disagreement(layer.inferred(problem), right, dtype)
    answers = layer.answers(problem)
    assert set(answers) == {"y", "x", "router", "gate_up", "down"}
    assert not disagreement(answers, right, dtype)


def test_reference_against_every_slot_in_turn():
    """The loop over experts says what a loop over tokens says, zero-computation experts included."""
    problem = draw_plus_plus(tiny(40, 8, 2), taus=(0.5,))[1]
    weights, x_TD = problem.weights, problem.inputs_STD[0].double()
    y_TD, seen = torch.zeros_like(x_TD), set()
    for y_D, x_D in zip(y_TD, x_TD, strict=True):
        probabilities_N = (weights.router_ND.double() @ x_D).softmax(0)
        for expert in probabilities_N.argsort(descending=True)[:2].tolist():
            if expert < 8:
                gate_F, up_F = (weights.gate_up_EGD[expert].double() @ x_D).chunk(2)
                out_D = weights.down_EDF[expert].double() @ (gate_F * gate_F.sigmoid() * up_F)
            elif expert < 10:
                keep, replaced = (weights.mix_C2D[expert - 8].double() @ x_D).softmax(0)
                out_D = keep * x_D + replaced * weights.constant_CD[expert - 8].double()
            else:
                out_D = x_D if expert == 10 else torch.zeros_like(x_D)
            seen.add(expert)
            y_D += probabilities_N[expert] * out_D
    assert seen == set(range(12)), "some expert was not asked"
    assert_close(expected(problem, renormalises=False).answers["y"], y_TD)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_routed_the_same_in_every_dtype(dtype):
    problem = draw(tiny(2048, 16, 2, dtype))
    x_TD, router_ND = problem.inputs_STD[0], problem.weights.router_ND
    rounded = (x_TD @ router_ND.T).topk(2, dim=-1).indices
    assert torch.equal(rounded.sort().values, choose(x_TD, router_ND, 2).sort().values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tau_sends_the_share_of_slots_that_the_balance_loss_asks_for(dtype):
    vanilla, *others = draw_plus_plus(Case(dtype, 1024, 8, 2, 64, 16))
    for tau, problem in zip(TAUS, others, strict=True):
        chosen = choose(problem.inputs_STD[0], problem.weights.router_ND, 2)
        share = float((chosen < 8).double().mean())
        assert share == pytest.approx(tau * 8 / (tau * 8 + 4), abs=0.01)
        assert torch.equal(problem.inputs_STD, vanilla.inputs_STD)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ours_agrees_with_zero_computation_experts(dtype):
    problem = draw_plus_plus(tiny(40, 8, 2, dtype), taus=(0.1,))[1]
    layer = ours(problem, renormalises=False)
    answers = layer.answers(problem)
    assert {"mix", "constant"} < set(answers)
    assert not disagreement(answers, expected(problem, renormalises=False), dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_limits_are_the_products_of_the_layer(dtype):
    """Flops of grouped and dense are the same, and each library leaves the products where it says, or nowhere."""
    problem = draw(tiny(7, 16, 2, str(dtype).removeprefix("torch.")))
    found = {kind: limit for kind, (limit,) in limits(problem).items()}
    for limit in found.values():
        rows = sum(len(product.left) for product in limit.forward[::2])
        assert rows == 7 * 2
        assert len(limit.backward) == 2 * len(limit.forward)
    for name, library in libraries(dtype).items():
        library(found["grouped"].forward + found["grouped"].backward)
        first = found["grouped"].forward[0]
        if name != "oneDNN":
            assert_close(first.out, first.left.double() @ first.right.double())


def spoil(peer: Peer) -> Peer:
    """The peer with the last slot of every token forgotten."""

    def build(problem):
        return peer.build(problem._replace(case=Case(**{**vars(problem.case), "top_k": problem.case.top_k - 1})))

    return Peer("spoilt", build)


def missing(problem):
    importlib.import_module("nobody_has_this")


def raising(problem):
    def forward(x_TD):
        raise NotImplementedError("no such operator here")

    return Layer(nn.Linear(1, 1), forward, {})


@pytest.fixture(scope="module")
def tables(short: None) -> list[list[Row]]:
    """Of a run with one right peer, and four that cannot be timed."""
    peers = [
        Peer("absent", missing),
        Peer("too big", missing, unfit=lambda case: "not run: takes 17 GB"),
        Peer("raising", raising),
        spoil(all_peers()[-1]),
        all_peers()[-1],
    ]
    return list(bench_moe(tiny_grid(), lambda line: None, peers))


def test_rows_of_a_run(tables):
    assert [(rows[0]["pass"], len(rows)) for rows in tables[2:]] == [("forward", 6), ("forward+backward", 6)]
    for rows in tables[:2]:
        by_name = {row["what"]: row for row in rows}
        assert all(row.keys() >= KEYS for row in rows)
        assert by_name["expertmesh"]["ratio_to_ours"] == 1
        assert min(row["ratio_to_limit"] for row in rows if row["what"].startswith("limit: grouped")) <= 1
        assert by_name["torch loop over experts"]["seconds"] > 0
        reasons = {what: by_name[what]["note"] for what in ("absent", "too big", "raising", "spoilt")}
        assert all(by_name[what]["seconds"] is None for what in reasons)
        assert reasons["absent"] == "not installed: nobody_has_this"
        assert reasons["too big"] == "not run: takes 17 GB"
        assert reasons["raising"] == "failed: NotImplementedError: no such operator here"
        assert reasons["spoilt"].startswith("wrong in float32: inferring, the output is off by")
    sent = [row["dispatched_bytes"] for row in tables[2]]
    assert sent[0] == 5 * 2 * 32 * 4 * 2, "top-2 rows of 32 float32, there and back"
    assert sent[1:] == sorted(sent[1:]) and sent[-1] < sent[0]
    assert [row["dispatched_bytes"] for row in tables[3]] == [2 * sent_forward for sent_forward in sent]


def test_our_own_layer_being_wrong_ends_the_run(monkeypatch):
    right = MoE.forward
    monkeypatch.setattr(MoE, "forward", lambda *given: (1.01 * right(*given)[0], None))
    with pytest.raises(RuntimeError, match="our own layer is wrong at float32, 5 tokens"):
        list(bench_moe(tiny_grid(), lambda line: None, []))


@pytest.mark.parametrize("name", ["router", "gate_up", "down"])
def test_a_wrong_gradient_is_caught(name):
    problem = draw(tiny(7, 16, 2))
    answers = ours(problem).answers(problem)
    answers[name][0] *= 1.01
    assert disagreement(answers, expected(problem, True), "float32").startswith(f"the gradient of {name} is off by")


def test_a_slow_contender_is_taken_once(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 3)
    monkeypatch.setattr(timing, "MOST_ROUNDS", 3)
    visited: list[str] = []

    def seconds_of(sample: timing.Sample) -> float:
        for call in sample:
            call()
        return 50.0 if visited[-1] == "slow" else 1.0

    monkeypatch.setattr(timing, "_seconds", seconds_of)
    samples = {what: [partial(visited.append, what)] * 2 for what in ("quick", "slow", "other")}
    seconds = timing.time_in_turn(samples)
    assert {what: len(taken) for what, taken in seconds.items()} == {"quick": 3, "slow": 1, "other": 3}
    assert visited.count("slow") == 2, "a call to warm up, and one"
    rounds = visited[-12::2]  # two calls a sample
    assert rounds == ["quick", "other", "other", "quick", "quick", "other"], "the beginning moves on"


def test_speed_compares_within_a_round():
    """The machine was three times as busy in the second round: both took three times as long."""
    assert timing.speed([1.0, 3.0, 1.0], of=[2.0, 6.0, 2.0]) == 2


def test_table_shows_ratios_and_reasons(tables):
    console = Console(width=140)
    with console.capture() as capture:
        console.print(table(tables[0]), table(tables[2]))
    text = capture.get()
    assert "forward, float32, 5 tokens, 8 experts, top-2" in text
    assert "absent: not installed: nobody_has_this" in text
    assert "MoE++ 8+4, tau 0.75" in text


def test_the_verb_prints_rows_of_every_peer_and_nothing_else():
    sizes = "--tokens 5 --experts 8 --top-k 2 --dtype float32 --hidden-size 32 --ffn-size 48"
    done = CliRunner().invoke(app, ["bench", "moe", *sizes.split(), "--json"])
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {peer.what for peer in all_peers()} < {row["what"] for row in rows if row["seconds"]}
    refused = CliRunner().invoke(app, ["bench", "moe", "--tokens", "0"])
    assert (refused.exit_code, refused.stderr) == (2, "expertmesh: tokens=[0]: all must be 1 or more\n")


REFUSED = [
    ({"tokens": "1,x"}, "tokens=1,x: give numbers"),
    ({"tokens": "0"}, "tokens=[0]: all must be 1 or more"),
    ({"dtype": "float16"}, "dtype=float16: it must be one of float32, bfloat16"),
    ({"experts": "4", "top_k": "8"}, "top_k=[8] are all more than experts=[4]"),
    ({"hidden_size": 40}, "hidden_size=40, ffn_size=1024: both must be multiples of 16"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:20])
def test_grid_refuses(changes, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        change_grid(False, **changes)


def test_grid_takes_what_the_command_line_says():
    assert change_grid(True) == QUICK
    grid = change_grid(True, tokens="1,32", dtype="bfloat16")
    assert (grid.tokens, grid.experts, grid.dtypes) == ((1, 32), QUICK.experts, ("bfloat16",))
    sizes = {(case.experts, case.top_k) for case in Grid().cases()}
    assert sizes == {(experts, top_k) for experts in (8, 16, 64) for top_k in (1, 2, 8)}
