"""Every layout trains what one rank trains: outputs, losses, every gradient; whole runs: test_parallel_runs.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import layouts
import pytest
import torch
import torch.distributed as dist
from layouts import batch, micro_batches_of, problems_of_rows
from numerics import assert_close

from expertmesh.parallel.all_to_all import Lane, Traffic
from expertmesh.parallel.build_dispatcher import build_weights_lane
from expertmesh.parallel.dispatch_config import DispatchConfig
from expertmesh.parallel.expert_copies import ExpertCopies
from expertmesh.parallel.groups import Groups, build_groups
from expertmesh.parallel.placement import Placement
from expertmesh.parallel.shard import WHOLE, gather_parts
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.model.moe import MoE
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import Weight, weights
from expertmesh.system.train.loss import LanguageModelLoss
from expertmesh.system.train.passes import MicroBatch, Passes
from expertmesh.system.train.tally import MEANS, Tally, tally

BATCH, LENGTH = 4, 8

MIXTURE = {"moe": {"capacity": {"factor": 0.6, "order": "random"}, "noise": "normal"}}
SHARED = {
    "moe": {"shared": {"hidden_size": 24, "mixing": "softmax"}, "z_loss_weight": 0.01},
    "tie_embeddings": True,
    "dense_layers": [1],
    "dense": {"hidden_size": 40},
    "attention": {"heads": 4, "kv_heads": 2, "head_dim": 8, "qk_norm": "head", "output_gate": "head", "query_rank": 12},
}
LATENT = {
    "attention": {
        **{"kind": "mla", "heads": 4, "query_rank": 12, "kv_rank": 8},
        **{"nope_head_dim": 8, "rope_head_dim": 4, "value_head_dim": 6},
    },
    "moe": {"gate_mode": "sigmoid", "selection_bias": True, "shared": {"hidden_size": 24}},
    "norm": "layer",
}
MLPS = {
    "moe": {"expert": {"kind": "mlp", "hidden_size": 32}, "shared": {"kind": "mlp", "hidden_size": 16}},
    "block": "parallel",
    "dense_layers": [0],
    "dense": {"kind": "mlp", "hidden_size": 24},
    "attention": {"heads": 4, "kv_heads": 4, "head_dim": 8, "qkv_bias": True, "output_gate": "element"},
}
WIDE = {"share_layers": True, "moe": {"gating_residual": False, "balance_loss": "mutual_information"}}
STICKS = {
    "attention": {
        **{"heads": 4, "kv_heads": 2, "head_dim": 8, "rope_theta": None},
        **{"weighting": "stick_breaking", "sliding_window": 5},
    }
}
NO_EXPERTS = {"dense_layers": [0, 1, 2], "dense": {"hidden_size": 32}}

ONE = {"moe": {"gate_mode": "sigmoid", "selection_bias": True, "top_k": 1}}


PYRAMID = {"moe": {"ffn_experts": [2, 3, 6], "gating_residual": False, "shared": {"hidden_size": 16}}}
SIX = {"moe": {"ffn_experts": [2, 3, 6], "gating_residual": False, "capacity": {"factor": 0.6, "order": "random"}}}
NARROWING = {
    **{"layers": 4, "dense_layers": [1], "dense": {"hidden_size": 32}},
    "moe": {"ffn_experts": [4, 6, 3], "gating_residual": False, "capacity": {"factor": 1.0}},
}
LONELY = {
    "layers": 2,
    "moe": {
        "ffn_experts": [4, 1],
        "gating_residual": False,
        "gate_mode": "sigmoid",
        "selection_bias": True,
        "top_k": 1,
    },
}
FACTORS = {
    "moe": {"expert": {"kind": "structured", "hidden_size": 32, "form": "block_shuffle", "blocks": 2, "guided": True}}
}
NESTED = {"moe": {"expert": {"hidden_size": 32, "nested": (0.25, 0.5, 1.0)}}}
MODULATED = {"moe": {"expert": {"kind": "modulated", "adaptor_size": 16}}}
DEEP = {"layers": 5, "dense_layers": [2], "dense": {"hidden_size": 32}}
TIED = {"tie_embeddings": True, "moe": {"z_loss_weight": 0.01, "balance_loss_weight": 0.1}}
SEQUENCES = {"moe": {"balance_over": "sequence", "balance_loss_weight": 1.0}}
SIGMOID_SEQUENCES = {
    "moe": SEQUENCES["moe"] | {"gate_mode": "sigmoid", "selection_bias": True, "balance_loss": "switch"},
}
SO_FAR = {"moe": {"balance_over": "global_batch", "balance_loss_weight": 1.0, "balance_loss": "gshard"}}
SKIPPED = {
    "depth": {"layers": [1], "kept": 0.5, "shared_router": False},
    "moe": {"gating_residual": False, "balance_loss": "mutual_information"},
}


class Row(NamedTuple):
    sizes: dict[str, int]
    reason: str
    model: dict[str, Any] = {}
    favourite: int | None = None  # an FFN expert that every token chooses
    micro_batches: int = 1
    copied: tuple[int, ...] = ()  # experts of each layer that every rank has a copy of, on the layout
    batch: int = BATCH


ROWS = [
    Row({"tp": 2}, "tensor and sequence parallel"),
    Row({"tp": 2, "ep": 2}, "the ranks of a tensor group share out the experts"),
    Row({"tp": 2, "etp": 2}, "each expert is cut along its hidden units"),
    Row({"dp": 2, "etp": 2}, "experts are cut, nothing else is"),
    Row({"tp": 2, "ep": 2}, "capacity is a sequence's, lots are a token's, wherever it lies", MIXTURE),
    Row({"tp": 2}, "shared experts, dense layers, tied embeddings, norms of heads, gates", SHARED),
    Row({"tp": 2, "ep": 2}, "latent attention, sigmoid gate, LayerNorm", LATENT),
    Row({"tp": 2, "etp": 2}, "networks of two matrices, biases of queries, parallel block", MLPS),
    Row({"tp": 2}, "layers that share their weights; a loss of means over all tokens", WIDE),
    Row({"tp": 2}, "no experts at all", NO_EXPERTS),
    Row({"cp": 2}, "sequences are split: keys of other ranks"),
    Row({"cp": 2, "ep": 2}, "capacity and lots of sequences that are split", MIXTURE),
    Row({"cp": 2, "etp": 2}, "latent attention of sequences that are split", LATENT),
    Row({"cp": 2}, "sliding windows, stick-breaking weights in order of positions", STICKS),
    Row({"tp": 2, "ep": 2}, "all tokens on one expert: a rank whose experts get none", ONE, 3),
    Row({"tp": 2, "etp": 2}, "all tokens on one expert that is cut", ONE, 0),
    Row({"tp": 4, "ep": 2}, "experts twice on a tensor group", {"attention": {"heads": 4, "kv_heads": 4}}),
    Row({"tp": 2, "dp": 2, "ep": 4}, "experts spread over attention's both kinds of ranks"),
    Row({"tp": 2, "dp": 2, "ep": 2, "etp": 2}, "experts cut both ways"),
    Row({"tp": 2, "dp": 2, "etp": 4}, "experts cut across sequences", SHARED),
    Row({"dp": 4, "ep": 2, "etp": 2}, "both for experts, neither for attention", MLPS),
    Row({"tp": 2, "dp": 2, "ep": 4}, "an expert a rank, and all tokens on one", ONE, 2),
    Row({"tp": 2, "cp": 2, "ep": 4}, "tokens of runs of sequences, split again", MIXTURE),
    Row({"cp": 2, "dp": 2, "ep": 2, "etp": 2}, "sequences and batch are split, experts cut both ways", SHARED),
    Row({"tp": 2, "cp": 2, "dp": 2, "ep": 2, "etp": 2}, "every degree of a stage", MIXTURE),
    Row({"tp": 2, "dp": 4, "ep": 2, "etp": 2}, "all of them, experts twice"),
    Row({"tp": 4, "dp": 2, "ep": 4, "etp": 2}, "all of them, experts once", {"attention": {"heads": 4, "kv_heads": 4}}),
    Row({"tp": 2, "dp": 4, "ep": 4}, "latent attention on eight", LATENT),
    Row({"dp": 4, "ep": 4}, "experts of a layer on two ranks, of the next on each, of the last on two", PYRAMID),
    Row({"dp": 6, "ep": 6}, "experts of layers on two, three and six ranks", SIX, batch=6),
    Row({"tp": 2, "dp": 2, "ep": 4}, "experts of a layer once on a tensor group, of the next twice", NARROWING),
    Row({"dp": 8, "ep": 4, "etp": 2}, "cut experts of a layer on four, two and one of the ranks", NARROWING, batch=8),
    Row({"pp": 2, "dp": 4, "ep": 4}, "degrees of layers on each stage", NARROWING, micro_batches=2, batch=8),
    Row({"dp": 4, "ep": 4}, "all tokens on one expert of each layer, of one on every rank too", LONELY, 0),
    Row({"dp": 2, "ep": 2}, "gradients of two micro-batches are added up", MIXTURE, micro_batches=2),
    Row(
        {"dp": 2, "ep": 2},
        "copies of an expert, of which gradients are added up",
        MIXTURE,
        micro_batches=2,
        copied=(2,),
    ),
    Row({"dp": 2, "ep": 2}, "all tokens on one expert, and that has copies", ONE, 3, copied=(3, 0)),
    Row({"dp": 2, "ep": 2}, "copies of an expert that nobody chose", ONE, 3, copied=(1,)),
    Row({"dp": 2, "ep": 2}, "copies of an expert of all layers, which have the same", WIDE, copied=(1, 2)),
    Row({"dp": 2, "ep": 2}, "copies of experts in factors, one of them whole at first", FACTORS, copied=(0, 3)),
    Row({"dp": 2, "ep": 2}, "copies of nested experts", NESTED, copied=(1,)),
    Row({"dp": 2, "ep": 2}, "copies of scales and shifts with biases", MODULATED, copied=(3,)),
    Row({"tp": 2, "dp": 2, "ep": 2, "etp": 2}, "copies of experts that are cut", MLPS, copied=(2, 1)),
    Row({"tp": 2, "cp": 2, "ep": 4}, "copies of all experts but one", MIXTURE, copied=(3, 1, 2)),
    Row(
        {"dp": 4, "ep": 4}, "copies of experts of layers on two ranks, and none of one on each", PYRAMID, copied=(1, 0)
    ),
    Row({"pp": 2, "dp": 2, "ep": 2}, "copies on each stage", DEEP | TIED, micro_batches=2, copied=(3,)),
    Row({"pp": 2}, "three layers on two stages: a gating residual crosses", micro_batches=4),
    Row({"pp": 2}, "one micro-batch; the embedding is the head on the other stage", TIED),
    Row({"pp": 2}, "mixtures of depths; a loss of means over all tokens of a micro-batch", SKIPPED, micro_batches=2),
    Row({"pp": 2}, "no experts, nothing but tokens crosses", NO_EXPERTS, micro_batches=2),
    Row({"pp": 2, "interleave": 2}, "two runs a rank: the next stage is the one before", DEEP | TIED, micro_batches=4),
    Row({"pp": 2, "dp": 2}, "each stage twice; tied weights on four ranks", TIED, micro_batches=2),
    Row({"pp": 2, "dp": 2, "ep": 2}, "experts of a stage on two ranks", MIXTURE, micro_batches=2),
    Row({"pp": 2, "tp": 2}, "tokens of a tensor rank cross to their like", SHARED, micro_batches=2),
    Row({"pp": 2, "cp": 2, "ep": 2}, "runs of sequences cross", LATENT, micro_batches=4),
    Row({"pp": 4}, "five layers on four stages; logits cross one without experts", DEEP, micro_batches=4),
    Row({"pp": 2, "tp": 2, "dp": 2, "ep": 2, "etp": 2}, "every kind of split", DEEP | TIED, micro_batches=2),
    Row({"tp": 2, "ep": 2}, "sequences balanced by themselves, two on each rank", SEQUENCES),
    Row({"tp": 2, "cp": 2}, "sequences balanced by themselves, each on four ranks", SIGMOID_SEQUENCES, micro_batches=4),
    Row({"cp": 2, "dp": 2, "ep": 2}, "sequences balanced by themselves, and their batch split", SIGMOID_SEQUENCES),
    Row({"dp": 2}, "balance over the micro-batches so far", SO_FAR, micro_batches=2),
    Row({"pp": 2, "interleave": 2}, "the same in every run of layers", DEEP | SO_FAR, micro_batches=4),
    Row({"pp": 2, "cp": 2}, "the same of sequences that are split", SO_FAR, micro_batches=4),
]


def made(row: Row, groups: Groups) -> LanguageModelLoss:
    loss = layouts.made(row.model, groups)
    if row.favourite is not None:
        for layer in loss.model.config.moe_layers:
            loss.model.layers[layer].mlp.gate.e_score_correction_bias.data[row.favourite] = 100.0
    for moe in (module for module in loss.modules() if isinstance(module, MoE)):
        layer, experts = moe.experts_of_layer.layer, moe.experts_of_layer.num_experts
        of_layer = groups.of_layer(experts)
        if row.copied and of_layer.expert is not None:
            lane, placement = _lane(of_layer.expert), Placement.contiguous(experts, of_layer.expert_size)
            moe.copy_experts(ExpertCopies(layer, row.copied, placement, lane))
    return loss


def _lane(group: dist.ProcessGroup) -> Lane:
    return build_weights_lane(group, DispatchConfig(), Traffic(), "cpu")


def trained(loss: LanguageModelLoss, tokens_BS1: torch.Tensor, micro_batches: int) -> Tally:
    """Gradients are on the parameters."""
    passes = Passes(loss, micro_batches_of(loss.groups, tokens_BS1, micro_batches, step=3))
    for total in passes.totals():
        total.backward()
    return tally(passes.answers, micro_batches, loss.model.config, loss.groups)


@torch.no_grad()
def validated(loss: LanguageModelLoss, tokens_BS1: torch.Tensor) -> torch.Tensor:
    """Cross entropy of all of these tokens, summed."""
    groups = loss.groups
    mine_BS1 = tokens_BS1.tensor_split(groups.batch_size)[groups.batch_rank]
    passes = Passes(loss, [MicroBatch(mine_BS1)])
    passes.forwards()
    total = sum(answer.cross_entropy for _, answer in passes.answers) * mine_BS1[:, 1:].numel()
    total = total / (groups.data_size // groups.batch_size)
    for group in (groups.data, groups.pipeline):
        if group is not None:
            dist.all_reduce(total, group=group)
    return total


def gradients(loss: LanguageModelLoss) -> dict[str, torch.Tensor]:
    """Full gradients of the whole batch, of the weights that rank 0 of those who hold parts can put together."""
    groups, found = loss.groups, {}
    for weight in weights(loss.model):
        if not weight.parameter.requires_grad:
            continue
        assert weight.parameter.grad is not None, next(iter(weight.split(weight.parameter)))
        gradient, alike = weight.parameter.grad.clone(), _alike(weight, loss.model, groups)
        if alike is not None:
            dist.all_reduce(gradient, group=alike)
        parts_in = groups.expert_tensor if weight.is_expert else groups.tensor
        gradient /= groups.data_size
        parts = [gradient] if weight.shard == WHOLE else gather_parts(gradient, parts_in, to=0)
        split = [weight.split(part) for part in parts]
        found.update({name: torch.cat([part[name] for part in split], weight.shard.dim) for name in (split or [{}])[0]})
    return found


def _alike(weight: Weight, model: Transformer, groups: Groups) -> dist.ProcessGroup | None:
    """The ranks that have parts of a weight's gradient."""
    if weight.experts is not None:
        return groups.of_layer(weight.experts).expert_data
    if weight.parameter is model.tied_weight:
        return groups.ends
    return groups.token if weight.shard == WHOLE else groups.data


def check_layout(row: Row) -> None:
    alone = made(row, Groups())
    groups = build_groups(ParallelSizes(**row.sizes), alone.model.config.moe.experts_of_layers)
    spread = made(row, groups)
    tokens_BS1 = batch(row.batch, LENGTH, seed=2)
    expected, got = (trained(loss, tokens_BS1, row.micro_batches) for loss in (alone, spread))
    for name in MEANS:
        assert_close(torch.tensor(got.means_L[name]), torch.tensor(expected.means_L[name]), what=name)
    assert got.cross_entropy == pytest.approx(expected.cross_entropy, rel=1e-6)
    assert got.dropped_L == expected.dropped_L
    assert all(torch.equal(mine, all_) for mine, all_ in zip(got.loads_N, expected.loads_N, strict=True))
    if row.favourite is not None:
        assert all(load_N[row.favourite] == row.batch * LENGTH for load_N in expected.loads_N)

    # One sequence in all, so that some ranks that split the batch have none; then with one token a rank.
    fewest = groups.tensor_size if groups.context is None else LENGTH
    for few_BS1 in (tokens_BS1[:1], tokens_BS1[:1, : fewest + 1]):
        assert_close(
            validated(spread, few_BS1), validated(alone, few_BS1), what=f"{few_BS1.shape[1] - 1} tokens in all"
        )

    wanted = gradients(alone)
    for name, gradient in gradients(spread).items():
        # Routers are float32, and what one gets from two experts nearly cancels.
        bounds = (1e-4, 2e-5) if ".gate." in name else (2e-6, 1e-6)
        assert_close(gradient, wanted[name], max_error=bounds[0], rms_error=bounds[1], what=f"gradient of {name}")


@pytest.fixture(scope="module")
def problems() -> dict[int, list[str | None]]:
    return problems_of_rows(check_layout, ROWS)


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[f"{row.sizes}: {row.reason}" for row in ROWS])
def test_outputs_losses_and_every_gradient_are_those_of_one_rank(problems, number):
    for rank, problem in enumerate(problems[number]):
        assert problem is None, f"rank {rank}: {problem}"
