"""Checkpoints of a run: whole or not there, wherever a crash comes; read by any layout; the oldest make room."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from tiny import tiny_model

from expertmesh.parallel.groups import Groups
from expertmesh.parallel.optimizer import AdamState
from expertmesh.system.model import checkpoint
from expertmesh.system.model.attention_config import AttentionConfig
from expertmesh.system.model.checkpoint import CheckpointError, load_weights, read_config
from expertmesh.system.model.transformer import Transformer, shards
from expertmesh.system.model.weights import initialise, weights
from expertmesh.system.train import snapshot
from expertmesh.system.train.snapshot import (
    RunState,
    SaveFailed,
    Saver,
    checkpoints_of,
    clear_unfinished,
    last_whole,
    load_optimizer,
    read_state,
    set_aside,
)

CONFIG = tiny_model(
    vocab_size=16,
    layers=1,
    hidden_size=8,
    attention=AttentionConfig(heads=2, kv_heads=1, head_dim=4),
    moe={"ffn_experts": 2},
)


class Optimizer:
    """Stands in for a `TrainingOptimizer`: moments that are functions of the weights, and what was loaded."""

    def weight(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        return parameter.detach()

    def state(self, parameter: torch.nn.Parameter) -> AdamState:
        return AdamState(exp_avg=parameter.detach() * 2, exp_avg_sq=parameter.detach() ** 2)

    def load_state(self, states: Iterable[tuple[torch.nn.Parameter, AdamState]], steps: int) -> None:
        self.loaded, self.steps = dict(states), steps


@functools.cache
def model_of(rank: int = 0, size: int = 1, seed: int = 1) -> Transformer:
    model = Transformer(CONFIG, shards(CONFIG, rank, size))
    initialise(model, seed, 0.3)
    return model


def run_state(step: int) -> RunState:
    return RunState(step, {"model": CONFIG.model_dump(mode="json"), "seed": 0})


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    return folder


def save(run_dir: Path, state: RunState, model: Transformer, groups: Groups, tokenizer: Path, keep: int) -> Path:
    """The folder of a checkpoint that nothing else is done beside."""
    landed = list[Path]()
    with Saver(run_dir, groups, tokenizer, keep, lambda step, folder: landed.append(folder)) as saver:
        saver.save(state, model, Optimizer())  # type: ignore[arg-type]
        saver.wait()
    (folder,) = landed
    return folder


def save_one(run_dir: Path, step: int, tokenizer: Path, keep: int = 9, seed: int = 1) -> Path:
    return save(run_dir, run_state(step), model_of(seed=seed), Groups(), tokenizer, keep)


def check_whole(folder: Path) -> None:
    """Everything in `folder` can be read, and belongs together."""
    state, model, optimizer = read_state(folder), Transformer(read_config(folder)), Optimizer()
    assert state == run_state(state.step) and folder.resolve().name == f"step-{state.step:06d}"
    load_weights(model, folder)
    load_optimizer(folder, state, model, optimizer)  # type: ignore[arg-type]
    assert optimizer.steps == state.step
    for parameter in model.parameters():
        assert torch.equal(optimizer.loaded[parameter].exp_avg, parameter * 2)
        assert torch.equal(optimizer.loaded[parameter].exp_avg_sq, parameter**2)
    assert (folder / "tokenizer.json").read_text() == "{}"


LAYOUTS = [
    (1, 1, "one rank"),
    (2, 2, "expert parallel: each writes its experts"),
    (2, 1, "data parallel: the second rank writes nothing"),
    (4, 2, "both"),
]


@pytest.mark.parametrize("ranks, expert_size, reason", LAYOUTS, ids=[reason for *_, reason in LAYOUTS])
def test_any_layout_reads_what_any_wrote(tmp_path, tokenizer, monkeypatch, ranks, expert_size, reason):
    barrier, written = threading.Barrier(ranks), list[Path]()

    def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
        written.append(path)
        checkpoint.write_tensors(tensors, path)

    monkeypatch.setattr(snapshot, "_wait_for_all", lambda: barrier.wait(30))
    monkeypatch.setattr(snapshot, "write_tensors", write_tensors)

    def group(rank: int, size: int) -> Any:
        return SimpleNamespace(rank=lambda: rank, size=lambda: size) if size > 1 else None

    def write(rank: int) -> None:
        groups = Groups(
            rank=rank,
            data=group(rank, ranks),
            token=group(rank, ranks),
            expert=group(rank % expert_size, expert_size),
            expert_data=group(rank // expert_size, ranks // expert_size),
        )
        model = model_of(groups.expert_rank, groups.expert_size)
        save(tmp_path, run_state(2), model, groups, tokenizer, 1)

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    folder = tmp_path / "checkpoint"
    check_whole(folder)
    assert len(written) == len(set(written)) == 2 * expert_size, "weights and moments, each file by one rank"
    assert (
        len(list(folder.glob("model-*"))) == len(list(folder.glob("training/optimizer-*.safetensors"))) == expert_size
    )
    for rank, size in ((0, 1), (1, 2), (2, 3)):
        model, expected, optimizer = Transformer(CONFIG, shards(CONFIG, rank, size)), model_of(rank, size), Optimizer()
        load_weights(model, folder)
        load_optimizer(folder, run_state(2), model, optimizer)  # type: ignore[arg-type]
        for parameter, wanted in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(parameter, wanted)
            assert torch.equal(optimizer.loaded[parameter].exp_avg, wanted * 2)


class Crash(BaseException):
    """A kill: nobody handles it."""


def half_a_file(path: Path) -> None:
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{")


def half_a_folder(folder: Any, **_: Any) -> None:
    if files := sorted(Path(folder).rglob("*.safetensors")):
        files[0].unlink()


# Each operation of `save` on the disk: where it is looked up, its name, and what is there when it is cut short.
OPERATIONS: list[tuple[Any, str, Callable[..., None] | None]] = [
    (snapshot, "write_config", lambda folder, config: half_a_file(folder / "config.json")),
    (snapshot, "write_tensors", lambda tensors, path: half_a_file(path)),
    (snapshot, "write_index", lambda index, files: half_a_file(index)),
    (snapshot, "write_json", lambda content, path: half_a_file(path)),
    (snapshot, "flush", None),
    (os, "replace", None),
    (shutil, "copytree", None),
    (shutil, "rmtree", half_a_folder),
    (Path, "mkdir", None),
    (Path, "unlink", None),
    (Path, "symlink_to", None),
]


def crash_at(number: int, patch: pytest.MonkeyPatch) -> None:
    """Crash in operation `number`, counted from 0; later ones, if there are any, are made."""
    counter = itertools.count()

    def until_crash(real: Callable, half: Callable | None) -> Callable:
        def operate(*args: Any, **kwargs: Any) -> Any:
            if next(counter) == number:
                if half:
                    half(*args, **kwargs)
                raise Crash
            return real(*args, **kwargs)

        return operate

    for where, name, half in OPERATIONS:
        patch.setattr(where, name, until_crash(getattr(where, name), half))


SCENES = [
    ([], 2, 2, "first checkpoint"),
    ([2, 4], 6, 2, "one more, and the oldest goes"),
    ([2, 4], 4, 2, "the run went back to 2 and comes by 4 again"),
    ([2, 4, 6], 4, 1, "it went back and keeps but one"),
]


@pytest.mark.parametrize("before, step, keep, reason", SCENES, ids=[reason for *_, reason in SCENES])
def test_a_crash_at_any_point_leaves_whole_checkpoints(tmp_path, tokenizer, monkeypatch, before, step, keep, reason):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a kill of the process loses nothing that was written
    template = tmp_path / "template"
    template.mkdir()
    for earlier in before:
        save_one(template, earlier, tokenizer)
    for number in itertools.count():
        run_dir = tmp_path / f"crash-{number}"
        shutil.copytree(template, run_dir, symlinks=True)
        crashed = False
        with monkeypatch.context() as patch:
            crash_at(number, patch)
            try:
                save_one(run_dir, step, tokenizer, keep, seed=2)
            except Crash:
                crashed = True

        found = checkpoints_of(run_dir)
        for folder in found:
            check_whole(folder)
        steps = [read_state(folder).step for folder in found]
        assert set(before) - {step} <= set(steps) or (step in steps and len(steps) >= keep), f"crash {number}: lost one"
        if before:
            check_whole(run_dir / "checkpoint")
        if crashed:  # the run goes on as if nothing had been
            save_one(run_dir, step, tokenizer, keep, seed=2)
        assert (run_dir / "checkpoint").resolve() == (run_dir / "checkpoints" / f"step-{step:06d}").resolve()
        check_whole(run_dir / "checkpoint")
        model = Transformer(CONFIG)
        load_weights(model, run_dir / "checkpoint")
        assert torch.equal(model.lm_head.weight, model_of(seed=2).lm_head.weight), "the old one is still there"
        assert set((run_dir / "checkpoints").iterdir()) == set(checkpoints_of(run_dir)), "something was left behind"
        shutil.rmtree(run_dir)
        if not crashed:
            assert number > 20, "the operations of `save` are not where this test looks for them"
            return


KEPT = [
    ([2, 4, 6, 8], 2, [6, 8], "the newest two"),
    ([2, 4], 5, [2, 4], "fewer than there is room for"),
    ([999_998, 999_999, 1_000_000], 2, [999_999, 1_000_000], "the number counts, not its spelling"),
    ([2, 6, 4], 1, [4, 6], "back to 2, then 4: what was just written stays, and so does the later one"),
]


@pytest.mark.parametrize("written, keep, kept, reason", KEPT, ids=[reason for *_, reason in KEPT])
def test_keep(tmp_path, tokenizer, written, keep, kept, reason):
    for step in written:
        save(tmp_path, RunState(step, {}), model_of(), Groups(), tokenizer, keep)
    assert [int(folder.name.removeprefix("step-")) for folder in checkpoints_of(tmp_path)] == kept
    assert read_state(tmp_path / "checkpoint").step == written[-1]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {f"step-{step:06d}" for step in kept}


def test_unfinished_folders_are_not_checkpoints(tmp_path, tokenizer):
    save_one(tmp_path, 2, tokenizer)
    for name in ("step-000004.writing", "step-000001.deleting", "step-", "notes"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert [folder.name for folder in checkpoints_of(tmp_path)] == ["step-000002"]
    assert checkpoints_of(tmp_path / "nowhere") == []


def test_the_link_moves_with_the_run(tmp_path, tokenizer):
    save_one(tmp_path / "run", 2, tokenizer)
    (tmp_path / "run").rename(tmp_path / "moved")
    check_whole(tmp_path / "moved" / "checkpoint")


def change_state(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "training" / "state.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


def without(name: str) -> Callable[[dict], dict]:
    return lambda content: {key: value for key, value in content.items() if key != name}


def halve(pattern: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (path,) = folder.glob(pattern)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def test_copies_of_experts_are_read_back_and_older_checkpoints_have_none(tmp_path, tokenizer):
    state = RunState(2, {}, copied={"1": [3, 0]})
    folder = save(tmp_path, state, model_of(), Groups(), tokenizer, keep=1)
    assert read_state(folder) == state
    change_state(without("copied"))(folder)
    assert read_state(folder) == RunState(2, {})


DAMAGES: list[tuple[Callable[[Path], None], str, str]] = [
    (change_state(without("step")), "state.json: no key 'step'", "no step"),
    (change_state(without("settings")), "state.json: no key 'settings'", "no settings"),
    (change_state(lambda content: [content]), "state.json: not a JSON object", "a list"),
    (halve("training/state.json"), "state.json: not valid JSON", "half the state"),
    (lambda folder: (folder / "training/state.json").unlink(), "no state.json", "no state"),
    (halve("training/optimizer-*.safetensors"), "optimizer-00001-of-00001.safetensors: truncated", "half the moments"),
    (lambda folder: shutil.rmtree(folder / "training"), "no optimizer.safetensors.index.json", "weights alone"),
    (halve("model-*.safetensors"), "model-00001-of-00001.safetensors: truncated", "half the weights"),
]


@pytest.mark.parametrize("damage, words, reason", DAMAGES, ids=[reason for *_, reason in DAMAGES])
def test_damage_is_told_in_one_line_before_anything_is_loaded(tmp_path, tokenizer, damage, words, reason):
    folder = save_one(tmp_path, 2, tokenizer)
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        read_state(folder)
    message = str(error.value)
    assert words in message and str(folder) in message and "\n" not in message


def test_moments_of_another_shape_are_refused(tmp_path, tokenizer):
    folder = save_one(tmp_path, 2, tokenizer)
    wider = Transformer(CONFIG.model_copy(update={"vocab_size": 17}))
    with pytest.raises(CheckpointError, match=r"exp_avg/embed_tokens.weight has shape \[16, 8\]"):
        load_optimizer(folder, run_state(2), wider, Optimizer())  # type: ignore[arg-type]


def test_a_key_of_a_later_version_does_not_matter(tmp_path, tokenizer):
    folder = save_one(tmp_path, 2, tokenizer)
    change_state(lambda content: content | {"written_by": "a later version"})(folder)
    assert read_state(folder) == run_state(2)


def test_every_weight_has_its_moments(tmp_path, tokenizer):
    folder = save_one(tmp_path, 2, tokenizer)
    index = json.loads((folder / "training" / snapshot.OPTIMIZER_INDEX).read_text())["weight_map"]
    names = [name for weight in weights(model_of()) for name in weight.split(weight.parameter)]
    assert index.keys() == {f"{kind}/{name}" for kind in AdamState._fields for name in names}


def spoil(folder: Path) -> None:
    """One bit of a weight, which no reader of the file notices."""
    path = next(folder.glob("model-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_that_changed_on_the_disk_is_passed_over(tmp_path, tokenizer):
    folders = [save_one(tmp_path, step, tokenizer) for step in (2, 4, 6)]
    assert last_whole(tmp_path) == (folders[2], {})
    for folder in folders[1:]:
        spoil(folder)
        check_whole_but_for_sums(folder)
    whole, damaged = last_whole(tmp_path)
    assert whole == folders[0] and list(damaged) == folders[:0:-1]
    assert all("its checksum differs" in told for told in damaged.values())
    set_aside(tmp_path, damaged, folders[0])
    assert checkpoints_of(tmp_path) == [folders[0]] and (tmp_path / "checkpoint").resolve() == folders[0].resolve()
    save_one(tmp_path, 4, tokenizer)
    check_whole(tmp_path / "checkpoint")
    assert {p.name for p in (tmp_path / "checkpoints").glob("damaged-*")} == {
        "damaged-step-000004",
        "damaged-step-000006",
    }
    for folder in checkpoints_of(tmp_path):
        spoil(folder)
    whole, damaged = last_whole(tmp_path)
    assert whole is None and len(damaged) == 2


def check_whole_but_for_sums(folder: Path) -> None:
    read_state(folder)
    load_weights(Transformer(read_config(folder)), folder)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")
# What safetensors raises, seen with a limit on the size of files.
FULL_FOR_TENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "full, error",
    [("write_tensors", FULL_FOR_TENSORS), ("write_json", FULL), ("write_checksums", FULL), ("write_config", FULL)],
)
def test_a_full_disk_while_saving_is_one_line_and_the_old_checkpoints_stay(
    tmp_path, tokenizer, monkeypatch, full, error
):
    def refuse(*args: Any) -> None:
        raise error

    old = save_one(tmp_path, 2, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, full, refuse)
        with pytest.raises(SaveFailed, match="step 4 could not be saved: .*No space left on device") as raised:
            save_one(tmp_path, 4, tokenizer)
    assert "\n" not in str(raised.value)
    assert checkpoints_of(tmp_path) == [old]
    check_whole(tmp_path / "checkpoint")
    clear_unfinished(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


class Held:
    """Files of tensors that appear when they are let go, in place of `write_tensors`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.let_go, self.addresses = threading.Event(), list[set[int]]()
        monkeypatch.setattr(snapshot, "write_tensors", self._write)

    def _write(self, tensors: dict[str, torch.Tensor], path: Path) -> None:
        assert self.let_go.wait(30)
        self.addresses.append({tensor.data_ptr() for tensor in tensors.values()})
        checkpoint.write_tensors(tensors, path)


@pytest.fixture
def held(monkeypatch) -> Held:
    return Held(monkeypatch)


@pytest.fixture
def saver(tmp_path, tokenizer, held) -> Iterator[Saver]:
    with Saver(tmp_path / "run", Groups(), tokenizer, 9, lambda step, folder: check_whole(folder)) as saver:
        yield saver
        held.let_go.set()


def begin(saver: Saver, step: int, model: Transformer) -> None:
    saver.save(run_state(step), model, Optimizer())  # type: ignore[arg-type]


def test_training_goes_on_while_files_are_written_and_they_hold_what_was(tmp_path, saver, held):
    model = Transformer(CONFIG)
    load_weights_of(model_of(), model)
    begin(saver, 2, model)
    load_weights_of(model_of(seed=2), model)
    assert saver.busy()
    saver.agree(1)
    assert checkpoints_of(tmp_path / "run") == []
    held.let_go.set()
    saver.wait()
    assert not saver.busy()
    found = Transformer(CONFIG)
    load_weights(found, tmp_path / "run" / "checkpoint")
    for parameter, wanted in zip(found.parameters(), model_of().parameters(), strict=True):
        assert torch.equal(parameter, wanted), "it was changed while it was written"


@torch.no_grad()
def load_weights_of(source: Transformer, target: Transformer) -> None:
    for parameter, wanted in zip(target.parameters(), source.parameters(), strict=True):
        parameter.copy_(wanted)


def test_it_lands_when_all_ranks_have_written_and_not_before(tmp_path, saver, held):
    held.let_go.set()
    begin(saver, 2, model_of())
    for others_busy in (1, 1, 0):
        wait_while(saver.busy)
        assert checkpoints_of(tmp_path / "run") == []
        saver.agree(others_busy)
    wait_while(saver.busy)
    assert len(checkpoints_of(tmp_path / "run")) == 1


def wait_while(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_next_waits_for_the_one_before_and_goes_through_the_same_memory(tmp_path, saver, held):
    begin(saver, 2, model_of())
    threading.Timer(0.1, held.let_go.set).start()
    begin(saver, 4, model_of(seed=2))
    assert [folder.name for folder in checkpoints_of(tmp_path / "run")] == ["step-000002"]
    saver.wait()
    assert len(checkpoints_of(tmp_path / "run")) == 2
    assert held.addresses[:2] == held.addresses[2:], "memory of weights and of moments"


ASKS: list[tuple[str, Callable[[Saver], Any]]] = [
    ("the next step", lambda saver: wait_while(saver.busy)),
    ("the next save", lambda saver: begin(saver, 4, model_of())),
    ("the end", lambda saver: saver.wait()),
]


@pytest.mark.parametrize("ask", [ask for _, ask in ASKS], ids=[reason for reason, _ in ASKS])
def test_a_failure_to_write_is_told_the_next_time_that_anything_is_asked(tmp_path, tokenizer, monkeypatch, ask):
    def refuse(*args: Any) -> None:
        raise FULL_FOR_TENSORS

    monkeypatch.setattr(snapshot, "write_tensors", refuse)
    with Saver(tmp_path / "run", Groups(), tokenizer, 9, lambda *landed: pytest.fail(str(landed))) as saver:
        begin(saver, 2, model_of())
        with pytest.raises(SaveFailed, match="step 2 could not be saved: .*No space left on device"):
            ask(saver)


def test_where_training_fails_the_thread_ends_and_what_was_not_agreed_stays_unfinished(tmp_path, tokenizer, held):
    threads = set(threading.enumerate())
    with (
        pytest.raises(RuntimeError, match="a peer is lost"),
        Saver(tmp_path / "run", Groups(), tokenizer, 9, lambda *landed: pytest.fail(str(landed))) as saver,
    ):
        begin(saver, 2, model_of())
        held.let_go.set()
        raise RuntimeError("a peer is lost")
    assert set(threading.enumerate()) == threads
    assert checkpoints_of(tmp_path / "run") == []
