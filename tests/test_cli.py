"""The whole product as a user meets it: train on an embedded Ray, kill and resume, generate joined and split, serve."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from commands import TINY_RECIPE, environment, expertmesh, expertmesh_json, start_expertmesh
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from expertmesh.launch.event_log import read_events
from expertmesh.launch.run_folder import ask_to_scale, await_scale
from expertmesh.launch.status import status_of
from expertmesh.system.train.snapshot import read_state

RESULT_KEYS = {
    "run_dir",
    "checkpoint",
    "steps",
    "losses",
    "validation_loss",
    "unigram_loss",
    "tokens_per_second",
    "ffn_experts_per_token",
    "zero_computation_share",
    "dispatch_bytes",
    "dispatch_bytes_saved",
    "events",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "tiny.yaml").write_text(TINY_RECIPE)
    (folder / "short.txt").write_text("too short to train on\n" * 20)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Any]:
    return expertmesh_json("train", "tiny.yaml", folder=folder)


def processes() -> dict[int, tuple[int, str]]:
    """(parent, command line) of every living process by id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            except OSError:  # it has just ended
                continue
            if state != "Z":
                found[int(entry.name)] = (int(parent), command)
    return found


def descendants(ancestor: int) -> dict[int, str]:
    """Command lines of the processes that `ancestor` started, directly or not."""
    alive, family, grown = processes(), {ancestor}, True
    while grown:
        born = {pid for pid, (parent, _) in alive.items() if parent in family} - family
        grown = bool(born)
        family |= born
    return {pid: alive[pid][1] for pid in family - {ancestor}}


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_help_answers_without_the_heavy_libraries():
    program = (
        "import sys, expertmesh.launch.cli as cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'triton', 'pydantic', 'yaml', 'fastapi', 'tokenizers'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert "LOADED []" in done.stdout
    assert "train" in done.stdout


def test_training_leaves_what_it_says(folder, trained):
    assert set(trained) >= RESULT_KEYS
    run_dir, checkpoint = Path(trained["run_dir"]), Path(trained["checkpoint"])
    assert run_dir == folder / "runs" / "tiny"
    assert trained["steps"] == len(trained["losses"]) == 30
    assert trained["losses"][-1] < trained["losses"][0]
    assert 0 < trained["zero_computation_share"] < 1
    assert trained["ffn_experts_per_token"] == pytest.approx(2 * (1 - trained["zero_computation_share"]))
    assert trained["dispatch_bytes"] > 0 and trained["dispatch_bytes_saved"] > 0
    weight_map = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    assert {weight_map[f"layers.0.mlp.experts.{e}.down_proj.weight"] for e in (0, 3)} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert (checkpoint / "tokenizer.json").is_file() and (checkpoint / "training" / "state.json").is_file()
    assert "<svg" in (run_dir / "report.html").read_text()
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 31))


def test_killed_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(folder, trained):
    run_dir = folder / "runs" / "killed"

    def checkpoint_written(step: int) -> Callable[[], bool]:
        return lambda: (run_dir / "checkpoints" / f"step-{step:06d}").is_dir()

    # First a worker dies, and no failure is to be survived: the command says which, and leaves nothing running.
    command = start_expertmesh("train", "tiny.yaml", "name=killed", "fault.budget=0", folder=folder)
    wait_until(checkpoint_written(5), "no checkpoint")
    (rank_0, rank_1) = sorted(pid for pid, line in descendants(command.pid).items() if "ray::TrainerRole" in line)
    family = set(descendants(command.pid))
    os.kill(rank_1, signal.SIGKILL)
    _, errors = command.communicate(timeout=60)
    assert command.returncode == 1
    told = errors.strip().splitlines()[-1]
    assert told.startswith("expertmesh: trainer ") and "died" in told and "goes on from the last checkpoint" in told
    wait_until(lambda: not family & set(processes()), "workers outlive the command", 30)

    # Then the command itself dies, without a chance to put anything away.
    command = start_expertmesh("train", "tiny.yaml", "name=killed", folder=folder)
    wait_until(checkpoint_written(15), "no second checkpoint")
    family = {pid for pid, line in descendants(command.pid).items() if "ray::TrainerRole" in line}
    command.kill()
    command.communicate()
    wait_until(lambda: not family & set(processes()), "workers outlive the killed command", 30)

    # However far its workers came, the same command ends where the run that was never disturbed did.
    assert_same_run(expertmesh_json("train", "tiny.yaml", "name=killed", folder=folder), trained)


def assert_same_run(run: dict[str, Any], other: dict[str, Any]) -> None:
    """Losses, and a file of weights, bit for bit."""
    assert run["losses"] == other["losses"]
    assert run["validation_loss"] == other["validation_loss"]
    mine, theirs = (Path(each["checkpoint"]) / "model-00002-of-00002.safetensors" for each in (run, other))
    assert mine.read_bytes() == theirs.read_bytes()


def test_plain_processes_train_the_same(folder, trained):
    assert_same_run(
        expertmesh_json("train", "tiny.yaml", "name=plain", "cluster.launcher=processes", folder=folder), trained
    )


def test_a_worker_that_dies_and_one_that_hangs_change_not_a_bit(folder, trained):
    """The job goes on by itself."""
    run_dir = folder / "runs" / "drilled"
    drills = ("chaos.kill=trainer:1@step=17", "chaos.stop=trainer:0@step=29", "fault.stall_s=8")
    resumed = expertmesh_json("train", "tiny.yaml", "name=drilled", *drills, folder=folder)
    assert [event["what"] for event in resumed["events"]].count("re-formed") == 2
    failed = [event["why"] for event in read_events(run_dir) if event["what"] == "failed"][-2:]
    assert failed[0].startswith("trainer 1 died") and failed[1].startswith("trainer 0 hangs: no heartbeat")
    (hang,) = [event["why"] for event in read_events(run_dir) if event["what"] == "hangs"]
    assert re.fullmatch(r"rank 0 silent, last heard of in step .*; rank 1 waited in step 29, in layer 0 counts", hang)
    assert "most recent call first" in (run_dir / "logs" / "trainer-1.log").read_text(), "no stacks of a hanging job"
    assert_same_run(resumed, trained)


def test_a_spare_goes_on_for_a_worker_that_dies_bit_for_bit(folder, trained):
    run_dir = folder / "runs" / "spared"
    resumed = expertmesh_json(
        "train", "tiny.yaml", "name=spared", "fault.spares=1", "chaos.kill=trainer:1@step=17", folder=folder
    )
    (formed,) = [event for event in resumed["events"] if event["what"] == "re-formed"]
    assert formed["kept"] == [0] and formed["spares"] == [1]
    assert set(status_of(run_dir)["spares"]) == {"ready", "starting", "lost"}
    assert_same_run(resumed, trained)


def test_a_job_shrinks_to_the_workers_that_are_left(folder, trained):
    """Of another size, sums are made in another order: losses differ by rounding, growing with the steps."""
    drill = ("fault.policy=shrink", "chaos.kill=trainer:1@step=17", "train.checkpoint_every=10")
    shrunk = expertmesh_json("train", "tiny.yaml", "name=shrunk", *drill, folder=folder)
    (formed,) = [event for event in shrunk["events"] if event["what"] == "re-formed"]
    assert (formed["parallel"]["dp"], formed["parallel"]["ep"], formed["kept"]) == (1, 1, [])
    assert formed["step"] in (0, 10) and shrunk["steps"] == 30
    assert shrunk["losses"] == pytest.approx(trained["losses"], rel=1e-4)
    assert shrunk["losses"][: formed["step"]] == trained["losses"][: formed["step"]]
    assert shrunk["validation_loss"] == pytest.approx(trained["validation_loss"], rel=1e-4)


def test_a_running_job_grows_and_saves_when_it_is_told_to_end(folder, trained):
    """Of another size, sums are made in another order: losses differ by rounding, growing with the steps."""
    run_dir = folder / "runs" / "scaled"
    command = start_expertmesh("train", "tiny.yaml", "name=scaled", "train.checkpoint_every=100", folder=folder)
    wait_until(lambda: (run_dir / "status.json").is_file(), "no status")
    ask_to_scale(run_dir, 4)  # the verb does this and waits; 30 steps would be over before it has started
    grown = await_scale(run_dir, 0)
    assert grown["parallel"]["ep"] == grown["parallel"]["dp"] == 4 and grown["kept"] == []
    wait_until(lambda: status_of(run_dir)["step"] > grown["step"], "no step of the larger job")
    command.terminate()
    found = status_of(run_dir)
    assert found["state"] == "running" and len(found["workers"]) == 4 and found["epoch"] == 1
    _, errors = command.communicate(timeout=60)
    assert command.returncode == 130, errors
    assert expertmesh_json("status", "scaled", folder=folder)["state"] == "interrupted"
    saved = read_state(run_dir / "checkpoint").step
    assert grown["step"] < saved < 30, "it was to save where no checkpoint was due"
    resumed = expertmesh_json("train", "tiny.yaml", "name=scaled", folder=folder)
    assert resumed["losses"] == pytest.approx(trained["losses"], rel=1e-4)
    assert resumed["losses"][: grown["step"]] == trained["losses"][: grown["step"]]


def test_a_finished_run_is_kept_aside_when_the_same_is_trained_again(folder, trained):
    copy = folder / "runs" / "again"
    shutil.copytree(trained["run_dir"], copy, symlinks=True)
    done = expertmesh("train", "tiny.yaml", "name=again", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "is kept as" in done.stdout
    (aside,) = (folder / "runs").glob("again-before-*")
    assert (aside / "checkpoint" / "config.json").is_file()
    assert (copy / "checkpoint" / "config.json").is_file()


@pytest.fixture(scope="module")
def joined(folder: Path, trained: dict[str, Any]) -> dict[str, Any]:
    return expertmesh_json(*GREEDY, folder=folder)


GREEDY = ("generate", "runs/tiny", "--prompt", "The import statement", "--max-tokens", "40", "--temperature", "0")


def test_generate_answers_joined(joined):
    assert set(joined) >= {"text", "token_ids", "prompt_token_ids", "finish_reason", "pools"}
    assert len(joined["token_ids"]) == 40 and joined["finish_reason"] == "length"


@pytest.mark.parametrize("pools", [("1", "2", "1"), ("2", "1", "3")], ids=["1:2", "2:1 in three micro-batches"])
def test_generate_split_says_the_same(folder, joined, pools):
    attention, ffn, micro_batches = pools
    sizes = ("--attention", attention, "--ffn", ffn, "--micro-batches", micro_batches)
    trace = folder / f"trace-{attention}-{ffn}.json"
    split = expertmesh_json(*GREEDY, "serve.page_size=8", *sizes, "--trace", trace, folder=folder)
    events = json.loads(trace.read_text())["traceEvents"]
    tracks = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {"attention 0", *(f"ffn {f}" for f in range(int(ffn)))} <= tracks
    assert {name for name in split["stages"] if name.startswith("ffn")} == {f"ffn {f}" for f in range(int(ffn))}
    assert all(0 <= stage.get("bubble", 0) <= 1 for stage in split["stages"].values())
    assert split["pools"] == {"attention": int(attention), "ffn": int(ffn)}
    assert (split["token_ids"], split["text"]) == (joined["token_ids"], joined["text"])


@pytest.mark.parametrize("pools", [[], ["--attention", "1", "--ffn", "1"]], ids=["joined", "split 1:1"])
def test_the_openai_client_is_answered(folder, joined, pools):
    server = start_expertmesh("serve", "runs/tiny", "--port", "0", "--json", *pools, folder=folder)
    try:
        ready = json.loads(server.stdout.readline())
        client = openai.OpenAI(base_url=ready["base_url"], api_key="none", max_retries=0, timeout=60)
        (model,) = client.models.list()
        assert model.id == ready["model"] == "tiny"
        ask = {"model": "tiny", "prompt": "The import statement", "max_tokens": 40, "temperature": 0}
        assert client.completions.create(**ask).choices[0].text == joined["text"]
        chunks = list(client.completions.create(**ask, stream=True))
        assert "".join(c.choices[0].text for c in chunks) == joined["text"]
        messages = [{"role": "user", "content": "What does import do?"}]
        chat = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0}
        whole = client.chat.completions.create(**chat).choices[0].message.content
        deltas = client.chat.completions.create(**chat, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in deltas) == whole
    finally:
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=60)
    assert server.returncode in (0, 130), errors


def damaged(trained: dict[str, Any], folder: Path) -> Path:
    """A copy of the trained checkpoint whose second weight file is cut short."""
    copy = folder / "damaged"
    if not copy.exists():
        shutil.copytree(Path(trained["checkpoint"]).resolve(), copy)
        weights = copy / "model-00002-of-00002.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    return copy


WRONG = [
    ("an unknown key", ["train", "tiny.yaml", "train.step=3"], "did you mean steps?"),
    ("experts not divisible", ["train", "tiny.yaml", "model.moe.ffn_experts=5"], "parallel.ep=2 does not divide"),
    ("no such data", ["train", "tiny.yaml", "data.source=/no/such/place", "name=x"], "/no/such/place does not exist"),
    ("too little data", ["train", "tiny.yaml", "data.source=short.txt", "name=y"], "tokens"),
    ("no such recipe", ["train", "no-such-recipe"], "no recipe 'no-such-recipe'"),
    ("settings of a run changed", ["train", "tiny.yaml", "train.seed=5", "train.steps=40"], "train.seed=0"),
    ("no such checkpoint", ["generate", "nowhere", "--prompt", "x"], "no checkpoint folder nowhere"),
    ("a folder without a checkpoint", ["generate", "runs", "--prompt", "x"], "config.json"),
    ("an empty prompt", ["generate", "runs/tiny", "--prompt", ""], "--prompt is empty"),
    ("a prompt beyond the context", ["generate", "runs/tiny", "--prompt", "import " * 300], "context holds 96"),
    (
        "drafts of a model without nested networks",
        ["generate", "runs/tiny", "--prompt", "x", "serve.drafts=nested"],
        "serve.drafts=nested: no network of this model is nested",
    ),
    ("more FFN workers than experts", ["generate", "runs/tiny", "--prompt", "x", "--ffn", "9"], "--ffn 9"),
    (
        "an unknown setting",
        ["generate", "runs/tiny", "serve.step_token=3", "--prompt", "x"],
        "did you mean step_tokens",
    ),
    (
        "a prompt beyond the cache",
        ["generate", "runs/tiny", "serve.cache_tokens=16", "--prompt", "a " * 60],
        "holds 16",
    ),
    ("a trace that is a folder", ["generate", "runs/tiny", "--prompt", "x", "--trace", "runs"], "--trace runs"),
    ("a trace in no folder", ["serve", "runs/tiny", "--port", "0", "--trace", "no/t.json"], "--trace no/t.json"),
    ("an empty pool", ["generate", "runs/tiny", "--prompt", "x", "--attention", "0"], "at least one"),
    ("a dashboard that is not there", ["submit", "tiny.yaml", "--address", "http://127.0.0.1:9"], "127.0.0.1:9"),
    ("a job that is over", ["scale", "tiny", "--experts-parallel", "4"], "nothing trains in"),
    ("a drill on a worker that is not there", ["train", "tiny.yaml", "chaos.kill=trainer:2@step=1"], "no trainer 2"),
    ("a policy that is not known", ["train", "tiny.yaml", "fault.policy=pray"], "fault.policy=pray"),
    ("no such run", ["status", "nowhere"], "nowhere: no run of that name"),
    ("a log that is not there", ["logs", "tiny", "--rank", "trainer:7"], "--rank trainer:7: no log"),
    ("an address without http", ["submit", "tiny.yaml", "--address", "here"], "--address 'here'"),
]


@pytest.mark.parametrize("words, told", [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_input_is_one_line_and_exit_code_2(folder, trained, words, told):
    done = expertmesh(*words, folder=folder)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("expertmesh: ") and told in line


@pytest.mark.parametrize("verb", [["generate", "--prompt", "x"], ["serve", "--port", "0"]], ids=["generate", "serve"])
def test_a_truncated_checkpoint_is_named(folder, trained, verb):
    name, *options = verb
    done = expertmesh(name, damaged(trained, folder), *options, folder=folder)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "model-00002-of-00002.safetensors: truncated or damaged" in line


def test_a_refused_run_leaves_nothing_behind(folder, trained):
    assert not (folder / "runs" / "x").exists()


def test_doctor_finds_nothing_missing_here(folder):
    findings = expertmesh_json("doctor", folder=folder)["findings"]
    assert all(finding["ok"] for finding in findings if finding["needed"])
