"""What the passes of one update told of losses and routing, added up: over micro-batches, ranks and pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from expertmesh.parallel.groups import Groups
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.train.loss import BatchLoss

MEANS = ("balance_L", "z_L", "entropy_L")


class Tally(NamedTuple):
    """Of the whole batch. L: the layers of the model that have experts, in order."""

    cross_entropy: float  # mean over tokens, nats
    means_L: dict[str, list[float]]  # of each of MEANS, over tokens; balance losses over micro-batches
    loads_N: list[torch.Tensor]  # int64 slots that chose each expert, of each layer
    dropped_L: list[int]  # slots that a full expert dropped
    sums: list[float]  # of what each rank counted by itself


def tally(
    answers: Sequence[tuple[range, BatchLoss]],
    micro_batches: int,
    config: ModelConfig,
    groups: Groups,
    counted: Sequence[float] = (),
) -> Tally:
    """Add up what this rank was told of runs of layers, and what others were. A collective: every rank calls it.

    `counted`: numbers of this rank that are summed over all ranks.
    """
    sparse = config.moe_layers
    loads_N = [torch.zeros(config.moe_of(layer).num_experts, dtype=torch.int64) for layer in sparse]
    dropped_L = torch.zeros(len(sparse), dtype=torch.int64)
    means_XL = torch.zeros(len(MEANS), len(sparse), dtype=torch.float64)
    cross_entropy = torch.zeros(1, dtype=torch.float64)
    for layers, answer in answers:
        here = [place for place, layer in enumerate(sparse) if layer in layers]
        for place, load_N in zip(here, answer.loads_N, strict=True):
            loads_N[place] += load_N.cpu()
        dropped_L[here] += answer.dropped_L.cpu().long()
        means_XL[:, here] += torch.stack([getattr(answer, name) for name in MEANS]).detach().cpu().double()
        cross_entropy += answer.cross_entropy.detach().cpu().double()
    # Each rank of a stage has the mean over its own tokens, of which all have equally many; counts are the stage's.
    share = 1 / (micro_batches * groups.token_size)
    sums = torch.tensor(counted, dtype=torch.float64)
    figures = torch.cat([cross_entropy * share, means_XL.flatten() * share, sums])
    counts = torch.cat([*loads_N, dropped_L])
    device = answers[0][1].cross_entropy.device
    figures, counts = figures.to(device), counts.to(device)
    if groups.token is not None:
        dist.all_reduce(figures, group=groups.token)
    if groups.pipeline is not None:
        dist.all_reduce(figures, group=groups.pipeline)
        dist.all_reduce(counts, group=groups.pipeline)
    cross_entropy, flat_XL, sums = figures.cpu().split([1, means_XL.numel(), len(counted)])
    *loads, dropped_L = counts.cpu().split([len(load_N) for load_N in loads_N] + [len(sparse)])
    means_L = dict(zip(MEANS, flat_XL.view(len(MEANS), -1).tolist(), strict=True))
    return Tally(cross_entropy.item(), means_L, list(loads), dropped_L.tolist(), sums.tolist())
