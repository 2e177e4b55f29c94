"""All that a training run needs to go on as if it had never stopped.

    checkpoints/step-000050/             weights, config and tokenizer (see system/model/checkpoint.py), and
      training/state.json                step, and the settings that must not change
      training/optimizer-00001-of-...    Adam moments of each weight under the name that every layout shares
      training/checksums*.json           of every file (see checksums.py)
    checkpoint -> checkpoints/step-...   the newest

A folder is written under another name, flushed, then renamed: no moment exists at which a kill leaves half of one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from expertmesh.parallel.groups import Groups
from expertmesh.parallel.optimizer import AdamState, TrainingOptimizer
from expertmesh.parallel.shard import WHOLE, gather_parts
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
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import Weight, weights
from expertmesh.system.train.checksums import verify, write_checksums

OPTIMIZER_INDEX = "optimizer.safetensors.index.json"


@dataclass(frozen=True)
class RunState:
    """Where a run stands after `step` updates."""

    step: int
    settings: dict[str, Any]  # what a resumed run must have in common: model, data, batches, optimizer


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; those before it are whole. The message is one line."""


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    steps = {p: p.name.removeprefix("step-") for p in (run_dir / "checkpoints").glob("step-*")}
    return sorted((p for p, step in steps.items() if step.isdigit()), key=lambda p: int(steps[p]))


def save(
    run_dir: Path,
    state: RunState,
    model: Transformer,
    zero: TrainingOptimizer,
    groups: Groups,
    tokenizer_folder: Path,
    keep: int,
) -> Path:
    """Write a checkpoint of `run_dir`; every rank calls it and must see the same file system. Returns its folder.

    Each expert-parallel rank writes its own experts, and those of the first sequences the dense weights too. Of weights
    that are split over a tensor group each rank gathers and writes some, so that none holds more than it did. Stages of
    a pipeline write their layers each, and the first a tied embedding.
    Raises SaveFailed where the disk does not take it; other ranks then lose a peer.
    """
    with _told_if_it_fails(state.step):
        final = run_dir / "checkpoints" / f"step-{state.step:06d}"
        writing = final.with_name(final.name + ".writing")
        if groups.rank == 0:
            clear_unfinished(run_dir)
            (writing / "training").mkdir(parents=True)
            shutil.copytree(tokenizer_folder, writing, dirs_exist_ok=True)
            write_config(writing, model.config)
        _wait_for_all()

        model_tensors, optimizer_tensors = {}, {}
        for number, weight in enumerate(weights(model)):
            # Collectives: also on ranks that write nothing. A frozen weight has no moments.
            held = zero.weight(weight.parameter)
            moments = zero.state(weight.parameter)._asdict() if weight.parameter.requires_grad else {}
            if groups.expert_data_rank if weight.is_expert else groups.data_rank:
                continue  # another rank has the same
            if weight.parameter is model.tied_weight and groups.pipeline_rank:
                continue
            model_tensors.update(_whole(weight, held, groups, number))
            for kind, tensor in moments.items():
                whole = _whole(weight, tensor, groups, number)
                optimizer_tensors.update({f"{kind}/{name}": view for name, view in whole.items()})
        # Megatron's order of ranks: stage by stage, and in each those that hold the first copy of something come first.
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
        _wait_for_all()

        if groups.rank == 0:
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
            for old in finished[: finished.index(final) + 1][:-keep]:
                _delete(old)
        _wait_for_all()
        return final


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
    parts = [weight.split(part) for part in gather_parts(tensor, group, to=number % size)]
    return {name: torch.cat([part[name] for part in parts], weight.shard.dim) for name in (parts[0] if parts else ())}


def read_state(folder: Path) -> RunState:
    """Where the run that wrote the checkpoint in `folder` stood; the checkpoint's files are looked at too."""
    open_checkpoint(folder)
    read_index(folder / "training" / OPTIMIZER_INDEX)
    path = folder / "training" / "state.json"
    content = read_json(path)
    missing = [field.name for field in fields(RunState) if field.name not in content]
    if missing:
        raise CheckpointError(f"{path}: no key {missing[0]!r}; the checkpoint is damaged")
    return RunState(**{field.name: content[field.name] for field in fields(RunState)})


def load_optimizer(folder: Path, state: RunState, model: Transformer, zero: TrainingOptimizer) -> None:
    """Give `zero` the moments of `model`'s weights, from a checkpoint that any layout may have written."""
    training = folder / "training"
    index = read_index(training / OPTIMIZER_INDEX)
    states = {}
    for weight in weights(model):
        if not weight.parameter.requires_grad:
            continue
        shape, device = weight.parameter.shape, weight.parameter.device
        moments = {kind: torch.zeros(shape, device=device) for kind in AdamState._fields}
        for kind, whole in moments.items():
            views = {f"{kind}/{name}": view for name, view in weight.split(whole).items()}
            fill(views, training / OPTIMIZER_INDEX, index, weight.shard)
        states[weight.parameter] = AdamState(**moments)
    zero.load_state(states, state.step)


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
        dist.barrier()
