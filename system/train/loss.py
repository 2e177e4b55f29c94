"""What training minimises, and what one batch tells about its routing on the way."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from expertmesh.kernels.mutual_information import mutual_information_loss
from expertmesh.kernels.router_sums import RouterSums, router_sums
from expertmesh.kernels.routing import Routing
from expertmesh.parallel.cross_entropy import total_cross_entropy
from expertmesh.parallel.dispatchers import Dispatcher
from expertmesh.parallel.groups import Groups
from expertmesh.parallel.sequence_split import SequenceSplit
from expertmesh.parallel.token_split import TokenSplit
from expertmesh.parallel.whereabouts import inside
from expertmesh.system.model.attend import Attend, CausalAttend, ContextAttend
from expertmesh.system.model.attention_config import MixtureAttentionConfig
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.context import Context, Decisions, DepthChoice, Spread, TrainingStep
from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.model.router_loss import (
    router_balance_loss,
    sequence_balance_loss,
    sums_of,
    sums_of_sequences,
)
from expertmesh.system.model.transformer import Crossing, Transformer


class LayerLoad(NamedTuple):
    """What was asked of one layer, over all ranks; int64."""

    load_N: torch.Tensor  # slots that chose each expert
    first_N: torch.Tensor  # tokens whose first choice it was
    dropped: torch.Tensor  # slots that a full expert dropped

    def plus(self, other: LayerLoad) -> LayerLoad:
        return LayerLoad(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class BatchLoss(NamedTuple):
    """Losses of this rank's part of the batch, those of layers not yet weighted; counts are of the whole batch.

    Of a run of layers, its share of them; cross entropy is the last run's. L: its layers that have experts.
    """

    total: torch.Tensor  # cross entropy and the others by their weights; its gradients are summed over a tensor group
    cross_entropy: torch.Tensor  # mean over the tokens of this rank's sequences that its context rank has, nats
    balance_L: torch.Tensor
    z_L: torch.Tensor
    loads_N: list[torch.Tensor]  # int64 slots that chose each expert, of each layer
    dropped_L: torch.Tensor  # int64 slots that a full expert dropped
    entropy_L: torch.Tensor  # mean over this rank's tokens of the router's entropy, nats; no gradient
    onward: Crossing | None = None  # what the next run of layers reads
    so_far_L: Sequence[LayerLoad] = ()  # of this micro-batch and those of the update before it


class LanguageModelLoss(nn.Module):
    """A model that answers a batch of token sequences with its losses.

    Balance losses use a load over all ranks (`moe.balance_over` says of which tokens) and the probabilities of this
    rank's tokens. Their mean over ranks is then the loss of the whole batch, so that the number of ranks does not
    change what is trained. Ranks of a tensor group have the same sequences and the same cross entropy, of which each
    has a part of the gradient; of the other losses each adds its own tokens' share.

    `dtype`: what `model` computes in, and what crosses between its runs of layers.
    """

    def __init__(
        self, model: Transformer, dispatcher: Dispatcher, groups: Groups, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.model, self.dispatcher, self.groups, self.dtype = model, dispatcher, groups, dtype

    def forward(
        self,
        tokens_BS1: torch.Tensor,
        training: TrainingStep | None = None,
        replay: Mapping[int, torch.Tensor] | None = None,
        layers: range | None = None,
        before: Crossing | None = None,
        earlier_L: Sequence[LayerLoad] | None = None,
    ) -> BatchLoss:
        """tokens_BS1: int64 [B, S+1], this rank's sequences; position s predicts token s+1. `training` None: no update.

        Only with `training` are slots dropped, is noise added, and does a nested model use a part of its width.
        `replay`: the experts that tokens use, by layer (see replay.py); None: the routers choose.
        `layers`: the run of them that is computed; None: all. It reads `before`, unless it begins with the tokens.
        `earlier_L`: what the update's micro-batches before this one asked of these layers; None: it is the first.
        """
        config, device = self.model.config, tokens_BS1.device
        layers = range(config.layers) if layers is None else layers
        batch_size, sequence_length = len(tokens_BS1), tokens_BS1.shape[1] - 1
        split = SequenceSplit(self.groups.context, sequence_length)
        positions_C = split.positions_C(device)
        inputs_BC, targets_BC = tokens_BS1[:, positions_C], tokens_BS1[:, positions_C + 1]
        width = draw_width(config, training)
        attend: Attend = CausalAttend(sequence_length) if self.groups.context is None else ContextAttend(split)
        context = Context(positions_C.repeat(batch_size), attend, self.dispatcher, training, width, replay=replay)
        spread = Spread(split, TokenSplit(self.groups.tensor))
        context = context._replace(spread=spread)
        if layers.start == 0:
            before = Crossing(self.model.embed_tokens(inputs_BC.reshape(-1)))
        assert before is not None, "a run of layers within the model reads what the run before hands on"
        onward, decisions = self.model.run(before, layers, context)
        mean_entropy = torch.zeros((), device=device)
        if layers.stop == config.layers:
            logits_TV = self.model.lm_head(self.model.norm(onward.x_TD)).float()
            total = total_cross_entropy(logits_TV, targets_BC.reshape(-1), self.groups.tensor)
            mean_entropy = total / max(targets_BC.numel(), 1)

        sparse = [config.moe_of(layer) for layer in config.moe_layers if layer in layers]
        routings = [decided.experts for decided in decisions if decided.experts is not None]
        sums = [sums_of(*layer) for layer in zip(routings, sparse, strict=True)]
        loads_L = self._count(routings, sums)
        so_far_L = loads_L
        if earlier_L is not None:
            so_far_L = [before_it.plus(load) for before_it, load in zip(earlier_L, loads_L, strict=True)]

        def stacked(values: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack(values) if values else mean_entropy.new_zeros(0)

        if config.moe.balance_over == "sequence":
            balances = self._balance_of_sequences(routings, sparse, spread, batch_size)
        else:
            over_L = so_far_L if config.moe.balance_over == "global_batch" else loads_L
            balances = [
                router_balance_loss(layer, moe, over.load_N, over.first_N, self._mean_over_ranks)
                for layer, moe, over in zip(sums, sparse, over_L, strict=True)
            ]
        balance_L = stacked(balances)
        z_L = stacked([layer.z_loss for layer in sums])
        weighted = config.moe.balance_loss_weight * balance_L.sum() + config.moe.z_loss_weight * z_L.sum()
        return BatchLoss(
            total=mean_entropy + (weighted + self._beside_experts(decisions)) / self.groups.tensor_size,
            cross_entropy=mean_entropy,
            balance_L=balance_L,
            z_L=z_L,
            loads_N=[layer.load_N for layer in loads_L],
            dropped_L=stacked([layer.dropped for layer in loads_L]),
            entropy_L=stacked([layer.entropy.detach() for layer in sums]),
            onward=onward if layers.stop < config.layers else None,
            so_far_L=so_far_L,
        )

    def _count(self, routings: list[Routing], sums: list[RouterSums]) -> list[LayerLoad]:
        """Who chose whom in the whole micro-batch: one collective for all layers."""
        parts = list[torch.Tensor]()
        for routing, layer in zip(routings, sums, strict=True):
            parts += [layer.counts_N, layer.firsts_N, (routing.chosen_TK != routing.experts_TK).sum()[None]]
        pieces = _summed(parts, self.groups.token)
        return [LayerLoad(next(pieces), next(pieces), next(pieces)[0]) for _ in sums]

    def _balance_of_sequences(
        self, routings: list[Routing], sparse: list[MoEConfig], split: Spread, sequences: int
    ) -> list[torch.Tensor]:
        """Of each layer; a sequence lies on the ranks of a tensor and of a context group."""
        length = split.sequences.length
        sequence_T = split.mine(torch.arange(sequences).repeat_interleave(length))
        tokens_B = sequence_T.bincount(minlength=max(sequences, 1)).tolist()
        sums_LB = [sums_of_sequences(*layer, tokens_B) for layer in zip(routings, sparse, strict=True)]
        counts_LB2N = [torch.stack([torch.stack([one.counts_N, one.firsts_N]) for one in sums_B]) for sums_B in sums_LB]
        summed = _summed(counts_LB2N, self.groups.tensor, self.groups.context)
        return [sequence_balance_loss(*layer, length) for layer in zip(sums_LB, sparse, summed, strict=True)]

    def _mean_over_ranks(self, sums: RouterSums) -> torch.Tensor:
        """Mean probability of each expert over the tokens of all ranks."""
        probabilities_N = sums.probabilities_N.detach()
        total_N, tokens = _summed([probabilities_N, probabilities_N.new_tensor([sums.tokens])], self.groups.token)
        return total_N / tokens.clamp(min=1)

    def _beside_experts(self, decisions: list[Decisions]) -> torch.Tensor | float:
        """What other routers than those of the experts add, by its weight."""
        total: torch.Tensor | float = 0.0
        attention, depth = self.model.config.attention, self.model.config.depth
        for decided in decisions:
            if decided.attentions is not None:
                assert isinstance(attention, MixtureAttentionConfig)
                if attention.balance_loss_weight:
                    sums = router_sums(decided.attentions.scores_TN, decided.attentions.chosen_TK)
                    information = mutual_information_loss(sums, self._mean_over_ranks(sums))
                    total = total + attention.balance_loss_weight * information
            if decided.depth is not None:
                assert depth is not None
                total = total + depth.loss_weight * _depth_loss(decided.depth)
        return total


def _summed(parts: Sequence[torch.Tensor], *groups: dist.ProcessGroup | None) -> Iterator[torch.Tensor]:
    """Each of `parts` over the ranks of these groups, in turn: one collective a group for all."""
    if not parts:  # nor have the other ranks any
        return
    flat = torch.cat([part.flatten() for part in parts])
    for group in groups:
        if group is not None:
            with inside("sums of the losses"):
                dist.all_reduce(flat, group=group)
    pieces = flat.split([part.numel() for part in parts])
    yield from (piece.view_as(part) for piece, part in zip(pieces, parts, strict=True))


def draw_width(config: ModelConfig, training: TrainingStep | None) -> float:
    """The share of nested experts' hidden units for this step, the same in all layers (MatFormer, arXiv 2310.07707)."""
    shares = config.nested_shares
    if training is None or not shares:
        return 1.0
    return random.Random(f"{training.seed}:{training.step}:width").choice(shares)


def _depth_loss(choice: DepthChoice) -> torch.Tensor:
    """Teaches the router of a mixture of depths to know without the others whom it sends through (gamma-MoD)."""
    return F.cross_entropy(choice.logits_T2, choice.chosen_T.long(), reduction="sum") / max(len(choice.chosen_T), 1)
