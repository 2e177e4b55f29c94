"""Cross entropy of next tokens whose logits lie whole on a rank, or split along the vocabulary over a tensor group."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from expertmesh.parallel.whereabouts import inside


def total_cross_entropy(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, tensor_group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """The sum over tokens of their losses, a float32 number in nats; with a group the same on each of its ranks.

    Args:
        logits_TV: [T, V] float32. With a group [T, V/tp], the run of the vocabulary that this rank holds; then they
            are overwritten, as Megatron spares a copy.
        targets_T: [T] int64 in [0, V).
        tensor_group: the tensor-parallel group of Megatron's parallel state, or None.

    The gradient of a rank's logits is that of one loss, not of one on each rank.
    """
    if tensor_group is None:
        return F.cross_entropy(logits_TV, targets_T, reduction="sum")
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    with inside("cross entropy among tensor ranks"):
        return vocab_parallel_cross_entropy(logits_TV, targets_T).sum()
