"""All that a training run needs to go on as if it had never stopped.

    checkpoints/step-000050/             weights, config and tokenizer (see system/model/checkpoint.py), and
      training/state.json                step, and the settings that must not change
      training/optimizer-00001-of-...    Adam moments of each weight under the name that every layout shares
      training/checksums*.json           of every file (see checksums.py)
    checkpoint -> checkpoints/step-...   the newest

A folder is written under another name, flushed, then renamed: no moment exists at which a kill leaves half of one. It
is written while training goes on (see Saver), from a copy of the state that each rank makes between two steps.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn

from expertmesh.parallel.groups import Groups
from expertmesh.parallel.optimizer import AdamState, TrainingOptimizer
from expertmesh.parallel.shard import WHOLE, gather_parts
from expertmesh.parallel.whereabouts import inside
from expertmesh.system.model.checkpoint import (
    INDEX,
    CheckpointError,
    fill,
    flush,
    open_checkpoint,
    read_index,
    read_json,
    shard_name,
    write_config,
    write_index,
    write_json,
    write_tensors,
)
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import Weight, weights
from expertmesh.system.train.checksums import verify, write_checksums

OPTIMIZER_INDEX = "optimizer.safetensors.index.json"


@dataclass(frozen=True)
class RunState:
    """Where a run stands after `step` updates."""

    step: int
    settings: dict[str, Any]  # what a resumed run must have in common: model, data, batches, optimizer
    copied: dict[str, list[int]] = field(default_factory=dict)  # by layer, experts with copies in the next step


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; those before it are whole. The message is one line."""


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    steps = {p: p.name.removeprefix("step-") for p in (run_dir / "checkpoints").glob("step-*")}
    return sorted((p for p, step in steps.items() if step.isdigit()), key=lambda p: int(steps[p]))


class Saver:
    """Writes checkpoints of `run_dir` while training goes on; every rank has one and must see the same file system.

        save       the state is copied to host memory, which is kept for the next time; training waits for no more
        writing    a thread of each rank that has something to write writes it aside
        finishing  all have written: rank 0's thread adds the index, and renames
        landed     `told` is called

    One checkpoint at a time. That all have written is agreed by the training threads, in the sums of a step (`agree`)
    or by waiting (`wait`): collectives of threads beside them would need groups of their own, and hang where a rank is
    lost. What is cut short between two agreements stays unfinished, and does no harm.

    Each expert-parallel rank writes its own experts, and those of the first sequences the dense weights too. Of weights
    that are split over a tensor group each rank gathers and writes some, so that none holds more than it did. Stages of
    a pipeline write their layers each, and the first a tied embedding.

    Where the disk does not take it, that rank raises SaveFailed the next time that anything is asked of its Saver; the
    other ranks then lose a peer.
    """

    def __init__(
        self, run_dir: Path, groups: Groups, tokenizer_folder: Path, keep: int, told: Callable[[int, Path], None]
    ) -> None:
        """`keep`: how many of the newest checkpoints stay. `told` is given the step and folder of one that landed."""
        self._run_dir, self._groups, self._tokenizer_folder, self._keep = run_dir, groups, tokenizer_folder, keep
        self._told = told
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._task: Future[None] | None = None  # this rank's share of what is in flight
        self._state: RunState | None = None  # of the checkpoint in flight; the same on all ranks
        self._finishing = False
        self._kept: dict[str, torch.Tensor] = {}  # host memory, by the names of what was last copied to it

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *error: object) -> None:
        """The thread ends, once it has done what it is at; what no rank waited for stays unfinished."""
        self._thread.shutdown()

    def save(self, state: RunState, model: Transformer, zero: TrainingOptimizer) -> None:
        """Begin to write a checkpoint, once the one before has landed. A collective: every rank calls it."""
        self.wait()
        with _told_if_it_fails(state.step):
            if self._groups.rank == 0:
                clear_unfinished(self._run_dir)
                (_aside(self._folder(state)) / "training").mkdir(parents=True)
        _wait_for_all()
        model_tensors, optimizer_tensors = self._copy(model, zero)
        self._state, self._finishing = state, False
        self._task = self._thread.submit(self._write, state, model.config, model_tensors, optimizer_tensors)

    def busy(self) -> bool:
        """Whether this rank has still to write. Raises SaveFailed."""
        if self._task is None:
            return False
        done = self._task.done()
        if done:
            self._task.result()
        return not done

    def agree(self, busy_ranks: float) -> None:
        """Go on with the checkpoint in flight. Every rank calls it, with the number of those that said to be `busy`."""
        if self._state is None or busy_ranks:
            return
        if not self._finishing:
            self._finishing = True
            if self._groups.rank == 0:
                self._task = self._thread.submit(self._finish, self._state)
            return
        landed, self._state = self._state, None
        self._told(landed.step, self._folder(landed))

    def wait(self) -> None:
        """Until nothing is in flight. A collective: every rank calls it. Raises SaveFailed."""
        while self._state is not None:
            if self._task is not None:
                self._task.result()
            _wait_for_all()
            self.agree(0)

    def _folder(self, state: RunState) -> Path:
        return self._run_dir / "checkpoints" / f"step-{state.step:06d}"

    def _copy(
        self, model: Transformer, zero: TrainingOptimizer
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What this rank is to write, of the model and of the optimizer, by name, out of reach of further updates.

        A collective: also on ranks that write nothing.
        """
        groups, before = self._groups, self._kept
        self._kept = {}

        def kept(name: str, tensor: torch.Tensor) -> torch.Tensor:
            there = before.get(name)
            if there is None:  # at first, and of experts that came from another rank
                there = torch.empty_like(
                    tensor, device="cpu", pin_memory=tensor.is_cuda, memory_format=torch.contiguous_format
                )
            self._kept[name] = there
            return there.copy_(tensor)

        model_tensors, optimizer_tensors = {}, {}
        for number, weight in enumerate(weights(model)):
            with _gathering(weight):
                held = zero.weight(weight.parameter)
                # A frozen weight has no moments.
                moments = zero.state(weight.parameter)._asdict() if weight.parameter.requires_grad else {}
            copy = groups.data_rank if weight.experts is None else groups.of_layer(weight.experts).expert_data_rank
            if copy > 0:
                continue  # another rank has the same, and writes it
            if weight.parameter is model.tied_weight and groups.pipeline_rank:
                continue
            for name, view in _whole(weight, held, groups, number).items():
                model_tensors[name] = kept(name, view)
            for kind, tensor in moments.items():
                for name, view in _whole(weight, tensor, groups, number).items():
                    optimizer_tensors[f"{kind}/{name}"] = kept(f"{kind}/{name}", view)
        return model_tensors, optimizer_tensors

    def _write(
        self,
        state: RunState,
        config: ModelConfig,
        model_tensors: dict[str, torch.Tensor],
        optimizer_tensors: dict[str, torch.Tensor],
    ) -> None:
        """This rank's files."""
        groups, writing = self._groups, _aside(self._folder(state))
        with _told_if_it_fails(state.step):
            if groups.rank == 0:
                shutil.copytree(self._tokenizer_folder, writing, dirs_exist_ok=True)
                write_config(writing, config)
            # Megatron's order of ranks: stage by stage, and in each those that hold the first copy of something first.
            writers = max(groups.tensor_size, groups.expert_tensor_size * groups.expert_size)
            rank_in_stage = groups.rank % groups.token_size
            if rank_in_stage < writers:
                number, count = groups.pipeline_rank * writers + rank_in_stage, groups.pipeline_size * writers
                written = (
                    writing / shard_name("model", number, count),
                    writing / "training" / shard_name("optimizer", number, count),
                )
                for tensors, path in zip((model_tensors, optimizer_tensors), written, strict=True):
                    write_tensors(tensors, path)
                write_checksums(writing, written, f"checksums-{number + 1:05d}-of-{count:05d}.json")

    def _finish(self, state: RunState) -> None:
        """On rank 0, when all files are there: make the folder a checkpoint, and room for the next."""
        run_dir, final = self._run_dir, self._folder(state)
        writing = _aside(final)
        with _told_if_it_fails(state.step):
            write_index(writing / INDEX, sorted(writing.glob("model-*.safetensors")))
            optimizer_files = sorted((writing / "training").glob("optimizer-*.safetensors"))
            write_index(writing / "training" / OPTIMIZER_INDEX, optimizer_files)
            write_json(asdict(state), writing / "training" / "state.json")
            write_checksums(writing, sorted(p for p in writing.rglob("*") if _is_small(p)))
            for path in (*writing.rglob("*"), writing):
                flush(path)
            link = run_dir / "checkpoint"
            if final.exists():  # a run that went back to an older checkpoint comes by here again
                for other in [p for p in checkpoints_of(run_dir) if p != final][-1:]:
                    _point_to(link, other)
                _delete(final)
            os.replace(writing, final)
            flush(final.parent)
            _point_to(link, final)
            finished = checkpoints_of(run_dir)
            for old in finished[: finished.index(final) + 1][: -self._keep]:
                _delete(old)


def _aside(final: Path) -> Path:
    """Where a checkpoint is written, beside the folder that it will be."""
    return final.with_name(final.name + ".writing")


@contextmanager
def _told_if_it_fails(step: int) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise SaveFailed(f"step {step} could not be saved: {reason}; the checkpoints before it are whole") from error


def _is_small(path: Path) -> bool:
    """Whether it is a file that the first rank alone answers for."""
    return path.is_file() and path.suffix != ".safetensors" and not path.name.startswith("checksums")


def last_whole(run_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint of a run that is as it was written, and what is wrong with each newer one."""
    damaged = dict[Path, str]()
    for folder in reversed(checkpoints_of(run_dir)):
        try:
            read_state(folder)
            verify(folder)
        except CheckpointError as error:
            damaged[folder] = str(error)
        else:
            return folder, damaged
    return None, damaged


def set_aside(run_dir: Path, damaged: dict[Path, str], whole: Path) -> None:
    """Rename damaged checkpoints to damaged-step-..., and have `checkpoint` lead to the `whole` one before them."""
    if damaged:
        _point_to(run_dir / "checkpoint", whole)
    for folder in damaged:
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)


def clear_unfinished(run_dir: Path) -> None:
    """Delete what saves that were cut short have left, which is room on the disk; no worker may be saving."""
    for left in (run_dir / "checkpoints").glob("step-*.*"):
        shutil.rmtree(left, ignore_errors=True)


def _whole(weight: Weight, tensor: torch.Tensor, groups: Groups, number: int) -> dict[str, torch.Tensor]:
    """The full tensors of `tensor`, shaped like `weight`, by name; on one rank of those that hold parts, else none.

    A collective among these. `number`: of the weight, so that they take turns.
    """
    group = groups.expert_tensor if weight.is_expert else groups.tensor
    size, rank = (group.size(), group.rank()) if group else (1, 0)
    if weight.shard == WHOLE:
        return weight.split(tensor) if rank == 0 else {}
    with _gathering(weight):
        parts = [weight.split(part) for part in gather_parts(tensor, group, to=number % size)]
    return {name: torch.cat([part[name] for part in parts], weight.shard.dim) for name in (parts[0] if parts else ())}


def _gathering(weight: Weight) -> inside:
    return inside(f"a checkpoint's gather of {weight.name}")


def read_state(folder: Path) -> RunState:
    """Where the run that wrote the checkpoint in `folder` stood; the checkpoint's files are looked at too."""
    open_checkpoint(folder)
    read_index(folder / "training" / OPTIMIZER_INDEX)
    path = folder / "training" / "state.json"
    content = read_json(path)
    names = [each.name for each in fields(RunState) if each.default_factory is MISSING or each.name in content]
    missing = [name for name in names if name not in content]
    if missing:
        raise CheckpointError(f"{path}: no key {missing[0]!r}; the checkpoint is damaged")
    return RunState(**{name: content[name] for name in names})


def load_optimizer(folder: Path, state: RunState, model: Transformer, zero: TrainingOptimizer) -> None:
    """Give `zero` the moments of `model`'s weights, from a checkpoint that any layout may have written."""
    index = folder / "training" / OPTIMIZER_INDEX
    zero.load_state(_states(index, model), state.step)


def _states(index: Path, model: Transformer) -> Iterator[tuple[nn.Parameter, AdamState]]:
    """One after the other, each read when it is asked for."""
    weight_map = read_index(index)
    for weight in weights(model):
        if not weight.parameter.requires_grad:
            continue
        shape, device = weight.parameter.shape, weight.parameter.device
        moments = {kind: torch.zeros(shape, device=device) for kind in AdamState._fields}
        for kind, whole in moments.items():
            views = {f"{kind}/{name}": view for name, view in weight.split(whole).items()}
            fill(views, index, weight_map, weight.shard)
        yield weight.parameter, AdamState(**moments)


def _point_to(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to `target`, in one step."""
    fresh = link.with_name(link.name + ".writing")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, link.parent))
    os.replace(fresh, link)
    flush(link.parent)


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint. A kill meanwhile leaves a part of it, but not under the name of a checkpoint."""
    deleting = checkpoint.with_name(checkpoint.name + ".deleting")
    os.replace(checkpoint, deleting)
    shutil.rmtree(deleting)


def _wait_for_all() -> None:
    if dist.is_initialized():
        with inside("a checkpoint's barrier"):
            dist.barrier()
