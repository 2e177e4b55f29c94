"""ZeRO 3: weights, gradients and optimizer state split over the ranks that hold the same, by torch's FSDP2.

    routed experts      over the ranks with the same part of the same experts; expert parallelism spreads and cuts them
    all other weights   over the ranks that split the batch or its sequences, each stage's and each tensor rank's part

DeepSpeed's own stage 3 takes no expert parameters. Here each set of experts, each layer, the embedding, the head and
the rest are a unit: its weights are whole on a rank while it computes, forward and backward, and a shard at all other
times. Gradients are reduced as a backward goes, also of each micro-batch: whole ones added up would be the memory that
this saves.

Some shards are on several ranks, which add up their gradients after the last backward: those of weights that a tensor
group does not split, such as norms and routers, and those of an embedding that is the head on another stage. No unit is
whole for longer because of them, and no stage waits for another within a backward.

Shards are float32, and so are sums of gradients. Whole weights may be bfloat16: then so is what they compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils._pytree import tree_leaves

from expertmesh.parallel.optimizer import TorchAdam, local
from expertmesh.parallel.shard import mark, shard_of


class Units(NamedTuple):
    """Modules whose weights come together. None holds another's, but for the experts of a layer."""

    experts: Sequence[nn.Module]
    parts: Sequence[nn.Module]


def split_dimension(shape: Sequence[int], ranks: int) -> int:
    """The first that is cut evenly; if there is none the first, of which the last ranks have less, or nothing."""
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)


def largest_shard(shape: Sequence[int], ranks: int) -> int:
    """Numbers of a parameter that the first of the ranks has."""
    cut = split_dimension(shape, ranks)
    return math.prod(-(-size // ranks) if dim == cut else size for dim, size in enumerate(shape))


class FullySharded(TorchAdam):
    """AdamW on shards. It puts others in place of the parameters of `module` that train and are not empty.

    `copies_of`: of experts that are a unit, the ranks that hold the same; None: this one alone.

    `begin(part)` is called before the weights of a part become shards, of all parts one after the other, and the rest
    last: so that a `module` on the meta device is whole nowhere. To the same end parameters are given by their names in
    `module`: `decayed`, those that weight decay is for; `replicated`, those that all ranks of a tensor group hold, and
    have parts of the gradient of; `tied`, those that the other end of a pipeline has too.

    `dtype`: that of whole weights, and of gradients until they are reduced.
    """

    def __init__(
        self,
        module: nn.Module,
        units: Units,
        copies_of: Callable[[nn.Module], dist.ProcessGroup | None],
        device: str,
        begin: Callable[[nn.Module], None],
        *,
        decayed: AbstractSet[str],
        replicated: AbstractSet[str],
        tied: AbstractSet[str],
        dtype: torch.dtype,
        gradient_clipping: float,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        from megatron.core import parallel_state

        data = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._data_size = data.size()
        over_data = DeviceMesh.from_group(data, device)
        # Who is alone with some experts is so with those that lie on the most ranks.
        alone = parallel_state.get_expert_data_parallel_group()
        of_copies = dict.fromkeys(copies_of(experts) or alone for experts in units.experts)
        over = {group: DeviceMesh.from_group(group, device) for group in of_copies}
        as_they_are = {p for p in module.parameters() if not (p.requires_grad and p.numel())}
        marks = {name: shard_of(parameter) for name, parameter in module.named_parameters()}
        # What units are given stays as it is: logits are float32.
        policy = MixedPrecisionPolicy()
        if dtype != torch.float32:
            policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        self._units: list[FSDPModule] = []
        for part in (*units.experts, *units.parts, module):
            begin(part)
            mesh = over[copies_of(part) or alone] if part in units.experts else over_data
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
            part.register_forward_hook(_reduce_all_in_backward)
            self._units.append(unit)
        named = {name: p for name, p in module.named_parameters() if p not in as_they_are}
        for name, parameter in named.items():
            mark(parameter, marks[name])
        groups = [
            {"params": [p for name, p in named.items() if name in decayed], "weight_decay": weight_decay},
            {"params": [p for name, p in named.items() if name not in decayed], "weight_decay": 0.0},
        ]
        adam = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas)
        also_on = [(replicated, parallel_state.get_tensor_model_parallel_group())]
        if tied:
            also_on.append((tied, parallel_state.get_embedding_group()))
        self._also_on = [
            ([p for name, p in named.items() if name in names], group) for names, group in also_on if group.size() > 1
        ]
        copies = dict.fromkeys(named.values(), 1)
        copies.update((parameter, group.size()) for parameters, group in self._also_on for parameter in parameters)
        super().__init__(adam, copies, gradient_clipping)

    def step(self, totals: Iterable[torch.Tensor], learning_rate: float) -> float:
        self._set_rate(learning_rate)
        for total in totals:
            total.backward()
            for unit in self._units:
                unit.set_reduce_scatter_unused_params(False, recurse=False)
        for parameters, group in self._also_on:
            _add_up([local(parameter.grad) for parameter in parameters if parameter.grad is not None], group)
        for parameter in self._copies:
            if parameter.grad is not None:
                local(parameter.grad).div_(self._data_size)
        norm = self._clip()
        self._adam.step()
        self._adam.zero_grad()
        return norm


def _placement(parameter: nn.Parameter, ranks: int) -> Shard:
    return Shard(split_dimension(parameter.shape, ranks))


def _reduce_all_in_backward(unit: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Have the backward of this forward reduce every gradient of the unit: of those that a rank has none of, zeros.

    Else other ranks would wait. A unit that a backward does not come by, of another run of layers, is left alone.
    """
    for tensor in tree_leaves(output):
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            tensor.register_hook(lambda _: cast(FSDPModule, unit).set_reduce_scatter_unused_params(True, recurse=False))


def _add_up(shards: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Sum each over the ranks of `group`, in place and at once."""
    if shards:
        flat = torch.cat([shard.flatten() for shard in shards])
        dist.all_reduce(flat, group=group)
        for shard, total in zip(shards, flat.split([shard.numel() for shard in shards]), strict=True):
            shard.copy_(total.view_as(shard))
