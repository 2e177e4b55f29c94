"""Activations that are computed again in the backward instead of being kept (arXiv 1604.06174).

    none     all are kept
    moe      of a layer with experts only what enters it is kept: rows, hidden units and answers come again
    block    of a block only what enters it is kept

The second forward gives the bits of the first: what is drawn in training hangs on step and sequence alone. It makes the
same exchanges again, on all ranks in one order; so it runs to its end on each, also where a rank could stop earlier.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from expertmesh.system.model.moe import MoE
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.train.config import Recompute


def recompute(model: Transformer, what: Recompute) -> None:
    """Have the parts of `model` that `what` names computed twice in training; call it once."""
    parts: dict[Recompute, list[nn.Module]] = {
        "none": [],
        "moe": [module for module in model.modules() if isinstance(module, MoE)],
        "block": list(model.layers),
    }
    for part in parts[what]:
        twice = partial(checkpoint, part.forward, use_reentrant=False, early_stop=False)
        part.forward = twice  # type: ignore[method-assign]


@dataclass
class Kept:
    """What a forward keeps for its backward, on this rank."""

    bytes: int = 0


@contextmanager
def counting_kept(module: nn.Module) -> Iterator[Kept]:
    """Count the memory that autograd keeps for the backward of what is computed meanwhile; parameters do not count.

    Nor does what is gone again at the end: whole weights of fully sharded ones.
    """
    of_parameters = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}  # held: freed memory that comes again is new

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen.setdefault(storage._cdata, storage)
        return tensor

    kept = Kept()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
    kept.bytes = sum(storage.nbytes() for name, storage in seen.items() if name not in of_parameters)
