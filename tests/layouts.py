"""What tests of layouts have in common: one small model for each row of a table, its batches, and what ranks say of it.

Rows of one world size are tried by one set of processes, which costs most of the time; each reports by itself.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ranks import new_world, run_ranks
from tiny import tiny_model

from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.build_dispatcher import build_dispatcher
from expertmesh.parallel.dispatch_config import DispatchConfig
from expertmesh.parallel.groups import Groups
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.context import TrainingStep
from expertmesh.system.model.tensor_parallel import parallel_transformer
from expertmesh.system.model.weights import initialise
from expertmesh.system.train.loss import LanguageModelLoss
from expertmesh.system.train.passes import MicroBatch

VOCAB_SIZE = 16


def config_of(model: dict[str, Any]) -> ModelConfig:
    """The tiny model with changes; those to experts are changes to its experts."""
    moe = tiny_model().moe.model_dump() | model.get("moe", {})
    return ModelConfig(**(tiny_model(vocab_size=VOCAB_SIZE).model_dump() | model | {"moe": moe}))


def made(model: dict[str, Any], groups: Groups, dtype: torch.dtype = torch.float64) -> LanguageModelLoss:
    """In float64 only the loss itself and routers, which are float32, can differ."""
    part = parallel_transformer(config_of(model), groups).to(dtype)
    initialise(part, seed=5, standard_deviation=0.3)
    return LanguageModelLoss(part, build_dispatcher(groups, DispatchConfig(), Traffic(), "cpu"), groups, dtype)


def batch(sequences: int, length: int, seed: int) -> torch.Tensor:
    """tokens_BS1 of all ranks."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (sequences, length + 1), generator=generator)


def micro_batches_of(groups: Groups, tokens_BS1: torch.Tensor, count: int, step: int) -> list[MicroBatch]:
    """Sequences of one of the ranks that split the batch; `step` of 10."""
    sequences, length = len(tokens_BS1), tokens_BS1.shape[1] - 1
    each, found = sequences // count // groups.batch_size, []
    for first in range(0, sequences, sequences // count):
        mine = range(first + groups.batch_rank * each, first + (groups.batch_rank + 1) * each)
        found.append(MicroBatch(tokens_BS1[mine.start : mine.stop], TrainingStep(step, 10, 7, mine, length)))
    return found


def problems_of_rows(check: Callable[[Any], None], rows: Sequence[Any]) -> dict[int, list[str | None]]:
    """By number of row, what each rank says that `check(row)` raised. A row has `sizes`."""
    found: dict[int, list[str | None]] = {}
    worlds = [ParallelSizes(**row.sizes).world_size for row in rows]
    for world in sorted(set(worlds)):
        numbers = [number for number, of_row in enumerate(worlds) if of_row == world]
        ranks = run_ranks(_check_each, world, check, [rows[number] for number in numbers], timeout=600)
        for place, number in enumerate(numbers):
            found[number] = [problems[place] for problems in ranks]
    return found


def _check_each(check: Callable[[Any], None], rows: Sequence[Any]) -> list[str | None]:
    problems: list[str | None] = []
    for row in rows:
        try:
            check(row)
            problems.append(None)
        except Exception:
            problems.append(traceback.format_exc())
        new_world()
    return problems
