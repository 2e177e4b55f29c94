"""One name for every weight, whatever rank holds it: the names of a checkpoint, and the seeds of initial weights.

Experts lie together in one parameter per layer and rank, for the grouped GEMM. By name they are apart
(`layers.3.mlp.experts.5.down_proj.weight`), so that any layout can read what any other wrote.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from expertmesh.parallel.shard import Shard, shard_of
from expertmesh.system.model.experts import RoutedExperts

Split = Callable[[torch.Tensor], dict[str, torch.Tensor]]


class Weight(NamedTuple):
    """A parameter of a module and how it reads under the names that every layout shares."""

    name: str  # of the parameter, in the module
    parameter: nn.Parameter
    experts: int | None  # of routed experts: how many FFN experts their layer has on all ranks
    is_matrix: bool  # or a stack of them; vectors, such as norms and biases, are not decayed
    split: Split  # a tensor shaped like the parameter -> views of it by shared name
    shard: Shard  # which part of the full tensor of its name each of these views is

    @property
    def is_expert(self) -> bool:
        return self.experts is not None


def weights(model: nn.Module, prefix: str = "", but: Collection[nn.Module] = ()) -> Iterator[Weight]:
    """Every parameter of `model` but empty ones, once, in a fixed order. Routed experts split into each one's.

    `prefix`: the name of `model`, where it is a part of another. `but`: parts of it that are left out.
    """
    told: set[int] = set()
    for place, module in model.named_modules(set(but), prefix):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.numel() == 0 or id(parameter) in told:  # experts that a layer has none of; tied embeddings
                continue
            told.add(id(parameter))
            full_name = f"{place}.{name}" if place else name
            if isinstance(module, RoutedExperts):
                split, experts = _expert_split(place, module.PARTS[name], module.shard), module.num_experts
                yield Weight(full_name, parameter, experts, parameter.ndim > 2, split, shard_of(parameter))
            else:
                yield Weight(full_name, parameter, None, parameter.ndim > 1, _whole(full_name), shard_of(parameter))


def _whole(name: str) -> Split:
    return lambda tensor: {name: tensor}


def _expert_split(prefix: str, parts: tuple[str, ...], shard: Sequence[int]) -> Split:
    def split(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}.{expert}.{part}": view
            for expert, block in zip(shard, tensor, strict=True)
            for part, view in zip(parts, block.chunk(len(parts)), strict=True)
        }

    return split


@torch.no_grad()
def initialise(
    model: nn.Module, seed: int, standard_deviation: float, prefix: str = "", but: Collection[nn.Module] = ()
) -> None:
    """Fill every one of `weights` from (seed, name) alone, so that all layouts start from the same model.

    Norms 1, biases 0; constant experts' vectors N(0, 1) as the released MoE++ code has them; all else
    N(0, standard_deviation^2), until experts whose weights hang together settle them.
    """
    for weight in weights(model, prefix, but):
        for name, view in weight.split(weight.parameter).items():
            if name.endswith("norm.weight") or name.endswith("bias"):
                view.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            spread = 1.0 if name.endswith("zero_computation.constant") else standard_deviation
            full = torch.randn(weight.shard.full_shape(view.shape), generator=generator)
            view.copy_(full[weight.shard.place(view.shape)].mul_(spread))
    for _, module in model.named_modules(set(but)):
        if isinstance(module, RoutedExperts):
            module.settle(standard_deviation)
