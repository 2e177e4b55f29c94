"""What a layout asks of each rank: memory that is there before the first token, and bytes that a step sends.

Weights are counted on the model that a rank would build, on torch's meta device: nothing is allocated. Masters are
float32, and so is all else, unless train.dtype is bfloat16. Of P parameters of a kind that n ranks hold alike (at 3 of
those that split the batch or its sequences) a rank has, at each ZeRO stage,

                        0      1, 2       3
    weights             4 P    4 P        4 P / n + 4 W     W: those that are whole at a time (below)
    gradients           4 P + 4 B         4 P / n + 4 W     added up over micro-batches, then reduced, B at a time; at 3
                                                            before
    optimizer           8 P    16 P / n   8 P / n           two moments; at 1 and 2 master weight, reduced gradient too

With bfloat16, at stage 3 alone, it is 2 W; whole weights, tokens and rows then cross in 2 bytes a number for 4 below.

B is the smaller of P and 2^25 (parallel/zero.py). W is the largest of layers, embedding and head, and all that none of
these has alone. A backward may fetch one more ahead of time.

and a step sends from a rank, M micro-batches of T tokens a data-parallel and context-parallel rank, width D:

    pipeline            at each border down and up: 4 M T/tp D, and 4 M T/tp N where logits of N experts cross
    tensor              4 M (tp - 1)/tp T D for each gather or reduce-scatter: forward and backward of each half of a
                        block that is split, of the embedding and of the head
    dispatch            a token crosses to each other rank that has an expert it chose, home, and both gradients do:
                        each crossing 4 D (less on a narrow wire), with the choices 4 (2 K + 1) there, and back the
                        weights' gradient 4 K. all_gather takes it to all other ranks, and home from those it chose.
                        With etp, its K E/N rows cross 4 times more, 4 D each, between each two of the group
    context             8 (cp - 1) T for each number that a token has as key or value: gathered, and their gradients
    reduction           8 (n - 1)/n P, a reduce-scatter and a gather in a ring; what DeepSpeed really sends may be more.
                        At ZeRO 3 12 M (n - 1)/n P: two gathers and a reduce-scatter; one more of what is recomputed;
                        of what none of the above has alone so many for each run of layers.
                        Then 8 (m - 1)/m of each shard that m tensor ranks, or both ends of a pipeline, have: a sum

Dispatch is an expectation: K of all N experts chosen evenly, zero-computation ones too, of which E/ep are on a rank.
The ranks that a token goes to are then (ep - 1) (1 - C(N - E/ep, K) / C(N, K)), with each layer's own ep. There is no
count for an exchange by nodes, nor for the keys and values of other attentions than grouped ones. What train.recompute
computes again crosses again, which is not counted; nor are copies of experts (train.expert_copies), which go by the
load.

Activations are not in here: activations.py counts them.

Legend: P parameters, T tokens, D width, N experts of every kind, E FFN experts, K choices a token.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from expertmesh.parallel.fully_sharded import largest_shard
from expertmesh.parallel.groups import Groups
from expertmesh.parallel.pipeline import runs_of_layers
from expertmesh.parallel.shard import WHOLE
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.parallel.wire import WIRES
from expertmesh.parallel.zero import bucket_of
from expertmesh.system.model.attention_config import AttentionConfig
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.tensor_parallel import LINEAR_MAPS, parallel_transformer
from expertmesh.system.model.transformer import Transformer, logits_cross
from expertmesh.system.model.weights import Weight, weights
from expertmesh.system.plan.membership import members
from expertmesh.system.train.build_optimizer import units_of
from expertmesh.system.train.config import TrainConfig

FLOAT = 4


class RankPlan(NamedTuple):
    """Of every rank of one pipeline stage; bytes."""

    pipeline_rank: int
    layers: list[list[int]]  # of each run: the first, and the one after the last
    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    sent_bytes: dict[str, int | None]  # a step, by what for; None: not counted (see above)

    @property
    def memory_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


class _Members:
    """Stands for a process group where nothing is sent."""

    def __init__(self, ranks: list[int], rank: int) -> None:
        self._size, self._rank = len(ranks), ranks.index(rank)

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def plan_training(model: ModelConfig, sizes: ParallelSizes, train: TrainConfig) -> list[RankPlan]:
    """One for each pipeline rank. The vocabulary must be known, and `check_split` have nothing against the sizes."""
    return [_plan_rank(model, sizes, train, stage) for stage in range(sizes.pp)]


def _plan_rank(model: ModelConfig, sizes: ParallelSizes, train: TrainConfig, stage: int) -> RankPlan:
    with torch.device("meta"):
        part = parallel_transformer(model, _groups(sizes, stage * sizes.stage_size, model.moe.experts_of_layers))
    held = _parameters(part, sizes, train)
    total = sum(parameter.numel() for parameter, _ in held)
    reduced = sum(FLOAT * parameter.numel() * (ranks - 1) / ranks for parameter, ranks in held)
    if train.zero_stage == 3:
        shards = sum(largest_shard(parameter.shape, ranks) for parameter, ranks in held)
        weight_bytes = gradient_bytes = FLOAT * shards + _width(train) * _whole_at_a_time(part)
        optimizer, crossings = 2 * shards, train.micro_batches * (1 + 2 * _width(train) / FLOAT)
        sums = _sums_of_shards(part, sizes)
        # What is no unit of its own comes with each run of layers.
        alone = {parameter for unit in units_of(part).parts for parameter in unit.parameters()}
        rest = [(parameter, ranks) for parameter, ranks in held if parameter not in alone]
        reduced += (sizes.interleave - 1) * sum(FLOAT * p.numel() * (ranks - 1) / ranks for p, ranks in rest)
    else:
        weight_bytes, crossings, sums = FLOAT * total, 2.0, 0.0
        gradient_bytes = weight_bytes + FLOAT * bucket_of(parameter for parameter, _ in held)
        optimizer = 4 * _partitions(held) if train.zero_stage else 2 * total
    return RankPlan(
        pipeline_rank=stage,
        layers=[[run.start, run.stop] for run in part.runs],
        parameters=total,
        weight_bytes=weight_bytes,
        gradient_bytes=gradient_bytes,
        optimizer_bytes=FLOAT * optimizer,
        sent_bytes={
            "pipeline": _pipeline(model, sizes, train, stage),
            "tensor": _tensor(part, sizes, train),
            "dispatch": _dispatch(part, sizes, train),
            "context": _context(part, sizes, train),
            "reduction": round(crossings * reduced + sums),
        },
    )


def _groups(sizes: ParallelSizes, rank: int, experts_of_layers: Iterable[int] = ()) -> Groups:
    held_by = {name: _Members(ranks, rank) for name, ranks in members(sizes, rank).items()}
    own = {each.ep: each for each in map(sizes.with_expert_degree, experts_of_layers) if each.ep < sizes.ep}
    narrower = {degree: _groups(each, rank) for degree, each in own.items()}
    return Groups(rank=rank, interleave=sizes.interleave, narrower=narrower, **held_by)  # type: ignore[arg-type]


def _parameters(part: Transformer, sizes: ParallelSizes, train: TrainConfig) -> list[tuple[nn.Parameter, int]]:
    """Those of a rank that train, each with over how many ranks that hold the same it is reduced, and split."""
    found = []
    for weight in weights(part):
        if not weight.parameter.requires_grad:
            continue
        ranks = sizes.cp * sizes.dp
        if weight.experts is not None:
            ranks = sizes.stage_size // (sizes.etp * sizes.with_expert_degree(weight.experts).ep)
        elif train.zero_stage < 3:
            ranks *= _held_besides(weight, part, sizes)
        found.append((weight.parameter, ranks))
    return found


def _held_besides(weight: Weight, part: Transformer, sizes: ParallelSizes) -> int:
    """On how many ranks that neither split the batch nor its sequences a dense weight is."""
    if weight.parameter is part.tied_weight:
        return 2
    return sizes.tp if weight.shard == WHOLE else 1


def _sums_of_shards(part: Transformer, sizes: ParallelSizes) -> float:
    """Bytes sent after the last backward of fully sharded weights: an all-reduce of shards."""
    sent = 0.0
    for weight in weights(part):
        if weight.parameter.requires_grad and not weight.is_expert:
            ranks = _held_besides(weight, part, sizes)
            sent += 2 * FLOAT * largest_shard(weight.parameter.shape, sizes.cp * sizes.dp) * (ranks - 1) / ranks
    return sent


def _partitions(held: list[tuple[nn.Parameter, int]]) -> int:
    """Numbers in a rank's parts of what DeepSpeed splits, which are runs of all parameters that as many ranks hold."""
    of_ranks: Counter[int] = Counter()
    for parameter, ranks in held:
        of_ranks[ranks] += parameter.numel()
    return sum(-(-count // ranks) for ranks, count in of_ranks.items())


def _whole_at_a_time(part: Transformer) -> int:
    """Numbers of fully sharded weights that a rank has whole while it computes."""
    units = units_of(part)

    def numbers(modules: Iterable[nn.Module]) -> int:
        held = {parameter for module in modules for parameter in module.parameters() if parameter.requires_grad}
        return sum(parameter.numel() for parameter in held)

    several = [*units.parts, *units.experts]
    return numbers([part]) - numbers(several) + max((numbers([unit]) for unit in several), default=0)


def _width(train: TrainConfig) -> int:
    """Bytes of a number of what is computed with."""
    return FLOAT if train.dtype == "float32" else 2


def _tokens(sizes: ParallelSizes, train: TrainConfig) -> int:
    """Of one rank in one step, those that it has with its tensor group."""
    return train.batch_size * train.sequence_length // (sizes.dp * sizes.cp)


def _pipeline(model: ModelConfig, sizes: ParallelSizes, train: TrainConfig, rank: int) -> int:
    runs, sent = runs_of_layers(model.layers, sizes.stages), 0
    for border in range(1, len(runs)):
        logits = model.moe.num_experts if logits_cross(model, runs[border].start) else 0
        # Down from the stage before the border, up from the one behind it.
        sent += (_width(train) * model.hidden_size + FLOAT * logits) * sum(
            (stage % sizes.pp == rank) for stage in (border - 1, border)
        )
    return sent * _tokens(sizes, train) // sizes.tp


def _tensor(part: Transformer, sizes: ParallelSizes, train: TrainConfig) -> int:
    halves = sum(isinstance(module, tuple(LINEAR_MAPS)) for module in part.modules())
    ways = 2 * halves + (part.runs[0].start == 0) + (part.runs[-1].stop == part.config.layers)
    return 2 * ways * _width(train) * _tokens(sizes, train) * part.config.hidden_size * (sizes.tp - 1) // sizes.tp


def _dispatch(part: Transformer, sizes: ParallelSizes, train: TrainConfig) -> int | None:
    dispatch, config, sent = sizes.dispatch, part.config, 0.0
    if sizes.ep > 1 and (dispatch.ranks_per_node or dispatch.kind == "hierarchical"):
        return None
    on_wire = WIRES[dispatch.wire].row_bytes(config.hidden_size, getattr(torch, train.dtype))
    whole = config.hidden_size * _width(train)
    for layer in config.moe_layers:
        if any(layer in run for run in part.runs):
            moe = config.moe_of(layer)
            N, K = moe.num_experts, moe.top_k
            ep = sizes.with_expert_degree(moe.ffn_experts).ep
            wanted = (ep - 1) * (1 - math.comb(N - moe.ffn_experts // ep, K) / math.comb(N, K))
            there = ep - 1 if dispatch.kind == "all_gather" else wanted
            sent += there * (on_wire + FLOAT * (2 * K + 1)) + wanted * (3 * on_wire + FLOAT * K)
            sent += (sizes.etp - 1) * 4 * whole * K * moe.ffn_experts / N
    return round(sent * _tokens(sizes, train) / sizes.tp)


def _context(part: Transformer, sizes: ParallelSizes, train: TrainConfig) -> int | None:
    if sizes.cp == 1:
        return 0
    attention, layers = part.config.attention, sum(map(len, part.runs))
    if not isinstance(attention, AttentionConfig):
        return None
    numbers = 2 * attention.kv_heads * attention.head_dim // sizes.tp
    return 2 * (sizes.cp - 1) * layers * numbers * _width(train) * _tokens(sizes, train)
