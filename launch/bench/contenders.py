"""Who takes part in `expertmesh bench parallel`, how each is built, and what it sends.

Legend: E experts, T tokens of a rank, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist

from expertmesh.launch.bench.cases import DTYPES, Problem
from expertmesh.launch.bench.layer import Layer, ours
from expertmesh.launch.bench.peers import deepspeed_layer, megatron_layer
from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.build_dispatcher import build_dispatcher
from expertmesh.parallel.dispatch_config import DispatchConfig
from expertmesh.parallel.groups import Groups

OURS = "expertmesh"


class Contender(NamedTuple):
    what: str
    build: Callable[[Problem, int, int], Layer]
    """Of a rank's own tokens and all weights, the rank, and how many there are."""
    sent: Callable[[Layer, Problem], int]
    """Bytes of rows that left this rank: since the last call, or in any step."""
    renormalises: bool
    """Whether the weights of a token's experts add up to 1."""
    note: str = ""
    narrow: bool = False  # rounds rows on their way: its answers are not compared


def contenders(top_k: int) -> list[Contender]:
    """All that compute the plain layer; ours as a recipe has it by default comes first."""
    weighted = top_k > 1  # peers weight a single expert by its probability
    deepspeed = "no token dropped: all experts are padded to the fullest"
    megatron = "all-gather; stubs: router logits by linear(), gathers and sums by gloo: its own name CUDA"
    return [
        our_contender(OURS),
        our_contender(f"{OURS}, 2 chunks", chunks=2),
        our_contender(f"{OURS}, 4 chunks", chunks=4),
        our_contender(f"{OURS}, all-gather", kind="all_gather"),
        our_contender(f"{OURS}, bf16 on the wire", wire="bf16"),
        our_contender(f"{OURS}, FP8 on the wire", wire="fp8"),
        Contender("DeepSpeed MoE", deepspeed_layer, _sent_by_deepspeed, weighted, deepspeed),
        Contender("Megatron-Core MoELayer", megatron_layer, _sent_by_megatron, weighted, megatron),
    ]


def our_contender(what: str, renormalises: bool = True, **keys: Any) -> Contender:
    config, traffic = DispatchConfig(**keys), Traffic()

    def build(problem: Problem, rank: int, ranks: int) -> Layer:
        dispatcher = build_dispatcher(Groups(expert=dist.group.WORLD), config, traffic, "cpu")
        return ours(problem, renormalises, rank, ranks, dispatcher)

    def sent(layer: Layer, problem: Problem) -> int:
        return traffic.take().sent

    return Contender(what, build, sent, renormalises, narrow=config.wire != "native")


def _sent_by_deepspeed(layer: Layer, problem: Problem) -> int:
    """As many rows for each expert as the fullest of any rank has, four times."""
    fullest = layer.module.deepspeed_moe.exp_counts.max()
    dist.all_reduce(fullest, op=dist.ReduceOp.MAX)
    case, ranks = problem.case, dist.get_world_size()
    rows = int(fullest) * case.experts * (ranks - 1) // ranks
    return 4 * rows * case.hidden_size * DTYPES[case.dtype].itemsize


def _sent_by_megatron(layer: Layer, problem: Problem) -> int:
    """All tokens to all ranks, and a sum of each from all, four times."""
    case, ranks = problem.case, dist.get_world_size()
    return 4 * (ranks - 1) * case.tokens * case.hidden_size * DTYPES[case.dtype].itemsize
