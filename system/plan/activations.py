"""What a rank keeps from its forwards for their backwards, without building its model: small models tell.

What autograd keeps is tokens (or rows: tokens times choices) by one width. So what a forward keeps of a sequence of L
tokens is a constant and, for L and for its square (where an attention keeps all scores), a sum over widths:

    bytes(L, widths) = sum over p = 0, 1, 2 of L^p (a_p + sum over w of b_pw w)

The numbers a and b follow from forwards of models that are small in all widths, then wider in one, at three lengths.
Layers, experts and choices are at their real number (heads are a width) and the layout is the real one: forwards run
over the fake process group of rehearsal.py. Experts are chosen evenly, zero-computation ones too, as for the dispatched
bytes.

A pipeline rank keeps several micro-batches at once: as many as its schedule has under way. What comes and goes within a
layer is not counted, nor, with `recompute`, what is kept while a block computes again.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch

from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.build_dispatcher import build_dispatcher
from expertmesh.parallel.groups import Groups, build_groups
from expertmesh.parallel.pipeline import runs_of_layers, schedule
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.context import TrainingStep
from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.model.tensor_parallel import parallel_transformer
from expertmesh.system.model.transformer import Crossing, logits_cross
from expertmesh.system.model.weights import initialise
from expertmesh.system.plan.rehearsal import Alone, fake_world
from expertmesh.system.plan.widths import Widths, narrowest, resized, widths_of
from expertmesh.system.train.config import TrainConfig
from expertmesh.system.train.loss import LanguageModelLoss
from expertmesh.system.train.recompute import counting_kept, recompute

LENGTHS = (1, 2, 3)  # in units that every split divides


def activation_bytes(model: ModelConfig, sizes: ParallelSizes, train: TrainConfig) -> list[int] | None:
    """Of a rank of each pipeline stage, at the moment when it keeps most.

    None: not counted. What a mixture of depths or a nested network keeps is drawn anew at every step, and the forwards
    here are float32, not bfloat16.
    """
    if model.depth is not None or model.nested_shares or train.dtype != "float32":
        return None
    per_rank = (train.micro_batch_size or train.batch_size) // sizes.dp
    known: dict[Hashable, list[int]] = {}  # stages in the middle of a deep model are alike
    found = []
    for stage in range(sizes.pp):
        alike = tuple(_kind(model, run) for run in runs_of_layers(model.layers, sizes.stages)[stage :: sizes.pp])
        if alike not in known:
            with fake_world(stage * sizes.stage_size, sizes.world_size):
                groups = build_groups(sizes, model.moe.experts_of_layers)
                known[alike] = _of_runs(model, sizes, train, groups, per_rank)
        found.append(_most_at_once(known[alike], stage, sizes, train.micro_batches))
    return found


def _kind(model: ModelConfig, run: range) -> Hashable:
    """Equal for runs of layers that keep the same."""
    layers = tuple(layer not in model.dense_layers and model.moe_of(layer).ffn_experts for layer in run)
    return run.start == 0, run.stop == model.layers, logits_cross(model, run.start), layers


def _most_at_once(of_runs: list[int], stage: int, sizes: ParallelSizes, micro_batches: int) -> int:
    """Of micro-batches on their way, of each run of layers that this rank has."""
    now, most = 0, 0
    for task in schedule(stage, sizes.pp, micro_batches, sizes.interleave):
        of_run = of_runs[task.stage // sizes.pp]
        now += -of_run if task.backward else of_run
        most = max(most, now)
    return most


def _of_runs(model: ModelConfig, sizes: ParallelSizes, train: TrainConfig, groups: Groups, sequences: int) -> list[int]:
    """Of a micro-batch of so many sequences, in each run of layers of this rank."""
    small, real = narrowest(model, sizes), widths_of(model)
    unit = _even_tokens(model) * sizes.tp * sizes.cp
    base = _kept(model, small, sizes, train, groups, unit)
    at_real = [[float(kept) for kept in of_run] for of_run in base]
    for name, width in real._asdict().items():
        step = getattr(small, name)
        if width is None or width == step:
            continue
        wider = _kept(model, small._replace(**{name: 2 * step}), sizes, train, groups, unit)
        for of_run, narrow, wide in zip(at_real, base, wider, strict=True):
            for place, (less, more) in enumerate(zip(narrow, wide, strict=True)):
                of_run[place] += (more - less) / step * (width - step)
    return [round(_of_length(of_run, train.sequence_length / unit, sequences)) for of_run in at_real]


def _of_length(kept: list[float], length: float, sequences: int) -> float:
    """The parabola through what is kept at lengths 1, 2, 3; its constant part is not of a sequence."""
    first, second, third = kept
    bend = (third - 2 * second + first) / 2
    slope = second - first - 3 * bend
    return first - slope - bend + sequences * (slope * length + bend * length**2)


def _kept(
    model: ModelConfig, widths: Widths, sizes: ParallelSizes, train: TrainConfig, groups: Groups, unit: int
) -> list[list[int]]:
    """Bytes of one sequence: for each run of layers of this rank, at each of the lengths."""
    config = resized(model, widths)
    part = parallel_transformer(config, groups)
    initialise(part, 0, 0.02)
    recompute(part, train.recompute)
    loss = LanguageModelLoss(part, build_dispatcher(groups, sizes.dispatch, Traffic(), "cpu"), groups)
    found: list[list[int]] = [[] for _ in part.runs]
    for length in (unit * number for number in LENGTHS):
        tokens_BS1 = torch.zeros(1, length + 1, dtype=torch.int64)
        step = TrainingStep(1, 1, 0, range(1), length)
        here = length // (sizes.tp * sizes.cp)
        even = {layer: _evenly(here, config.moe_of(layer)) for layer in config.moe_layers}
        for run, of_run in zip(part.runs, found, strict=True):
            before = _handed_on(config, run, here) if run.start else None
            with Alone(), counting_kept(part) as kept:
                answer = loss(tokens_BS1, step, even, run, before)
            of_run.append(kept.bytes)
            del answer
    return found


def _even_tokens(model: ModelConfig) -> int:
    """The fewest tokens that choose all experts of a layer equally often, in every layer."""
    layers = [model.moe_of(layer) for layer in model.moe_layers]
    return math.lcm(*(moe.num_experts // math.gcd(moe.num_experts, moe.top_k) for moe in layers)) if layers else 1


def _evenly(tokens: int, moe: MoEConfig) -> torch.Tensor:
    """[T, K] choices that go round."""
    return (torch.arange(tokens * moe.top_k) % moe.num_experts).view(tokens, moe.top_k)


def _handed_on(config: ModelConfig, run: range, tokens: int) -> Crossing:
    """What a run reads of the one before it."""
    x_TD = torch.zeros(tokens, config.hidden_size, requires_grad=True)
    if not logits_cross(config, run.start):
        return Crossing(x_TD)
    return Crossing(x_TD, torch.zeros(tokens, config.moe.num_experts, requires_grad=True))
