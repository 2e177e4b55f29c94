"""DeepSpeed ZeRO over Megatron's groups: the optimizer of a training rank.

DeepSpeed finds experts only inside its own `MoE` class and its own group tables, and it takes Megatron's groups only
through an `mpu` object with methods that Megatron no longer has. Both gaps are closed here, so that a model knows
nothing of DeepSpeed: `build_zero` takes any module, and is told which ranks hold which of its parameters. DeepSpeed's
flat partitions never reach a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from expertmesh.parallel.deepspeed_build import prepare_build
from expertmesh.parallel.optimizer import AdamState, TorchAdam, TrainingOptimizer


class Alike(NamedTuple):
    """Parameters that the ranks of one group hold, and not just those that split the batch or its sequences."""

    name: str  # for DeepSpeed's tables; each has its own
    parameters: Sequence[nn.Parameter]
    group: dist.ProcessGroup | None  # None: this rank alone


def _megatron_adapter() -> SimpleNamespace:
    """Megatron's parallel state under the names that DeepSpeed asks for ("model parallel": of tensors and layers)."""
    from megatron.core import parallel_state

    adapter = SimpleNamespace()
    for what in ("group", "world_size", "rank"):
        for group in ("tensor_model_parallel", "pipeline_model_parallel"):
            setattr(adapter, f"get_{group}_{what}", getattr(parallel_state, f"get_{group}_{what}"))
        # Of a sequence that is split, each rank has some tokens: to DeepSpeed it is as if the batch were split further.
        of_data = getattr(parallel_state, f"get_data_parallel_{what}")
        setattr(adapter, f"get_data_parallel_{what}", partial(of_data, with_context_parallel=True))
    # Over these and the data-parallel ranks a norm is summed: together they are all ranks.
    adapter.get_model_parallel_group = parallel_state.get_model_parallel_group
    adapter.get_model_parallel_world_size = lambda: parallel_state.get_model_parallel_group().size()
    adapter.get_model_parallel_rank = lambda: parallel_state.get_model_parallel_group().rank()
    return adapter


def _marked(module: nn.Module, held_by: dict[str, dist.ProcessGroup]) -> nn.Module:
    """`module` inside the one class whose parameters DeepSpeed reduces in groups of their own."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups as tables
    from megatron.core import parallel_state

    class Marked(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)  # MoE's own would build DeepSpeed's layer
            self.inner = module
            self.num_local_experts = self.num_experts = 1  # DeepSpeed's checkpoints alone read these
            self.expert_group_name = next(iter(held_by))

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            expert = parallel_state.get_expert_model_parallel_group()
            for name, group in held_by.items():
                tables._EXPERT_PARALLEL_GROUP[name] = expert
                tables._EXPERT_DATA_PARALLEL_GROUP[name] = group
                tables._EXPERT_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(expert)
                tables._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(group)

        def forward(self, *args: Any) -> Any:
            return self.inner(*args)

    return Marked()


BUCKET = 2**25  # numbers of gradients that are reduced at once, at most; by itself DeepSpeed has memory for 5e8
OTHERS = "others"  # are reduced among the ranks that split the batch or its sequences


def bucket_of(parameters: Iterable[nn.Parameter]) -> int:
    """Numbers of gradients that are reduced at once, in memory of their own."""
    return min(BUCKET, sum(parameter.numel() for parameter in parameters))


def _kind(parameter: nn.Parameter) -> str:
    return getattr(parameter, "group_name", OTHERS)


def _parameter_groups(
    parameters: Sequence[nn.Parameter], kinds: Sequence[str], decays: set[int], weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's groups: apart by the ranks that hold the parameters, and by weight decay; the same order on every rank.

    DeepSpeed's own function lists names of groups in the order of a set: with two names each process has its own order,
    and the collectives of one rank meet others of the next.
    """
    groups = []
    for name in (OTHERS, *kinds):
        for decayed in (True, False):
            held = [
                parameter
                for parameter in parameters
                if _kind(parameter) == name and (id(parameter) in decays) == decayed
            ]
            if held:
                decay = weight_decay if decayed else 0.0
                groups.append({"params": held, "name": name, "weight_decay": decay, "moe": name != OTHERS})
    return groups


def build_zero(
    module: nn.Module,
    held_alike: Sequence[Alike],
    decayed_parameters: Sequence[nn.Parameter],
    *,
    stage: int,
    gradient_clipping: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> TrainingOptimizer:
    """AdamW for `module`, with gradient reduction, partitioning and clipping of one of DeepSpeed's stages.

    A gradient is summed over the ranks that hold the same parameter, as `held_alike` says, the same names in the same
    order on every rank; of all others over those that split the batch or its sequences. Then it is divided by the
    number of these. So no size changes what is trained.

    `decayed_parameters` are those that weight decay is for. `stage` 0 splits nothing, 1 optimizer state, 2 gradients
    too.
    """
    prepare_build()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    from deepspeed.utils import logger
    from megatron.core import parallel_state

    logger.setLevel("WARNING")
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    for parameter in module.parameters():
        # DeepSpeed would count others on the first rank of a tensor group alone.
        parameter.model_parallel = True  # type: ignore[attr-defined]
    marked = module
    # Who is alone in any group is so in that of the widest experts, which has the fewest ranks.
    alone = parallel_state.get_expert_data_parallel_group()
    held_by = {name: group or alone for name, _, group in held_alike}
    data = parallel_state.get_data_parallel_group(with_context_parallel=True)
    others = dist.get_process_group_ranks(data)
    for name, held, _ in held_alike:
        if held and dist.get_process_group_ranks(held_by[name]) != others:
            marked = _marked(module, held_by)
            for parameter in held:
                parameter.allreduce = False  # type: ignore[attr-defined]
                parameter.group_name = name  # type: ignore[attr-defined]
    # DeepSpeed stumbles over empty parameters.
    parameters = [p for p in module.parameters() if p.numel() and p.requires_grad]
    decays = {id(parameter) for parameter in decayed_parameters}
    parameter_groups = _parameter_groups(parameters, list(held_by), decays, weight_decay)
    adam = torch.optim.AdamW(parameter_groups, lr=0.0, betas=betas)
    engine, optimizer, *_ = deepspeed.initialize(
        model=marked,
        optimizer=adam,
        mpu=_megatron_adapter(),
        config={
            # Only ratios of these matter to the engine; the trainer cuts its own batches.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket_of(parameters)},
            "zero_allow_untested_optimizer": True,
            # At stage 0 DeepSpeed takes the mean of the ranks' norms, which is none when their experts differ.
            "gradient_clipping": gradient_clipping if stage else 0.0,
        },
    )
    if stage:
        return Partitioned(engine, optimizer)
    copies = {parameter: held_by.get(_kind(parameter), data).size() for parameter in parameters}
    return Unpartitioned(engine, adam, copies, gradient_clipping)


class Unpartitioned(TorchAdam):
    """ZeRO 0: DeepSpeed reduces gradients, and every rank updates all that it has."""

    def __init__(
        self, engine: Any, adam: torch.optim.AdamW, copies: dict[nn.Parameter, int], gradient_clipping: float
    ) -> None:
        super().__init__(adam, copies, gradient_clipping)
        self._engine = engine

    def step(self, totals: Iterable[torch.Tensor], learning_rate: float) -> float:
        self._set_rate(learning_rate)
        with self._engine.no_sync():
            for total in totals:
                self._engine.backward(total)
        self._engine.allreduce_gradients(BUCKET)  # of these it reduces one more parameter at once
        norm = self._clip()
        self._engine.step()
        return norm

    def close(self) -> None:
        """What the engine has on the model would keep it."""
        self._engine.destroy()


class Partitioned(TrainingOptimizer):
    """ZeRO 1 and 2. Each number of a gradient lies in one partition on one rank, and is counted once in the norm."""

    def __init__(self, engine: Any, optimizer: Any) -> None:
        self._engine, self._optimizer = engine, optimizer

    def step(self, totals: Iterable[torch.Tensor], learning_rate: float) -> float:
        """Gradients are added up on this rank and reduced once at the end, with ZeRO 2 too.

        Reducing earlier would have the ranks of a pipeline wait in a ring.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.clear_backward_seen_flag()
        with self._engine.coalesce_grad_reduction():
            for total in totals:
                self._engine.backward(total)
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def weight(self, parameter: nn.Parameter) -> torch.Tensor:
        return parameter.detach()

    @torch.no_grad()
    def state(self, parameter: nn.Parameter) -> AdamState:
        group = self._group(parameter)
        flat = self._optimizer.optimizer.state[self._optimizer.single_partition_of_fp32_groups[group]]
        return AdamState(*(self._whole(parameter, group, flat[key]) for key in AdamState._fields))

    @torch.no_grad()
    def master(self, parameter: nn.Parameter) -> torch.Tensor:
        group = self._group(parameter)
        return self._whole(parameter, group, self._optimizer.single_partition_of_fp32_groups[group])

    @torch.no_grad()
    def replace(self, parameter: nn.Parameter, master: torch.Tensor, state: AdamState) -> None:
        parameter.copy_(master)
        partition = self._optimizer.single_partition_of_fp32_groups[self._group(parameter)]
        flat = self._optimizer.optimizer.state[partition]
        if place := _place(parameter):
            partition[place.in_partition].copy_(master.flatten()[place.in_parameter])
            for key, whole in state._asdict().items():
                flat[key][place.in_partition].copy_(whole.flatten()[place.in_parameter])

    def _group(self, parameter: nn.Parameter) -> int:
        """The number of the parameter group that has it."""
        return next(i for i, p in enumerate(self._optimizer.bit16_groups) if any(q is parameter for q in p))

    def _whole(self, parameter: nn.Parameter, group: int, partition: torch.Tensor) -> torch.Tensor:
        """Shaped like the parameter, float32: what ranks have of it in their partitions; a view where one has all."""
        place, ranks = _place(parameter), self._optimizer.real_dp_process_group[group]
        if place and ranks.size() == 1:
            return partition[place.in_partition].view_as(parameter)
        whole = torch.zeros(parameter.numel(), device=parameter.device)
        if place:
            whole[place.in_parameter].copy_(partition[place.in_partition])
        dist.all_reduce(whole, group=ranks)
        return whole.view_as(parameter)

    @torch.no_grad()
    def load_state(self, states: Iterable[tuple[nn.Parameter, AdamState]], steps: int) -> None:
        optimizer = self._optimizer
        for partition in optimizer.single_partition_of_fp32_groups:
            empty = {key: torch.zeros_like(partition) for key in AdamState._fields}
            optimizer.optimizer.state[partition] = {"step": torch.tensor(float(steps)), **empty}
        for parameter, state in states:
            if place := _place(parameter):
                partition = optimizer.single_partition_of_fp32_groups[self._group(parameter)]
                flat = optimizer.optimizer.state[partition]
                for key, whole in state._asdict().items():
                    flat[key][place.in_partition].copy_(whole.flatten()[place.in_parameter])

    def close(self) -> None:
        """The engine's hooks on gradients would keep the model."""
        self._engine.destroy()


class _Place(NamedTuple):
    """The part of a flattened parameter whose optimizer state is on this rank, and where it lies in the partition."""

    in_parameter: slice
    in_partition: slice


def _place(parameter: nn.Parameter) -> _Place | None:
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:  # wholly in another rank's partition
        return None
    part, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
    return _Place(slice(part.start, part.start + part.numel), slice(flat.start, flat.start + flat.numel))
