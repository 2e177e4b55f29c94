"""`expertmesh bench moe`: our MoE layer beside those of others and beside the limit, in one process and one run.

For each size: draw weights and tokens, let every contender answer, compare the answers and all gradients with a float64
loop, and time those that are right. A peer that is wrong, fails, or is not installed is named with the reason and no
time. Ours being wrong is a failure of the whole run.

Speeds are given as ratios, of medians over rounds in which the contenders take turns: 0.8 of the limit is a layer that
takes 1.25 times as long as its matrix products alone.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from functools import cache, partial
from statistics import median
from typing import Any

import torch

from expertmesh.launch.bench.cases import DTYPES, TAUS, Case, Grid, Problem, choose, draw, draw_plus_plus
from expertmesh.launch.bench.layer import Layer, ours
from expertmesh.launch.bench.limits import Library, Limit, libraries, limits
from expertmesh.launch.bench.peers import Peer, all_peers, one_rank
from expertmesh.launch.bench.reference import Right, disagreement, expected
from expertmesh.launch.bench.timing import Sample, speed, time_in_turn

OURS = "expertmesh"
FORWARD, BOTH = "forward", "forward+backward"
PASSES = (FORWARD, BOTH)
CROSSINGS = {FORWARD: 2, BOTH: 4}  # of a row between ranks: there and back, and their gradients

Row = dict[str, Any]
Say = Callable[[str], None]


def bench_moe(grid: Grid, say: Say, peers: Sequence[Peer] | None = None) -> Iterator[list[Row]]:
    """The rows of one table after another: a size and a pass each.

    A row has `what, dtype, tokens, experts, top_k, pass, seconds` (of one call; None where it was not timed),
    `ratio_to_limit` (its speed over that of the grouped limit), `ratio_to_dense_limit`, `ratio_to_ours`,
    `tokens_per_second, rounds, threads, note`; rows of MoE++ also `ffn_share` and `dispatched_bytes`.

    Raises:
        RuntimeError: if our own layer disagrees with the reference.
    """
    with one_rank():
        for case in grid.cases():
            yield from _case(case, all_peers() if peers is None else peers, say)
        for case in grid.plus_plus_cases():
            yield from _plus_plus(case, say)


def _case(case: Case, peers: Sequence[Peer], say: Say) -> Iterator[list[Row]]:
    say(f"{case}: comparing answers")
    problem = draw(case)
    layers, reasons = _agreeing(problem, peers)
    notes = {peer.what: peer.note for peer in peers}
    bounds, gemms = limits(problem), libraries(DTYPES[case.dtype])
    for of_pass in PASSES:
        say(f"{case}: timing {of_pass}")
        samples: dict[str, Sample] = {
            _limit_name(kind, library): [_products_call(gemm, limit, of_pass) for limit in sets]
            for kind, sets in bounds.items()
            for library, gemm in gemms.items()
        }
        samples |= _layer_samples(layers, dict.fromkeys(layers, problem), of_pass)
        seconds = time_in_turn(samples)
        fastest = {kind: min((seconds[_limit_name(kind, library)] for library in gemms), key=median) for kind in bounds}
        rows = []
        for what, taken in seconds.items():
            ratios = {
                "ratio_to_limit": speed(taken, fastest["grouped"]),
                "ratio_to_dense_limit": speed(taken, fastest["dense"]),
                "ratio_to_ours": speed(taken, seconds[OURS]),
            }
            rows.append(_row(what, case, of_pass, taken, ratios, notes.get(what, "")))
        rows += [_row(what, case, of_pass, [], {}, reason) for what, reason in reasons.items()]
        yield rows


def _agreeing(problem: Problem, peers: Sequence[Peer]) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers whose answers are right, ours first, and why each of the others is not among them."""
    dtype = problem.case.dtype
    right = cache(lambda renormalises: expected(problem, renormalises))
    layers, reasons = {OURS: ours(problem)}, {}
    wrong = _fault(layers[OURS], problem, right(True))
    if wrong:
        raise RuntimeError(f"our own layer is wrong at {problem.case}: {wrong}")
    for peer in peers:
        reason = peer.unfit(problem.case)
        if not reason:
            try:
                with redirect_stdout(sys.stderr), warnings.catch_warnings(action="ignore"):  # no news, no result
                    layer = peer.build(problem)
                    wrong = _fault(layer, problem, right(peer.renormalises(problem.case.top_k)))
                reason = f"wrong in {dtype}: {wrong}" if wrong else ""
            except ImportError as error:
                reason = f"not installed: {error.name or error}"
            except Exception as error:  # of somebody else's code: the others are still worth timing
                reason = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if reason:
            reasons[peer.what] = reason
        else:
            layers[peer.what] = layer
    return layers, reasons


def _fault(layer: Layer, problem: Problem, right: Right) -> str:
    dtype = problem.case.dtype
    wrong = disagreement(layer.inferred(problem), right, dtype)
    return f"inferring, {wrong}" if wrong else disagreement(layer.answers(problem), right, dtype)


def _plus_plus(case: Case, say: Say) -> Iterator[list[Row]]:
    """Our MoE++ layers beside our own vanilla one with the same FFN experts."""
    say(f"{case}: comparing answers of MoE++")
    vanilla, *others = draw_plus_plus(case)
    zero_computation = len(others[0].weights.router_ND) - case.experts
    problems = {OURS: vanilla}
    for tau, problem in zip(TAUS, others, strict=True):
        problems[f"MoE++ {case.experts}+{zero_computation}, tau {tau:.2f}"] = problem
    layers = {}
    for what, problem in problems.items():
        layers[what] = ours(problem, renormalises=False)
        wrong = _fault(layers[what], problem, expected(problem, renormalises=False))
        if wrong:
            raise RuntimeError(f"our own layer is wrong at {case}, {what}: {wrong}")
    shares = {what: _ffn_share(problem) for what, problem in problems.items()}
    row_bytes = case.hidden_size * DTYPES[case.dtype].itemsize
    for of_pass in PASSES:
        say(f"{case}: timing {of_pass} of MoE++")
        seconds = time_in_turn(_layer_samples(layers, problems, of_pass))
        rows = []
        for what, taken in seconds.items():
            row = _row(what, case, of_pass, taken, {"ratio_to_ours": speed(taken, seconds[OURS])}, "")
            sent = round(shares[what] * case.rows) * row_bytes * CROSSINGS[of_pass]
            rows.append(row | {"ffn_share": shares[what], "dispatched_bytes": sent})
        yield rows


def _ffn_share(problem: Problem) -> float:
    """Of the slots, those that need a row."""
    chosen = choose(problem.inputs_STD.flatten(0, 1), problem.weights.router_ND, problem.case.top_k)
    return float((chosen < problem.case.experts).double().mean())


def _limit_name(kind: str, library: str) -> str:
    return f"limit: {kind}, {library}"


def _products_call(gemm: Library, limit: Limit, of_pass: str) -> Callable[[], None]:
    return partial(gemm, limit.forward + (limit.backward if of_pass == BOTH else []))


def _layer_samples(layers: dict[str, Layer], problems: dict[str, Problem], of_pass: str) -> dict[str, Sample]:
    samples: dict[str, Sample] = {}
    for what, layer in layers.items():
        layer.module.train(of_pass == BOTH)
        inputs, gradients = problems[what].inputs_STD.unbind(0), problems[what].gradients_STD.unbind(0)
        if of_pass == BOTH:
            pairs = zip(inputs, gradients, strict=True)
            samples[what] = [partial(_learn_and_forget, layer, x_TD, gradient_TD) for x_TD, gradient_TD in pairs]
        else:
            samples[what] = [partial(layer.infer, x_TD) for x_TD in inputs]
    return samples


def _learn_and_forget(layer: Layer, x_TD: torch.Tensor, gradient_TD: torch.Tensor) -> None:
    layer.learn(x_TD, gradient_TD)
    layer.forget()


def _row(what: str, case: Case, of_pass: str, taken: list[float], ratios: dict[str, float], note: str) -> Row:
    seconds = median(taken) if taken else None
    return {
        "what": what,
        "dtype": case.dtype,
        "tokens": case.tokens,
        "experts": case.experts,
        "top_k": case.top_k,
        "pass": of_pass,
        "seconds": seconds,
        "ratio_to_limit": ratios.get("ratio_to_limit"),
        "ratio_to_dense_limit": ratios.get("ratio_to_dense_limit"),
        "ratio_to_ours": ratios.get("ratio_to_ours"),
        "tokens_per_second": case.tokens / seconds if seconds else None,
        "rounds": len(taken),
        "threads": torch.get_num_threads(),
        "note": note,
    }
