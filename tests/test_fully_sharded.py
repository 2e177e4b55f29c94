"""ZeRO 3 trains what one process trains, from shards: gradients, weights, norms; and memory is that of the shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import layouts
import pytest
import torch
from layouts import batch, micro_batches_of, problems_of_rows
from numerics import assert_close
from ranks import new_world, run_ranks
from tiny import tiny_training
from torch import nn
from torch.distributed.tensor import DTensor

from expertmesh.parallel.fully_sharded import largest_shard
from expertmesh.parallel.groups import Groups, build_groups
from expertmesh.parallel.optimizer import TrainingOptimizer
from expertmesh.parallel.shard import Shard
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.model.block import Elsewhere
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import weights
from expertmesh.system.train.build_optimizer import build_optimizer
from expertmesh.system.train.loss import LanguageModelLoss
from expertmesh.system.train.passes import Passes
from expertmesh.system.train.recompute import Recompute, recompute

BATCH, LENGTH, STEPS = 8, 8, 10
CLIPPING, DECAY, BETAS = 0.25, 0.1, (0.9, 0.95)
RATES = [3e-3, 1e-3, 5e-3, 2e-3, 3e-3] * 2
TIED = {"tie_embeddings": True, "moe": {"capacity": {"factor": 1.0}, "shared": {"hidden_size": 24}}}
SHARED = {"share_layers": True, "moe": {"gating_residual": False}}
DEPTH = {"depth": {"layers": [1], "kept": 0.5, "shared_router": True}, "moe": {"gating_residual": False}}
SIGMOID = {"moe": {"gate_mode": "sigmoid", "selection_bias": True, "ffn_experts": 6}}
DEEP = {"layers": 5, "dense_layers": [2], "dense": {"hidden_size": 32}}
PYRAMID = {"moe": {"ffn_experts": [4, 6, 3], "gating_residual": False}}
BARE = {"moe": {"ffn_experts": 0}}

TensorOf = Callable[[nn.Parameter], torch.Tensor]


class Row(NamedTuple):
    sizes: dict[str, int]
    reason: str
    model: dict[str, Any] = {}
    micro_batches: int = 1
    recompute: Recompute = "none"
    steps: int = 2


ROWS = [
    Row({"dp": 2}, "everything over two ranks", TIED, steps=STEPS),
    Row({"dp": 2, "ep": 2}, "each expert on one rank", steps=STEPS),
    Row({"dp": 2}, "gradients of four micro-batches; a bias that no gradient moves", SIGMOID, 4),
    Row({"cp": 2}, "sequences are split", TIED, 2, "block"),
    Row({"dp": 2}, "layers that share their weights", SHARED, 2, "moe"),
    Row({"dp": 2, "ep": 2}, "a router that layers share", DEPTH, 2),
    Row({"dp": 2}, "no experts that compute", BARE),
    Row({"dp": 4, "ep": 2}, "experts on two ranks, others on four", {"vocab_size": 18, "hidden_size": 18}, steps=STEPS),
    Row({"tp": 2}, "norms and routers on both ranks of a tensor group", TIED, steps=STEPS),
    Row({"tp": 2, "etp": 2}, "experts cut, and sharded over nobody", {}, 2, "block"),
    Row({"pp": 2}, "three micro-batches under way; the embedding is the head on the other stage", TIED, 4, steps=STEPS),
    Row({"pp": 2, "interleave": 2}, "two runs of layers a rank: a backward reduces those of one", DEEP, 4),
    Row({"pp": 2}, "one micro-batch; what is computed again on a stage", TIED, 1, "block"),
    Row({"tp": 2, "dp": 2, "ep": 2}, "shards of tensor ranks' parts", TIED, 2, steps=STEPS),
    Row({"tp": 2, "dp": 2, "etp": 2}, "experts cut, over two; a router without a tensor group's part", SIGMOID, 2),
    Row({"pp": 2, "dp": 2, "ep": 2}, "a stage's weights over two ranks, its experts over one", TIED, 2, steps=STEPS),
    Row({"pp": 2, "tp": 2}, "tied embeddings on four ranks", TIED, 4, "moe"),
    Row({"dp": 4, "ep": 2}, "three experts a rank, over two: cut along another dimension", SIGMOID, 2),
    Row({"dp": 4, "ep": 4}, "experts of layers over one rank, over two, over four", PYRAMID, 2, "block"),
    Row({"pp": 2, "tp": 2, "dp": 2, "ep": 4}, "the same on stages of tensor ranks", PYRAMID, 2),
]


def made(row: Row, groups: Groups, dtype: torch.dtype = torch.float64) -> LanguageModelLoss:
    loss = layouts.made(row.model, groups, dtype)
    recompute(loss.model, row.recompute)
    return loss


def passes_of(loss: LanguageModelLoss, step: int, micro_batches: int) -> Passes:
    return Passes(loss, micro_batches_of(loss.groups, batch(BATCH, LENGTH, step), micro_batches, step + 1))


class Reference:
    """One process, torch's own AdamW and clipping."""

    def __init__(self, row: Row) -> None:
        self.loss, self.row = made(row._replace(recompute="none"), Groups()), row
        held = [weight for weight in weights(self.loss.model) if weight.parameter.requires_grad]
        groups = [
            {"params": [w.parameter for w in held if w.is_matrix], "weight_decay": DECAY},
            {"params": [w.parameter for w in held if not w.is_matrix], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, betas=BETAS)

    def step(self, step: int) -> float:
        for group in self.adam.param_groups:
            group["lr"] = RATES[step]
        self.adam.zero_grad()
        for total in passes_of(self.loss, step, self.row.micro_batches).totals():
            total.backward()
        for parameter in self.loss.parameters():
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(self.loss.parameters(), CLIPPING)
        self.adam.step()
        return norm.item()


class Part(NamedTuple):
    """Of a weight of some name, what this rank has."""

    tensor: torch.Tensor
    shard: Shard


def named(model: Transformer, tensor_of: TensorOf, trained_only: bool = True) -> dict[str, Part]:
    held = [weight for weight in weights(model) if weight.parameter.requires_grad or not trained_only]
    return {name: Part(view, w.shard) for w in held for name, view in w.split(tensor_of(w.parameter)).items()}


def check_shards(loss: LanguageModelLoss) -> None:
    """Each weight that trains is in parts of the expected size, and together they are what a rank computes with."""
    groups = loss.groups
    for weight in weights(loss.model):
        if not weight.parameter.requires_grad:
            continue
        parameter, ranks = weight.parameter, groups.data_size
        if weight.experts is not None:
            of_layer = groups.of_layer(weight.experts)
            ranks = groups.token_size // (of_layer.expert_size * groups.expert_tensor_size)
        assert isinstance(parameter, DTensor) and parameter.device_mesh.size() == ranks
        assert parameter.to_local().untyped_storage().nbytes() <= largest_shard(parameter.shape, ranks) * 8


def check_row(row: Row) -> None:
    reference = Reference(row)
    groups = build_groups(ParallelSizes(**row.sizes), reference.loss.model.config.moe.experts_of_layers)
    loss = made(row, groups)
    optimizer = sharded(loss)
    held = [layer for layer in loss.model.layers if not isinstance(layer, Elsewhere)]
    watched = held[-1].register_forward_hook(lambda *_: check_shards_of_others(loss.model, held))
    for step in range(row.steps):
        norm = reference.step(step)
        assert norm > 2 * CLIPPING, "clipping is not active"
        assert optimizer.step(passes_of(loss, step, row.micro_batches).totals(), RATES[step]) == pytest.approx(
            norm, rel=1e-6
        )
        check_shards(loss)
        if step == 0:  # moments are then multiples of the clipped gradients
            for key in ("exp_avg", "exp_avg_sq"):
                got = named(loss.model, lambda p, key=key: getattr(optimizer.state(p), key))
                wanted = named(reference.loss.model, lambda p, key=key: reference.adam.state[p][key])
                for name, part in got.items():
                    bounds = (1e-4, 4e-5) if ".gate." in name else (4e-6, 2e-6)
                    check_part(part, wanted[name].tensor, bounds, f"{key} {name}")
    watched.remove()
    wanted = named(reference.loss.model, torch.Tensor.detach, trained_only=False)
    for name, part in named(loss.model, optimizer.weight, trained_only=False).items():
        check_part(part, wanted[name].tensor, (1e-4, 1e-5), f"{name} after {row.steps} steps")


def check_part(part: Part, whole: torch.Tensor, bounds: tuple[float, float], what: str) -> None:
    wanted = whole[part.shard.place(part.tensor.shape)]
    assert_close(part.tensor, wanted, max_error=bounds[0], rms_error=bounds[1], what=what)


def check_shards_of_others(model: Transformer, held: list[nn.Module]) -> None:
    """While the last layer computes, no other is whole, nor embedding or head, unless they share weights."""
    others = [] if model.config.share_layers or model.config.depth else held[:-1]
    if not model.config.tie_embeddings:
        others = [*others, model.embed_tokens, model.lm_head]
    for other in others:
        assert all(isinstance(p, DTensor) for p in other.parameters() if p.requires_grad and p.numel())


def sharded(loss: LanguageModelLoss, dtype: str = "float32") -> TrainingOptimizer:
    config = tiny_training(zero_stage=3, dtype=dtype, gradient_clipping=CLIPPING, weight_decay=DECAY, adam_betas=BETAS)
    return build_optimizer(loss, config, "cpu", lambda *_: None)


ROUNDED = [
    Row({"dp": 2}, "", TIED),
    Row({"dp": 2, "ep": 2}, "", SIGMOID),
    Row({"tp": 2, "ep": 2}, "", TIED),
    Row({"tp": 2, "etp": 2}, "", SIGMOID),
    Row({"pp": 2}, "", TIED),
]


def check_bfloat16() -> None:
    """Near float32; and updates that are far too small for bfloat16 are made to float32 masters."""
    for row in ROUNDED:
        groups = build_groups(ParallelSizes(**row.sizes))
        exact, loss = made(row, groups, torch.float32), made(row, groups, torch.float32)
        loss.dtype = torch.bfloat16
        rounded = sharded(loss, "bfloat16")
        optimizer_of = {exact: sharded(exact), loss: rounded}
        before = {name: part.tensor.clone() for name, part in named(loss.model, rounded.weight).items()}
        seen = set[torch.dtype]()
        held = [layer for layer in loss.model.layers if not isinstance(layer, Elsewhere)]
        held[-1].register_forward_hook(lambda module, given, answer, seen=seen: seen.add(answer[0].dtype))
        for step in range(3):
            norms, entropies = [], []
            for each, optimizer in optimizer_of.items():
                passes = passes_of(each, step, 2)
                norms.append(optimizer.step(passes.totals(), 1e-6))
                entropies.append(sum(answer.cross_entropy.item() for _, answer in passes.answers))
            assert entropies[1] == pytest.approx(entropies[0], rel=0.02)
            assert norms[1] == pytest.approx(norms[0], rel=0.1)
        assert seen == {torch.bfloat16}
        for name, (after, _) in named(loss.model, rounded.weight).items():
            moved = (after - before[name]).abs()
            assert after.dtype == torch.float32 and 0 < moved.max() < 1e-5, name
        new_world()


def test_bfloat16_with_float32_masters():
    run_ranks(check_bfloat16, 2)


@pytest.fixture(scope="module")
def problems() -> dict[int, list[str | None]]:
    return problems_of_rows(check_row, ROWS)


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[f"{row.sizes}: {row.reason}" for row in ROWS])
def test_updates_are_those_of_one_process(problems, number):
    for rank, problem in enumerate(problems[number]):
        assert problem is None, f"rank {rank}: {problem}"
