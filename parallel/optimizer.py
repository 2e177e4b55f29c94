"""What trains the weights of one rank: the contract of every engine, and torch's own AdamW, which two of them use.

    ZeRO 0         zero.py             every rank has weights, gradients and optimizer state whole
    ZeRO 1, 2      zero.py             optimizer state, then gradients too, split over the ranks that hold the same
    ZeRO 3         fully_sharded.py    weights too

State leaves and enters as full tensors, one per parameter. So any layout and any engine can resume what another saved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


class AdamState(NamedTuple):
    """Optimizer state of one parameter, each shaped like it, float32."""

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


class TrainingOptimizer(ABC):
    """AdamW with gradient reduction and exact clipping. A parameter that is asked about is not an empty one."""

    @abstractmethod
    def step(self, totals: Iterable[torch.Tensor], learning_rate: float) -> float:
        """One update from the sum of `totals`, scalars; returns the gradient norm over all ranks, before clipping.

        The next one is asked for when the gradients of the one before are there.
        """

    @abstractmethod
    def weight(self, parameter: nn.Parameter) -> torch.Tensor:
        """The whole of it, as this rank computes with it. A collective: every rank calls it."""

    @abstractmethod
    def state(self, parameter: nn.Parameter) -> AdamState:
        """The whole state of `parameter`, once a step was made. A collective: every rank calls it."""

    @abstractmethod
    def master(self, parameter: nn.Parameter) -> torch.Tensor:
        """The whole float32 weight that updates are made to. A collective: every rank calls it."""

    @abstractmethod
    def replace(self, parameter: nn.Parameter, master: torch.Tensor, state: AdamState) -> None:
        """Go on with another weight and its state in place of those of `parameter`; a step was made before."""

    @abstractmethod
    def load_state(self, states: Iterable[tuple[nn.Parameter, AdamState]], steps: int) -> None:
        """Go on from `states` (one for every parameter but empty ones) as if this object had made `steps` updates.

        One is asked for when the one before is no longer needed.
        """

    @abstractmethod
    def close(self) -> None:
        """Make no more steps. A model whose optimizer was not closed may stay as long as the process does."""


class TorchAdam(TrainingOptimizer):
    """torch's AdamW on parameters that are whole here, or of which this rank has a shard.

    `copies`: how many ranks hold the same numbers of each parameter and, once reduced, of its gradient.
    """

    def __init__(self, adam: torch.optim.AdamW, copies: Mapping[nn.Parameter, int], gradient_clipping: float) -> None:
        self._adam, self._copies, self._clipping = adam, copies, gradient_clipping

    def _set_rate(self, learning_rate: float) -> None:
        for group in self._adam.param_groups:
            group["lr"] = learning_rate

    @torch.no_grad()
    def _clip(self) -> float:
        """Scale reduced gradients down to the norm that is allowed; returns what it was, over all ranks."""
        gradients = {parameter: local(parameter.grad) for parameter in self._copies if parameter.grad is not None}
        squares = [
            torch.linalg.vector_norm(gradient, dtype=torch.float64).square() / self._copies[parameter]
            for parameter, gradient in gradients.items()
        ]
        total = torch.stack(squares).sum()
        dist.all_reduce(total)
        norm = total.sqrt()
        scale = (self._clipping / (norm + 1e-6)).clamp(max=1.0).float()
        for gradient in gradients.values():
            gradient.mul_(scale)
        return float(norm)

    @torch.no_grad()
    def weight(self, parameter: nn.Parameter) -> torch.Tensor:
        return _whole(parameter)

    @torch.no_grad()
    def state(self, parameter: nn.Parameter) -> AdamState:
        held = self._adam.state[parameter]
        return AdamState(*(_whole(held[key]) for key in AdamState._fields))

    @torch.no_grad()
    def master(self, parameter: nn.Parameter) -> torch.Tensor:
        return _whole(parameter)

    @torch.no_grad()
    def replace(self, parameter: nn.Parameter, master: torch.Tensor, state: AdamState) -> None:
        parameter.copy_(_like(master, parameter))
        for key, whole in state._asdict().items():
            self._adam.state[parameter][key].copy_(_like(whole, parameter))

    @torch.no_grad()
    def load_state(self, states: Iterable[tuple[nn.Parameter, AdamState]], steps: int) -> None:
        for parameter, state in states:
            held = {key: _like(whole, parameter).clone() for key, whole in state._asdict().items()}
            self._adam.state[parameter] = {"step": torch.tensor(float(steps)), **held}

    def close(self) -> None:
        """Nothing here keeps the model."""


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _like(whole: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """`whole`, which every rank has, sharded like the parameter; nothing is sent."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
