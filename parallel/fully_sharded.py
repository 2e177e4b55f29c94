"""ZeRO 3: weights, gradients and optimizer state split over the ranks that hold the same, by torch's FSDP2.

    routed experts      over the ranks with the same experts; they stay spread by expert parallelism
    all other weights   over the ranks that split the batch or its sequences

DeepSpeed's own stage 3 takes no expert parameters. Here each set of experts, each layer and the rest are a unit: its
weights are whole on a rank while it computes, forward and backward, and a shard at all other times. Gradients are
reduced as a backward goes, also of each micro-batch: whole ones added up would be the memory that this saves.

Shards are float32, and so are sums of gradients. Whole weights may be bfloat16: then so is what they compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from expertmesh.parallel.optimizer import TorchAdam


class Units(NamedTuple):
    """Modules whose weights come together. None holds another's, but for the experts of a layer."""

    experts: Sequence[nn.Module]
    layers: Sequence[nn.Module]


def split_dimension(shape: Sequence[int], ranks: int) -> int:
    """The first that is cut evenly; if there is none the first, of which the last ranks have less, or nothing."""
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)


def largest_shard(shape: Sequence[int], ranks: int) -> int:
    """Numbers of a parameter that the first of the ranks has."""
    cut = split_dimension(shape, ranks)
    return math.prod(-(-size // ranks) if dim == cut else size for dim, size in enumerate(shape))


class FullySharded(TorchAdam):
    """AdamW on shards. It puts others in place of the parameters of `module` that train and are not empty.

    `dtype`: that of whole weights, and of gradients until they are reduced.
    """

    def __init__(
        self,
        module: nn.Module,
        units: Units,
        decayed_parameters: Sequence[nn.Parameter],
        *,
        dtype: torch.dtype = torch.float32,
        gradient_clipping: float,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        from megatron.core import parallel_state

        data = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._data_size = data.size()
        device = next(module.parameters()).device.type
        over_data = DeviceMesh.from_group(data, device)
        over_copies = DeviceMesh.from_group(parallel_state.get_expert_data_parallel_group(), device)
        decayed = {id(parameter) for parameter in decayed_parameters}
        decayed_names = {name for name, parameter in module.named_parameters() if id(parameter) in decayed}
        as_they_are = {p for p in module.parameters() if not (p.requires_grad and p.numel())}
        # What units are given stays as it is: logits are float32.
        policy = MixedPrecisionPolicy()
        if dtype != torch.float32:
            policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for part in (*units.experts, *units.layers, module):
            mesh = over_copies if part in units.experts else over_data
            unit = fully_shard(
                part,
                mesh=mesh,
                reshard_after_forward=True,
                shard_placement_fn=partial(_placement, ranks=mesh.size()),
                mp_policy=policy,
                ignored_params=as_they_are,
            )
            # A plain sum, which gloo has. Where a unit's group is one rank, torch 2.13 would apply a factor twice.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_reduce_scatter_unused_params(True)
        named = {name: p for name, p in module.named_parameters() if p not in as_they_are}
        groups = [
            {"params": [p for name, p in named.items() if name in decayed_names], "weight_decay": weight_decay},
            {"params": [p for name, p in named.items() if name not in decayed_names], "weight_decay": 0.0},
        ]
        adam = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas)
        super().__init__(adam, dict.fromkeys(named.values(), 1), gradient_clipping)

    def step(self, totals: Iterable[torch.Tensor], learning_rate: float) -> float:
        self._set_rate(learning_rate)
        for total in totals:
            (total / self._data_size).backward()
        norm = self._clip()
        self._adam.step()
        self._adam.zero_grad()
        return norm


def _placement(parameter: nn.Parameter, ranks: int) -> Shard:
    return Shard(split_dimension(parameter.shape, ranks))
