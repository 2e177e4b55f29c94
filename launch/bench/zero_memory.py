"""What a rank has in memory at each ZeRO stage, beside what `expertmesh plan train` says of it.

A whole language model is trained on gloo ranks that split the batch, each with all experts; and once more with the
experts split over the ranks. All must give the same losses. Sequences are short, so that weights, gradients and
optimizer are nearly all there is.

Measured is what the kernel says that the rank with most had in memory at once, beyond what it had after training a
model that is too small to count.
"""

from __future__ import annotations

import ctypes
import gc
import warnings
from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from expertmesh.launch.bench.ranks import Row, Say, tables_of_ranks
from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.build_dispatcher import build_dispatcher
from expertmesh.parallel.dispatch_config import DispatchConfig
from expertmesh.parallel.groups import Groups, build_groups
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.model.attention_config import AttentionConfig
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.context import TrainingStep
from expertmesh.system.model.experts_config import SwiGLUConfig
from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.model.tensor_parallel import parallel_transformer
from expertmesh.system.model.weights import initialise
from expertmesh.system.plan.activations import activation_bytes
from expertmesh.system.plan.training_plan import plan_training
from expertmesh.system.train.build_optimizer import build_optimizer
from expertmesh.system.train.config import TrainConfig
from expertmesh.system.train.loss import LanguageModelLoss
from expertmesh.system.train.passes import MicroBatch, Passes

STAGES = (0, 1, 2, 3)
M_MMAP_THRESHOLD = -3  # malloc.h of the GNU C library
STEPS, VOCAB_SIZE, SEQUENCE_LENGTH, RATE = 3, 1024, 32, 1e-3


@dataclass(frozen=True)
class MemoryCase:
    """The size of one run."""

    ranks: int
    experts: int
    top_k: int
    hidden_size: int
    ffn_size: int
    layers: int = 4

    def model(self) -> ModelConfig:
        expert = SwiGLUConfig(hidden_size=self.ffn_size)
        return ModelConfig(
            vocab_size=VOCAB_SIZE,
            layers=self.layers,
            hidden_size=self.hidden_size,
            attention=AttentionConfig(heads=4, kv_heads=2, head_dim=max(2, self.hidden_size // 8)),
            moe=MoEConfig(ffn_experts=self.experts, top_k=self.top_k, expert=expert),
        )

    def train(self, stage: int) -> TrainConfig:
        return TrainConfig(batch_size=self.ranks, sequence_length=SEQUENCE_LENGTH, zero_stage=stage)


def bench_memory(case: MemoryCase, say: Say) -> list[Row]:
    """One row for each ZeRO stage, and one more for ZeRO 1 with experts split.

    A row has `table, what, ranks`, of a rank the plan's `parameters, weight_bytes, gradient_bytes, optimizer_bytes,
    planned_bytes` (all, with activations), and what was measured: `most_bytes` at once, `losses` of each step.

    Raises:
        RuntimeError: if layouts disagree on a loss, or a rank fails.
    """
    model, rows = case.model(), []
    for sizes, stages in ((ParallelSizes(dp=case.ranks), STAGES), (ParallelSizes(dp=case.ranks, ep=case.ranks), (1,))):
        say(f"a rank's memory, ep {sizes.ep}: planning")
        with warnings.catch_warnings(action="ignore"):  # Megatron's, of parts that it would find on a GPU
            kept = activation_bytes(model, sizes, case.train(stages[0]))
        for stage, measured in zip(
            stages, tables_of_ranks(case.ranks, partial(_measured, case, sizes, stages), say), strict=True
        ):
            (plan,) = plan_training(model, sizes, case.train(stage))
            rows.append(
                {
                    "table": "memory",
                    "what": f"ZeRO {stage}, ep {sizes.ep}",
                    "ranks": case.ranks,
                    "parameters": plan.parameters,
                    "weight_bytes": plan.weight_bytes,
                    "gradient_bytes": plan.gradient_bytes,
                    "optimizer_bytes": plan.optimizer_bytes,
                    "planned_bytes": plan.memory_bytes + sum(kept or ()),
                    **measured[0],
                }
            )
    for row in rows:
        if not torch.allclose(torch.tensor(row["losses"]), torch.tensor(rows[0]["losses"]), rtol=1e-4):
            raise RuntimeError(f"{row['what']} has losses {row['losses']}, {rows[0]['what']} {rows[0]['losses']}")
    return rows


def _measured(
    case: MemoryCase, sizes: ParallelSizes, stages: tuple[int, ...], rank: int, say: Say
) -> Iterator[list[Row]]:
    """A table of one row for each stage."""
    groups, config = build_groups(sizes), case.model()
    drawn = torch.Generator().manual_seed(0)
    tokens_BS1 = torch.randint(VOCAB_SIZE, (case.ranks, SEQUENCE_LENGTH + 1), generator=drawn)
    mine = range(rank, rank + 1)
    batch = MicroBatch(tokens_BS1[rank : rank + 1], TrainingStep(1, STEPS, 0, mine, SEQUENCE_LENGTH))
    small = replace(case, hidden_size=32, ffn_size=32).model()
    for stage in stages:
        say(f"a rank's memory, ep {sizes.ep}, ZeRO {stage}: {STEPS} steps")
        _train(small, case.train(stage), groups, batch)
        _begin_to_measure()
        before = _resident("VmRSS")
        losses = _train(config, case.train(stage), groups, batch)
        most = torch.tensor(_resident("VmHWM") - before)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        yield [{"most_bytes": int(most), "losses": losses}]


def _train(config: ModelConfig, train: TrainConfig, groups: Groups, batch: MicroBatch) -> list[float]:
    """A model of this rank for STEPS steps; cross entropy over all ranks, of each."""
    dispatcher = build_dispatcher(groups, DispatchConfig(), Traffic(), "cpu")
    with torch.device("meta" if train.zero_stage == 3 else "cpu"):
        loss = LanguageModelLoss(parallel_transformer(config, groups), dispatcher, groups, torch.float32)

    def fill(part: nn.Module, prefix: str, but: Collection[nn.Module]) -> None:
        initialise(part, train.seed, config.initializer_range, prefix, but)

    losses = []
    with closing(build_optimizer(loss, train, "cpu", fill)) as optimizer:
        for _ in range(STEPS):
            passes = Passes(loss, [batch])
            optimizer.step(passes.totals(), RATE)
            ((_, answer),) = passes.answers
            dist.all_reduce(answer.cross_entropy)
            losses.append(answer.cross_entropy.item() / dist.get_world_size())
    return losses


def _begin_to_measure() -> None:
    """Garbage goes, freed memory back to the kernel, and its high-water mark down to what is there now.

    From now on large tensors come from the kernel and go back at once: what the C library keeps of freed ones, and the
    holes between them, may be as much again.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _resident(key: str) -> int:
    """Bytes: VmRSS, those that are there now, or VmHWM, the most that were."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])
