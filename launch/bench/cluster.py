"""`expertmesh bench cluster`: what a lost worker costs, a cold start, checkpoints, and a slow link.

    recovery     a job of two workers on a Ray of its own, one of which is killed: with a spare, and without
    checkpoint   one process writes and reads a state as we do, and as torch.distributed.checkpoint does; and reads the
                 part that one of two expert-parallel ranks goes on with
    saving       steps with a save after each, beside steps without
    first step   from `submit`, or `train`, to the first step (first_step.py)
    network      exchanges of expert rows between emulated nodes (slow_link.py), where the machine can

The job is killed from outside, by the process that its log leads to, once a step is seen; times are of this process's
clock, and of what it is told while it supervises the job. Rounds visit what is compared in turn; medians are given.

    killed ── noticed: the job knows ── re-formed: all have left, the next epoch is begun ── first step made
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from expertmesh.launch.bench.first_step import bench_first_step
from expertmesh.launch.bench.network import NoNetwork
from expertmesh.launch.bench.slow_link import SlowLinkCase, bench_slow_link
from expertmesh.launch.bench.timing import speed
from expertmesh.launch.event_log import STATUS
from expertmesh.launch.recipe import Recipe

Row = dict[str, Any]
Say = Callable[[str], None]
WORKERS, SAVE_EVERY = 2, 5
KILL_AT = 8  # the first step that may be seen before the kill: one checkpoint is written, and one will be
JOB_STEPS = 5000  # more than any job here comes to: it is left once it has made a step again
OURS, TORCH = "expertmesh", "torch DCP"


@dataclass(frozen=True)
class ClusterCase:
    """The size of one run."""

    rounds: int = 5
    steps: int = 30  # of saving
    layers: int = 2
    hidden_size: int = 64
    ffn_size: int = 128
    experts: int = 8

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("steps", 3), ("layers", 1), ("ffn_size", 1), ("experts", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: it must be {least} or more")
        if self.hidden_size < 16 or self.hidden_size % 16:
            raise ValueError(f"hidden_size={self.hidden_size}: it must be a multiple of 16, the width of a head")
        if self.experts % WORKERS:
            raise ValueError(f"experts={self.experts}: {WORKERS} workers share them; take a multiple of {WORKERS}")

    def recipe(self, folder: Path, workers: int, steps: int, spares: int = 0, **train: Any) -> Recipe:
        heads = self.hidden_size // 16
        attention = {"heads": heads, "kv_heads": heads, "head_dim": 16}
        moe = {"ffn_experts": self.experts, "expert": {"hidden_size": self.ffn_size}}
        content: dict[str, Any] = {
            "name": folder.name,
            "run_dir": str(folder),
            "model": {
                "layers": self.layers,
                "hidden_size": self.hidden_size,
                "context_length": 64,
                "attention": attention,
                "moe": moe,
            },
            "parallel": {"dp": workers, "ep": workers},
            "data": {"max_bytes": 300_000, "vocab_size": 512},
            "train": {"steps": steps, "sequence_length": 64, "validate_every": steps} | train,
            "fault": {"spares": spares},
        }
        return Recipe(**content)


def bench_cluster(case: ClusterCase, say: Say) -> Iterator[list[Row]]:
    """The rows of one table after another. Every row has `table`, `what` and `rounds`.

    recovery      `noticed_seconds, reformed_seconds, step_seconds`, all from the kill, and `lost_steps`: made twice
    checkpoint    `bytes` on disk, `write_seconds, read_seconds, part_seconds`, and speeds beside ours, `write_ratio`...
    saving        `seconds` of a step, and `ratio`: its speed beside a step without saving
    first step    `seconds` until then
    network       see `bench_slow_link`; no table where nodes cannot be emulated, which is said

    Raises:
        RuntimeError: if a job ends before a worker of it could be killed, or fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        say("making tokens")
        tokens = _prepare(case.recipe(folder / "tokens", 1, 1))
        yield _recovery(case, tokens, folder, say)
        alone = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        with alone:  # a process of its own, for it is a rank, and this one supervises
            alone.submit(_become_a_rank, folder).result()
            say(f"checkpoint: {case.rounds} rounds of {OURS} and {TORCH}")
            yield alone.submit(_checkpoint, case, tokens, folder).result()
            say(f"saving: {case.rounds} rounds of {case.steps} steps, with a save after each and without")
            yield alone.submit(_saving, case, tokens, folder).result()
        yield bench_first_step(lambda run: case.recipe(run, WORKERS, 1), tokens, folder, case.rounds, say)
        try:
            network = bench_slow_link(SlowLinkCase(case.rounds), say)
        except NoNetwork as error:
            say(f"network: {error}")
        else:
            yield network


def _prepare(recipe: Recipe) -> Path:
    from expertmesh.launch.train_job import find_start, prepare_data

    prepare_data(recipe, find_start(recipe, fresh=True), lambda record: None)
    return recipe.run_folder / "data"


# recovery


class _Enough(Exception):
    """All is seen; a job need not go on."""


@dataclass
class _Drill:
    """Watches a job: kills its last worker, and notes what comes of it and when. Times: seconds of one clock."""

    run_folder: Path
    spares: int
    killed: float | None = None
    step: int = 0  # the last that was seen
    formed_twice: bool = False  # told when it was decided, and again by the log of the epoch that came of it
    seconds: dict[str, float] = field(default_factory=dict)  # from the kill
    back_at: int = 0  # the step of the checkpoint that the job went back to

    @property
    def lost_steps(self) -> int:
        return self.step - self.back_at

    def watch(self, record: dict[str, Any]) -> None:
        is_step = record["kind"] == "step"
        if self.killed is None:
            self.step = record["step"] if is_step else self.step
            if is_step and self.step >= KILL_AT and self._spares_are_ready():
                os.kill(_process_that_writes(self.run_folder / "logs" / f"trainer-{WORKERS - 1}.log"), signal.SIGKILL)
                self.killed = time.monotonic()
            return
        since, what = time.monotonic() - self.killed, record.get("what")
        if what == "failed" or record["kind"] == "waiting":  # for its peers to leave
            self.seconds.setdefault("noticed", since)
        elif what == "re-formed" and "re-formed" not in self.seconds:
            self.seconds["re-formed"], self.back_at = since, record["step"]
        elif what == "re-formed":
            self.formed_twice = True
        elif is_step and self.formed_twice:
            self.seconds["step"] = since
            raise _Enough
        elif is_step:
            self.step = record["step"]

    def _spares_are_ready(self) -> bool:
        ready: int = json.loads((self.run_folder / STATUS).read_text())["spares"]["ready"]
        return ready == self.spares


def _process_that_writes(log: Path) -> int:
    """The process whose standard output is `log`."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.readlink(entry / "fd" / "1") == str(log):
                    return int(entry.name)
            except OSError:  # another user's, or it has just ended
                continue
    raise RuntimeError(f"no process writes {log}")


def _recovery(case: ClusterCase, tokens: Path, folder: Path, say: Say) -> list[Row]:
    kinds = {"with a spare": 1, "without": 0}
    drills: dict[str, list[_Drill]] = {what: [] for what in kinds}
    for number in range(case.rounds):
        for what in sorted(kinds, reverse=number % 2 == 1):
            say(f"recovery: round {number + 1} of {case.rounds}, {what}")
            drills[what].append(_drilled(case, tokens, folder / f"job-{number}-{kinds[what]}", kinds[what]))

    def middle(what: str, key: str) -> float:
        return median(drill.seconds[key] for drill in drills[what])

    return [
        {
            "table": "recovery",
            "what": what,
            "noticed_seconds": middle(what, "noticed"),
            "reformed_seconds": middle(what, "re-formed"),
            "step_seconds": middle(what, "step"),
            "lost_steps": median(drill.lost_steps for drill in drills[what]),
            "rounds": case.rounds,
        }
        for what in kinds
    ]


def _drilled(case: ClusterCase, tokens: Path, run_folder: Path, spares: int) -> _Drill:
    """A job of which a worker was killed, until it has made a step again."""
    from expertmesh.launch.train_job import find_start, prepare_data, run_job

    recipe = case.recipe(run_folder, WORKERS, JOB_STEPS, spares, checkpoint_every=SAVE_EVERY)
    shutil.copytree(tokens, run_folder / "data")
    start, drill = find_start(recipe, fresh=True), _Drill(run_folder, spares)
    try:
        run_job(recipe, start, prepare_data(recipe, start, lambda record: None), drill.watch)
    except _Enough:
        return drill
    raise RuntimeError("the job ended before a worker of it was killed and replaced")


# one rank


def _become_a_rank(folder: Path) -> None:
    """Of a world of one, whose `Groups()` are all None; what its libraries print goes to a file."""
    import torch.distributed as dist

    from expertmesh.launch.roles import log_to
    from expertmesh.parallel.groups import build_groups
    from expertmesh.parallel.sizes import ParallelSizes

    log_to(folder / "rank.log")
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    build_groups(ParallelSizes())


def _trainer(case: ClusterCase, tokens: Path, run_folder: Path, steps: int, **train: Any) -> Any:
    from expertmesh.kernels.device import Device
    from expertmesh.parallel.groups import Groups
    from expertmesh.system.train.dataset import TokenDataset
    from expertmesh.system.train.trainer import Trainer

    recipe = case.recipe(run_folder, 1, steps, **train)
    shutil.copytree(tokens, run_folder / "data")
    model = recipe.model.model_copy(update={"vocab_size": TokenDataset(tokens).vocab_size})
    return Trainer(model, recipe.train, run_folder, Groups(), Device("cpu", "gloo"), recipe.settings(), None)


def _checkpoint(case: ClusterCase, tokens: Path, folder: Path) -> list[Row]:
    """Weights and moments after a step. Ours is read with its checksums, as a job that goes on reads it."""
    import torch
    import torch.distributed.checkpoint as dcp

    from expertmesh.system.model.checkpoint import load_weights
    from expertmesh.system.model.transformer import Transformer, shards
    from expertmesh.system.model.weights import weights
    from expertmesh.system.train.snapshot import RunState, Saver, last_whole, load_optimizer

    run_folder, theirs = folder / "checkpoint", folder / "dcp"
    trainer = _trainer(case, tokens, run_folder, 1)
    trainer.run(lambda record: None)
    state: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for weight in weights(trainer.model):
        for name, tensor in weight.split(weight.parameter.detach()).items():
            state["weights"][name] = tensor
        for kind, moment in trainer.zero.state(weight.parameter)._asdict().items():
            state[kind].update(weight.split(moment))
    config = trainer.model.config
    part = Transformer(config, shards(config, 0, 2))
    held = {name for weight in weights(part) for name in weight.split(weight.parameter)}
    state_of_part = {kind: {name: state[kind][name] for name in held} for kind in state}
    step = 1
    with Saver(run_folder, trainer.groups, run_folder / "data" / "tokenizer", 1, lambda *_: None) as saver:

        def write() -> None:
            saver.save(RunState(step, trainer.state.settings), trainer.model, trainer.zero)
            saver.wait()

        def read(model: Transformer, zero: Any) -> None:
            whole, _ = last_whole(run_folder)
            assert whole is not None
            load_weights(model, whole)
            load_optimizer(whole, trainer.state, model, zero)

        calls: dict[str, tuple[Callable[[], Any], ...]] = {
            OURS: (write, lambda: read(trainer.model, trainer.zero), lambda: read(part, _MomentsRead())),
            TORCH: (
                lambda: dcp.save(state, checkpoint_id=theirs),
                lambda: dcp.load(state, checkpoint_id=theirs),
                lambda: dcp.load(state_of_part, checkpoint_id=theirs),
            ),
        }
        seconds = {what: [list[float]() for _ in each] for what, each in calls.items()}
        for step in range(1, case.rounds + 2):
            for what in sorted(calls, reverse=step % 2 == 0):
                taken = [_seconds(call) for call in calls[what]]
                if step > 1:  # the first warms up
                    for kept, one in zip(seconds[what], taken, strict=True):
                        kept.append(one)
    return [
        {
            "table": "checkpoint",
            "what": what,
            "bytes": sum(path.stat().st_size for path in where.rglob("*") if path.is_file()),
            "rounds": case.rounds,
        }
        | {
            key: figure
            for done, mine, ours in zip(("write", "read", "part"), seconds[what], seconds[OURS], strict=True)
            for key, figure in ((f"{done}_seconds", median(mine)), (f"{done}_ratio", speed(mine, ours)))
        }
        for what, where in ((OURS, run_folder / "checkpoint"), (TORCH, theirs))
    ]


class _MomentsRead:
    """Takes what `load_optimizer` reads for an optimizer that is not there."""

    def load_state(self, states: Iterable[Any], steps: int) -> None:
        deque(states, maxlen=0)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _saving(case: ClusterCase, tokens: Path, folder: Path) -> list[Row]:
    """Steps as they follow one another, but the last, which is validated and saved in any case."""
    every = {"no saves": case.steps, "a save after each step": 1}
    seconds: dict[str, list[float]] = {what: [] for what in every}
    for number in range(case.rounds + 1):
        for what in sorted(every, reverse=number % 2 == 1):
            run_folder = folder / f"saving-{number}-{every[what]}"
            trainer = _trainer(case, tokens, run_folder, case.steps, checkpoint_every=every[what])
            ends: list[float] = []
            trainer.run(
                lambda record, ends=ends: ends.append(time.perf_counter()) if record["kind"] == "step" else None
            )
            shutil.rmtree(run_folder)
            if number:  # the first warms up
                seconds[what].append((ends[-2] - ends[0]) / (len(ends) - 2))
    return [
        {
            "table": "saving",
            "what": what,
            "seconds": median(seconds[what]),
            "ratio": speed(seconds[what], seconds["no saves"]),
            "rounds": case.rounds,
        }
        for what in every
    ]
