"""A training job from the side of the one who started it: prepare, place workers, watch, report."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from expertmesh.launch.find_checkpoint import find_checkpoint
from expertmesh.launch.recipe import Recipe, check_together
from expertmesh.launch.roles import Epoch
from expertmesh.launch.run_folder import lock_of
from expertmesh.launch.started_ranks import FirstRank
from expertmesh.launch.supervise import supervise
from expertmesh.parallel.deepspeed_build import is_built, prepare_build
from expertmesh.system.model.check_split import check_split
from expertmesh.system.model.checkpoint import Checkpoint, open_checkpoint
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.train.corpus import check_source
from expertmesh.system.train.dataset import TokenDataset, prepare_tokens
from expertmesh.system.train.read_run import read_run
from expertmesh.system.train.report import write_report
from expertmesh.system.train.snapshot import checkpoints_of, last_whole, read_state, set_aside
from expertmesh.system.train.trainer import Record


class Start(NamedTuple):
    """Where a job begins."""

    step: int
    resume_from: Path | None  # the run's own checkpoint
    begin_with: Checkpoint | None  # whose weights step 0 has; None: drawn from the seed
    model: ModelConfig
    tokenizer: str | None  # where it is; None: it is to be trained
    note: str | None = None  # what to tell the user about earlier runs in the same folder


def find_start(recipe: Recipe, fresh: bool) -> Start:
    """Decide between going on and starting anew; an earlier run that is not gone on with is moved aside, never deleted.

    Damaged checkpoints are set aside, and the note says so. Raises ValueError when an unfinished run in the folder was
    made with other settings, or no checkpoint of it is whole.
    A run that goes on needs nothing of the checkpoint that it once started from.
    """
    check_source(recipe.data.source)
    run_folder = recipe.run_folder
    checkpoints = checkpoints_of(run_folder)
    if fresh or not checkpoints:
        return _from_the_beginning(recipe, bool(checkpoints))
    whole, damaged = last_whole(run_folder)
    if whole is None:
        raise ValueError(f"{damaged[checkpoints[-1]]}; no checkpoint of {run_folder} is whole, --fresh starts over")
    state = read_state(whole)
    if state.step >= recipe.train.steps:
        return _from_the_beginning(recipe, moved_aside=True)
    changed = _first_difference(
        recipe.settings_of(state.settings) | {"tokens": None}, recipe.settings() | {"tokens": None}
    )
    if changed:
        raise ValueError(
            f"{run_folder} holds an unfinished run with {changed}; "
            "give the old settings to go on, --fresh to start over, or another name="
        )
    model, tokenizer = recipe.model, recipe.data.tokenizer
    if recipe.start_from is not None:
        model, tokenizer = open_checkpoint(whole).config, str(whole)
        check_together(recipe, model)
    set_aside(run_folder, damaged, whole)
    lost = "".join(f"{told}; set aside. " for told in damaged.values())
    note = f"{lost}going on from step {state.step} of {run_folder} (--fresh starts over)"
    return Start(state.step, whole, None, model, tokenizer, note)


def _from_the_beginning(recipe: Recipe, moved_aside: bool) -> Start:
    """Step 0. `moved_aside`: put away the run that is in the folder, once all else is right."""
    run_folder = recipe.run_folder
    start = Start(0, None, None, recipe.model, recipe.data.tokenizer)
    if recipe.start_from is not None:
        begin_with = find_checkpoint(Path(recipe.start_from))
        if begin_with.folder.is_relative_to(run_folder.resolve()):
            raise ValueError(f"start_from={recipe.start_from} lies in the run's own folder; give another name=")
        check_together(recipe, begin_with.config)
        start = Start(0, None, begin_with, begin_with.config, str(begin_with.folder))
    return start._replace(note=_move_aside(run_folder)) if moved_aside else start


@contextmanager
def sole_user(recipe: Recipe) -> Iterator[None]:
    """Hold the run's folder; ValueError when another process trains in it. A killed process holds nothing."""
    run_folder = recipe.run_folder
    run_folder.parent.mkdir(parents=True, exist_ok=True)
    with open(lock_of(run_folder), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is training in {run_folder}; wait for it, or give another name="
            ) from None
        yield


def _move_aside(run_folder: Path) -> str:
    aside = run_folder.with_name(f"{run_folder.name}-before-{datetime.now():%Y%m%d-%H%M%S}")
    os.rename(run_folder, aside)
    return f"the earlier run in {run_folder} is kept as {aside}"


def _first_difference(old: Any, new: Any, place: str = "") -> str | None:
    """Say "train.seed=0, the recipe says 1" for the first value in which two settings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        differences = (_first_difference(old.get(k), new.get(k), f"{place}.{k}".lstrip(".")) for k in keys)
        return next((d for d in differences if d), None)
    return None if old == new else f"{place}={old}, the recipe says {new}"


def prepare_data(recipe: Recipe, start: Start, watch: Callable[[Record], None]) -> TokenDataset:
    """Make tokens of the recipe's text, in the run's folder, unless they are there.

    Raises ValueError for text that cannot be used, or that is not what the run to be resumed was trained on.

    `watch` is told, as {"kind": "waiting", "for": ...}, what takes time.
    """
    data, length, folder = recipe.data, recipe.train.sequence_length, recipe.run_folder / "data"
    watch({"kind": "waiting", "for": f"tokens of {data.source}"})
    prepare_tokens(data.source, start.tokenizer, data.vocab_size, data.max_bytes, data.validation_share, folder)
    dataset = TokenDataset(folder)
    if recipe.start_from is not None and dataset.vocab_size > (start.model.vocab_size or 0):
        told = f"its tokenizer has {dataset.vocab_size} tokens, its model {start.model.vocab_size}"
        raise ValueError(f"start_from={recipe.start_from}: {told}")
    dataset.batch(0, 1, length, recipe.train.seed)  # raises where there is not enough text
    next(dataset.validation_batches(1, length, 1))
    if start.resume_from and read_state(start.resume_from).settings.get("tokens") != dataset.meta.digest:
        raise ValueError(
            f"the files of data.source={data.source} changed since {start.resume_from} was written; "
            "--fresh starts over with them"
        )
    return dataset


def run_job(
    recipe: Recipe,
    start: Start,
    dataset: TokenDataset,
    watch: Callable[[Record], None],
    first_rank: FirstRank | None = None,
) -> Record:
    """Run a training job to its end and write its report; returns what `--json` prints.

    `watch` is given every record as it comes. `first_rank`: this process, where the environment has started the ranks.
    Raises JobFailed, a RuntimeError, for what could not be survived, and
    KeyboardInterrupt when it was told to end, once all is saved.
    """
    run_folder = recipe.run_folder
    model = start.model
    if recipe.start_from is None:
        model = model.model_copy(update={"vocab_size": dataset.vocab_size})
        check_split(model, recipe.parallel)
    opening: list[Record] = [
        {
            "kind": "start",
            "run": recipe.name,
            "start_from": recipe.start_from,
            "world_size": recipe.parallel.world_size,
            "parallel": recipe.parallel.model_dump(),
            "expert_names": model.moe.expert_names,
            "unigram_loss": dataset.meta.unigram_loss,
            "train_tokens": dataset.train_tokens,
            "parameters": model.num_params(),
            "active_parameters": model.num_active_params(),
            "steps": recipe.train.steps,
        }
    ]
    if start.resume_from:
        opening.append({"kind": "event", "what": "resumed", "step": start.step, "checkpoint": str(start.resume_from)})
    settings = recipe.settings() | {"tokens": dataset.meta.digest}
    if recipe.cluster.address is None and not is_built():
        watch({"kind": "waiting", "for": "a C++ compiler to build DeepSpeed's CPU operator (once, about a minute)"})
        prepare_build()
    there = recipe.model_copy(update={"run_dir": str(run_folder)})  # nodes have working folders of their own
    first = Epoch(0, there, model, settings, start.resume_from, start.begin_with, opening, frozenset())
    supervise(first, watch, first_rank)

    run = read_run(run_folder)
    result = {
        "run_dir": str(run_folder),
        "checkpoint": str(run_folder / "checkpoint"),
        "steps": len(run.steps),
        "losses": [record["loss"] for record in run.steps],
        "validation_loss": run.validations[-1]["loss"],
        "unigram_loss": dataset.meta.unigram_loss,
        "tokens_per_second": median(record["tokens_per_second"] for record in run.steps),
        "ffn_experts_per_token": fmean(record["ffn_experts_per_token"] for record in run.steps),
        "zero_computation_share": fmean(record["zero_computation_share"] for record in run.steps),
        "dispatch_bytes": sum(record["dispatch_bytes"] for record in run.steps),
        "dispatch_bytes_saved": sum(record["dispatch_bytes_saved"] for record in run.steps),
        "events": run.events,
    }
    (run_folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result | {"report": str(write_report(run_folder))}
