"""The process groups of one rank, made by Megatron-Core and handed around as one frozen value.

Nothing below looks a group up globally: whoever needs one is given `Groups`, and a test can make one by hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from expertmesh.parallel.sizes import ParallelSizes


@dataclass(frozen=True)
class Groups:
    """What this rank belongs to. A group is None where it would hold this rank alone."""

    rank: int = 0
    data: dist.ProcessGroup | None = None  # ranks that split the batch
    expert: dist.ProcessGroup | None = None  # ranks that together hold every expert once
    expert_data: dist.ProcessGroup | None = None  # ranks that hold the same experts

    @property
    def data_size(self) -> int:
        return self.data.size() if self.data else 1

    @property
    def data_rank(self) -> int:
        return self.data.rank() if self.data else 0

    @property
    def expert_size(self) -> int:
        return self.expert.size() if self.expert else 1

    @property
    def expert_rank(self) -> int:
        return self.expert.rank() if self.expert else 0

    @property
    def expert_data_rank(self) -> int:
        return self.expert_data.rank() if self.expert_data else 0


def build_groups(sizes: ParallelSizes) -> Groups:
    """Make the groups of `sizes` over the default process group, which must have `sizes.world_size` ranks."""
    from megatron.core import parallel_state

    world = dist.get_world_size()
    if world != sizes.world_size:
        raise ValueError(f"the process group has {world} ranks, the recipe asks for {sizes.world_size}")
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,  # copies of some groups, for CPU tensors beside NCCL; nobody here uses them
    )

    def unless_alone(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
        return group if group.size() > 1 else None

    return Groups(
        rank=dist.get_rank(),
        data=unless_alone(parallel_state.get_data_parallel_group()),
        expert=unless_alone(parallel_state.get_expert_model_parallel_group()),
        expert_data=unless_alone(parallel_state.get_expert_data_parallel_group()),
    )
