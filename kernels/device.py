"""Which device this process computes on, and with which backend it talks to others: decided here, once."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def by_triton(tensor: torch.Tensor) -> bool:
    """Whether the kernels that have a Triton form run it on this tensor; tests say yes, in Triton's interpreter."""
    return tensor.is_cuda


@dataclass(frozen=True)
class Device:
    """A torch device name and the collective backend that carries its tensors."""

    name: str  # "cpu" or "cuda:<index>"
    backend: str  # "gloo" or "nccl"


def choose_device(local_rank: int = 0) -> Device:
    """The GPU of this process where there is one, else the CPU. A CUDA device becomes the current one."""
    if not torch.cuda.is_available():
        return Device("cpu", "gloo")
    name = f"cuda:{local_rank % torch.cuda.device_count()}"
    torch.cuda.set_device(name)
    return Device(name, "nccl")
