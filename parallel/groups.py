"""The process groups of one rank, made by Megatron-Core and handed around as one frozen value.

Nothing below looks a group up globally: whoever needs one is given `Groups`, and a test can make one by hand.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch.distributed as dist

from expertmesh.parallel.sizes import ParallelSizes, expert_degree


@dataclass(frozen=True)
class Groups:
    """What this rank belongs to. A group is None where it would hold this rank alone."""

    rank: int = 0
    tensor: dist.ProcessGroup | None = None  # ranks that split each dense weight, and the tokens between them
    context: dist.ProcessGroup | None = None  # ranks that split each sequence
    pipeline: dist.ProcessGroup | None = None  # ranks that split the layers
    pipeline_back: dist.ProcessGroup | None = None  # the same ranks, for what goes the other way (see pipeline.py)
    ends: dist.ProcessGroup | None = None  # ranks of the first and last of these, for a weight that both have
    interleave: int = 1  # runs of layers on each of them
    batch: dist.ProcessGroup | None = None  # ranks that split the batch
    data: dist.ProcessGroup | None = None  # ranks with the same dense weights: they split the batch, or its sequences
    token: dist.ProcessGroup | None = None  # ranks of one stage: each token of the batch is routed on one of them
    expert: dist.ProcessGroup | None = None  # ranks that together hold every expert once
    expert_tensor: dist.ProcessGroup | None = None  # ranks that split the weights of the same experts
    expert_data: dist.ProcessGroup | None = None  # ranks that hold the same parts of the same experts
    narrower: Mapping[int, Groups] = field(default_factory=dict)  # by a smaller degree that some layers' experts have

    def of_layer(self, experts: int) -> Groups:
        """The same with `expert` and `expert_data` of a layer of that many FFN experts."""
        return self.narrower.get(expert_degree(experts, self.expert_size), self)

    @property
    def tensor_size(self) -> int:
        return _size(self.tensor)

    @property
    def tensor_rank(self) -> int:
        return _rank(self.tensor)

    @property
    def pipeline_size(self) -> int:
        return _size(self.pipeline)

    @property
    def pipeline_rank(self) -> int:
        return _rank(self.pipeline)

    @property
    def batch_size(self) -> int:
        return _size(self.batch)

    @property
    def batch_rank(self) -> int:
        return _rank(self.batch)

    @property
    def data_size(self) -> int:
        return _size(self.data)

    @property
    def data_rank(self) -> int:
        return _rank(self.data)

    @property
    def token_size(self) -> int:
        return _size(self.token)

    @property
    def expert_size(self) -> int:
        return _size(self.expert)

    @property
    def expert_rank(self) -> int:
        return _rank(self.expert)

    @property
    def expert_tensor_size(self) -> int:
        return _size(self.expert_tensor)

    @property
    def expert_tensor_rank(self) -> int:
        return _rank(self.expert_tensor)

    @property
    def expert_data_rank(self) -> int:
        return _rank(self.expert_data)


def _size(group: dist.ProcessGroup | None) -> int:
    return group.size() if group else 1


def _rank(group: dist.ProcessGroup | None) -> int:
    return group.rank() if group else 0


def build_groups(sizes: ParallelSizes, experts_of_layers: Collection[int] = ()) -> Groups:
    """Make the groups of `sizes` over the default process group, which must have `sizes.world_size` ranks.

    `experts_of_layers`: how many FFN experts layers have, for those that do not lie on all `ep` ranks.
    """
    from megatron.core import parallel_state

    world = dist.get_world_size()
    if world != sizes.world_size:
        raise ValueError(f"the process group has {world} ranks, the recipe asks for {sizes.world_size}")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        context_parallel_size=sizes.cp,
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=sizes.etp,
        create_gloo_process_groups=False,  # copies of some groups, for CPU tensors beside NCCL; nobody here uses them
    )

    # Megatron numbers ranks stage by stage, and within one tensor rank by tensor rank.
    stage, last = sizes.stage_size, world - sizes.stage_size
    pipelines = [range(first, world, stage) for first in range(stage)]
    ends = [[*range(part, stage, sizes.tp), *range(last + part, world, sizes.tp)] for part in range(sizes.tp)]

    def unless_alone(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
        return group if group.size() > 1 else None

    groups = Groups(
        rank=dist.get_rank(),
        tensor=unless_alone(parallel_state.get_tensor_model_parallel_group()),
        context=unless_alone(parallel_state.get_context_parallel_group()),
        pipeline=unless_alone(parallel_state.get_pipeline_model_parallel_group()),
        pipeline_back=_one_of(pipelines) if sizes.pp > 1 else None,
        ends=_one_of(ends) if sizes.pp > 1 else None,
        interleave=sizes.interleave,
        batch=unless_alone(parallel_state.get_data_parallel_group()),
        data=unless_alone(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        token=unless_alone(parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)),
        expert=unless_alone(parallel_state.get_expert_model_parallel_group()),
        expert_tensor=unless_alone(parallel_state.get_expert_tensor_parallel_group()),
        expert_data=unless_alone(parallel_state.get_expert_data_parallel_group()),
    )
    degrees = sorted({expert_degree(experts, sizes.ep) for experts in experts_of_layers} - {sizes.ep})
    return replace(groups, narrower={degree: _with_degree(degree, groups, sizes) for degree in degrees})


def _with_degree(degree: int, groups: Groups, sizes: ParallelSizes) -> Groups:
    """Megatron has one expert-parallel degree at a time; these lie as it would lay them."""
    world, stage, etp, once = sizes.world_size, sizes.stage_size, sizes.etp, sizes.etp * degree
    share_out = [range(rank, rank + once, etp) for first in range(0, world, once) for rank in range(first, first + etp)]
    hold_same = [
        range(rank, first + stage, once) for first in range(0, world, stage) for rank in range(first, first + once)
    ]
    return replace(groups, expert=_one_of(share_out) if degree > 1 else None, expert_data=_one_of(hold_same))


def _one_of(groups_of_ranks: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """The group of them that this rank is in. Every rank makes all of them, in one order."""
    groups = [dist.new_group(list(ranks)) for ranks in groups_of_ranks]
    mine = [group for group, ranks in zip(groups, groups_of_ranks, strict=True) if dist.get_rank() in ranks]
    return mine[0] if mine else None


def destroy_groups() -> None:
    """Leave all groups, so that this process can be in others. Peers that wait for it lose their connection."""
    from megatron.core import parallel_state
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    # A world that did not come to be has used up a name, which is a number: peers would wait under the one before.
    dist.distributed_c10d._world.group_count = 0
    _clear_sharding_prop_cache()  # DTensors find in it, by an equal mesh, groups that are no more
