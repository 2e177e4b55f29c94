"""What a slow link costs the exchange of expert rows, and what makes it cost less: ranks on emulated nodes.

One layer's experts are spread over all ranks, each of which has its own tokens; experts are narrow, so that a step,
forward and backward, is mostly its exchanges. The roads are a recipe's (parallel.dispatch): straight to each rank, or
once to each node and on from there; rows as they are, or as FP8; and MoE++ beside a plain layer with the same FFN
experts. Ranks find by their host's name who shares a node, as on a cluster.

Roads that round nothing must give the same bits, which are compared with a float64 loop, and those that round come as
near as FP8 may; then they are timed, in turn. Bytes of a step are counted twice: by the kernel, for each link, with
the headers of all packets; and by the dispatchers, of rows and their choices alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from expertmesh.launch.bench.cases import Case, draw_plus_plus
from expertmesh.launch.bench.layer import ours
from expertmesh.launch.bench.network import Network, Pair, network
from expertmesh.launch.bench.ranks import (
    Row,
    Say,
    answers_of,
    reason_of_any,
    right_of,
    share_of,
    tables_of_ranks,
    time_steps_in_turn,
    train_step,
)
from expertmesh.launch.bench.reference import ROUNDED, Answers, disagreement, expected
from expertmesh.launch.bench.timing import speed
from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.build_dispatcher import build_dispatcher
from expertmesh.parallel.dispatch_config import DispatchConfig
from expertmesh.parallel.groups import Groups

TAU = 0.75


@dataclass(frozen=True)
class SlowLinkCase:
    """The size of one run."""

    rounds: int = 5
    nodes: int = 3
    ranks_per_node: int = 2
    tokens: int = 512  # of each rank
    experts: int = 12  # of all ranks together
    top_k: int = 4
    hidden_size: int = 512
    ffn_size: int = 64
    mbit: float = 1000.0  # of a link, each way
    slow: Pair = (1, 2)  # the nodes at the ends of a slower one
    slow_mbit: float = 100.0
    delay_ms: float = 1.0  # of a packet, where the kernel has netem

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


class Road(NamedTuple):
    """How rows travel."""

    what: str
    plus_plus: bool
    dispatch: dict[str, Any]  # of a recipe


ROADS = (
    Road("all-to-all", False, {}),
    Road("hierarchical", False, {"kind": "hierarchical"}),
    Road("all-to-all, FP8", False, {"wire": "fp8"}),
    Road("hierarchical, FP8", False, {"kind": "hierarchical", "wire": "fp8"}),
    Road(f"MoE++ at tau {TAU}, all-to-all", True, {}),
    Road(f"MoE++ at tau {TAU}, hierarchical", True, {"kind": "hierarchical"}),
    Road(f"MoE++ at tau {TAU}, hierarchical, FP8", True, {"kind": "hierarchical", "wire": "fp8"}),
)


def bench_slow_link(case: SlowLinkCase, say: Say) -> list[Row]:
    """A row for each road.

    It has `what, seconds` (of a step, forward and backward), `ratio` (its speed beside the first road's), `slow_bytes,
    fast_bytes` (that the kernel saw leave by the slow link, and by all others, of all nodes), `link_bytes` (by the two
    nodes, such as "0-1"), `row_bytes` (that the dispatchers counted between nodes), `rounds, note`.

    Raises:
        NoNetwork: if nodes cannot be emulated here.
        RuntimeError: if a road changes what is computed, or a rank fails.
    """
    with network(case.nodes, case.mbit, {case.slow: case.slow_mbit}, case.delay_ms) as nodes:
        say(f"network: {case.nodes} nodes of {case.ranks_per_node} ranks, {nodes.emulated}")
        (rows,) = tables_of_ranks(case.ranks, partial(_tables, case, nodes), say, partial(_enter, case, nodes))
    return rows


def _enter(case: SlowLinkCase, nodes: Network, rank: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = nodes.enter(rank // case.ranks_per_node)


def _tables(case: SlowLinkCase, nodes: Network, rank: int, say: Say) -> Iterator[list[Row]]:
    sizes = case.tokens * case.ranks, case.experts, case.top_k, case.hidden_size, case.ffn_size
    shares, right = [], []
    for whole in draw_plus_plus(Case("float32", *sizes), (TAU,)):
        shares.append(share_of(whole, rank, case.tokens))
        right.append(right_of(expected(whole, renormalises=False), shares[-1], rank, case.ranks))
    steps: dict[str, Callable[[], object]] = {}
    link_bytes: dict[str, dict[Pair, int]] = {}
    row_bytes: dict[str, int] = {}
    straight: dict[bool, Answers] = {}  # of the layers without and with zero-computation experts
    for road in ROADS:
        say(f"network: {road.what}: comparing answers")
        mine, traffic, config = shares[road.plus_plus], Traffic(), DispatchConfig(**road.dispatch)
        dispatcher = build_dispatcher(Groups(expert=dist.group.WORLD), config, traffic, "cpu")
        layer = ours(mine, False, rank, case.ranks, dispatcher)
        answers = answers_of(layer, mine)
        if config.wire == "native":
            reason = _differs(answers, straight.setdefault(road.plus_plus, answers))
            reason = reason or disagreement(answers, right[road.plus_plus], "float32")
        else:
            reason = disagreement(answers, right[road.plus_plus], ROUNDED)
        if reason := reason_of_any(reason, case.ranks):
            raise RuntimeError(f"{road.what}: {reason}")
        steps[road.what] = partial(train_step, layer, mine)
        traffic.take()
        link_bytes[road.what] = _sent_by(steps[road.what], nodes)
        counted = torch.tensor(traffic.take().far)
        dist.all_reduce(counted)
        row_bytes[road.what] = int(counted)
    say(f"network: {case.rounds} rounds of {len(steps)} roads")
    seconds = time_steps_in_turn(steps, case.rounds)
    yield [
        {
            "table": "network",
            "what": what,
            "seconds": median(taken),
            "ratio": speed(taken, seconds[ROADS[0].what]),
            "slow_bytes": link_bytes[what][case.slow],
            "fast_bytes": sum(link_bytes[what].values()) - link_bytes[what][case.slow],
            "row_bytes": row_bytes[what],
            "link_bytes": {f"{a}-{b}": sent for (a, b), sent in link_bytes[what].items()},
            "rounds": case.rounds,
            "note": nodes.emulated,
        }
        for what, taken in seconds.items()
    ]


def _differs(answers: Answers, straight: Answers) -> str:
    for name, answer in answers.items():
        if not torch.equal(answer, straight[name]):
            return f"{name} has other bits than by the straight road"
    return ""


def _sent_by(step: Callable[[], object], nodes: Network) -> dict[Pair, int]:
    """Bytes of one step, by link. What a link still holds when all ranks are done was counted as it set out."""
    dist.barrier()
    before = nodes.sent()
    dist.barrier()
    step()
    dist.barrier()
    after = nodes.sent()
    dist.barrier()
    return {pair: sent - before[pair] for pair, sent in after.items()}
