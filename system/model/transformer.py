"""The decoder: embedding, blocks, final norm, output head. Trained, served whole and served split by this one class.

A pipeline rank has some runs of its layers; the first of all has the embedding too, the last the norm and the head:

    5 layers, 4 stages     embedding 0 | 1 | 2 | 3 4 norm head
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from expertmesh.kernels.routing import Routing
from expertmesh.kernels.rows import Rows
from expertmesh.parallel.placement import Placement, expert_shard
from expertmesh.system.model.block import Elsewhere, build_blocks, build_norm
from expertmesh.system.model.build_experts import build_experts
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.context import Context, Decisions, ExpertContext


class Crossing(NamedTuple):
    """What one run of layers hands to the next: all that crosses a border between pipeline stages."""

    x_TD: torch.Tensor
    logits_TN: torch.Tensor | None = None  # of the last router, where a later one has a gating residual


class ModelOutput(NamedTuple):
    hidden_TD: torch.Tensor  # after the final norm; `Transformer.lm_head` makes logits of it
    decisions: list[Decisions]  # of each layer

    @property
    def routings(self) -> list[Routing]:
        """One for each layer that has experts."""
        return [decided.experts for decided in self.decisions if decided.experts is not None]


class Transformer(nn.Module):
    """`held`: which of each layer's FFN experts are held here, as `shards` gives them; None: all.

    `runs`: the layers held here; None: all. A tied embedding is held by the ranks of the first and of the last run.
    Weights are uninitialised: `weights.initialise` or `checkpoint.load_weights` fills them.
    """

    def __init__(
        self, config: ModelConfig, held: Sequence[range] | None = None, runs: Sequence[range] | None = None
    ) -> None:
        super().__init__()
        assert config.vocab_size is not None, "the vocabulary is not known yet"
        self.config = config
        self.runs = [range(config.layers)] if runs is None else list(runs)
        embeds, ends = self.runs[0].start == 0, self.runs[-1].stop == config.layers
        if embeds or (ends and config.tie_embeddings):
            self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        else:
            self.embed_tokens = Elsewhere()
        layers = {layer for run in self.runs for layer in run}
        self.layers = build_blocks(config, shards(config, 0, 1) if held is None else held, layers)
        self.norm = build_norm(config) if ends else Elsewhere()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if ends else Elsewhere()
        if ends and config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens_T: torch.Tensor, context: Context) -> ModelOutput:
        """All layers, which one rank has."""
        crossing, decisions = self.run(Crossing(self.embed_tokens(tokens_T)), range(self.config.layers), context)
        return ModelOutput(self.norm(crossing.x_TD), decisions)

    def run(self, before: Crossing, layers: range, context: Context) -> tuple[Crossing, list[Decisions]]:
        """Of a run of layers held here: what it hands on, and what each of its layers decided."""
        (x_TD, logits_TN), decisions = before, list[Decisions]()
        previous = None if logits_TN is None else _logits_alone(logits_TN)
        for layer in layers:
            x_TD, decided = self.layers[layer](x_TD, previous, context._replace(layer=layer))
            decisions.append(decided)
            previous = decided.experts or previous
        crosses = logits_cross(self.config, layers.stop)
        return Crossing(x_TD, previous.logits_TN if previous and crosses else None), decisions

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """The embedding that is the head too, where the ends of a pipeline have it each."""
        alone = self.runs[0].start == 0 and self.runs[-1].stop == self.config.layers
        held = not isinstance(self.embed_tokens, Elsewhere)
        return self.embed_tokens.weight if held and self.config.tie_embeddings and not alone else None

    def balance(self, loads_N: list[torch.Tensor]) -> None:
        """After an update, move the selection biases of routers that have one; the load of each layer with experts."""
        for layer, load_N in zip(self.config.moe_layers, loads_N, strict=True):
            if not isinstance(self.layers[layer], Elsewhere):
                self.layers[layer].mlp.gate.balance(load_N)


def logits_cross(config: ModelConfig, layer: int) -> bool:
    """Whether what routers before `layer` decided is read at it or after it."""
    sparse = config.moe_layers
    return config.moe.gating_residual and bool(sparse) and sparse[0] < layer <= sparse[-1]


def _logits_alone(logits_TN: torch.Tensor) -> Routing:
    """As much of a decision as a gating residual reads."""
    nothing_TK = torch.empty(len(logits_TN), 0, dtype=torch.int64, device=logits_TN.device)
    return Routing(nothing_TK, logits_TN.new_empty(len(logits_TN), 0), logits_TN, logits_TN, nothing_TK)


class ExpertPool(nn.Module):
    """The FFN halves alone: what a worker of the FFN pool holds. Parameter names equal those of `Transformer`.

    In a layer with a placement its rank's slots are held, in their order; else a contiguous part.
    """

    def __init__(
        self, config: ModelConfig, expert_rank: int, expert_size: int, placements: Mapping[int, Placement] | None = None
    ) -> None:
        super().__init__()
        self.held: list[Sequence[int]] = list(shards(config, expert_rank, expert_size))
        for layer, placement in (placements or {}).items():
            self.held[layer] = placement.held(expert_rank)
        self.layers = nn.ModuleList(nn.ModuleDict() for _ in range(config.layers))
        for layer in config.moe_layers[:1] if config.share_layers else config.moe_layers:
            experts = build_experts(config.moe_of(layer), config.hidden_size, self.held[layer])
            self.layers[layer]["mlp"] = nn.ModuleDict({"experts": experts})

    def forward(self, layer: int, rows: Rows, width: float = 1.0) -> torch.Tensor:
        """Answers to rows of layer `layer`, sorted by the experts held here; `width`: of nested ones."""
        return self.layers[layer]["mlp"]["experts"](rows, ExpertContext(width))


def shards(config: ModelConfig, expert_rank: int, expert_size: int) -> list[range]:
    """The FFN experts of each layer that a rank holds; none in dense layers, nor with `expert_size` 0."""
    return [
        expert_shard(config.moe_of(layer).ffn_experts, expert_rank, expert_size)
        if layer in config.moe_layers and expert_size
        else range(0)
        for layer in range(config.layers)
    ]
