"""A recipe sent to a running Ray cluster as a Ray job, with our code beside it: nothing need be installed there but
what we depend on.

The job runs the same `expertmesh train` on the cluster's head; inside a job Ray knows its own address.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from expertmesh.launch.ray_cluster import submission_client
from expertmesh.launch.recipe import Recipe

RESULT_MARK = "expertmesh result: "
COMMAND = ["-m", "expertmesh.launch.cli", "train", "recipe.yaml", "--result-in-log"]
NO_AGENT_RETRY_S = 30  # a head that has just started may not take jobs for some seconds


class RemoteJobFailed(RuntimeError):
    """A job that did not succeed, and the exit code it left (1 where it left none)."""

    def __init__(self, message: str, exit_code: int | None) -> None:
        super().__init__(message)
        self.exit_code = exit_code or 1


class Job:
    """A submitted job."""

    def __init__(self, client: Any, job_id: str, known: bool = False) -> None:
        self._client, self.id = client, job_id
        self.known = known  # it was there before

    def follow(self, show: Callable[[str], None]) -> dict[str, Any]:
        """Show the job's log until it ends; return its result. Raises RemoteJobFailed when it fails or was stopped.

        Interrupting lets go of the log, not of the job. When the cluster no longer answers: RemoteJobFailed, too.
        """
        try:
            log = self.show(show)
            status = self._client.get_job_status(self.id)
            while not status.is_terminal():
                time.sleep(0.2)
                status = self._client.get_job_status(self.id)
        except (OSError, RuntimeError) as error:
            told = f"the cluster's head no longer tells of job {self.id} ({' '.join(str(error).split())[:200]})"
            raise RemoteJobFailed(
                f"{told}; if it is lost, the same recipe sent anew goes on from the last checkpoint", None
            ) from error
        if status != "SUCCEEDED":
            exit_code = self._client.get_job_info(self.id).driver_exit_code
            raise RemoteJobFailed(f"job {self.id} ended as {status}; its log is above", exit_code)
        results = [line.removeprefix(RESULT_MARK) for line in log.splitlines() if line.startswith(RESULT_MARK)]
        return {"job": self.id, **json.loads(results[-1])}

    def show(self, show: Callable[[str], None]) -> str:
        """Show the log until the job ends; return all of it."""
        return asyncio.run(self._tail(show))

    async def _tail(self, show: Callable[[str], None]) -> str:
        log = ""
        async for text in self._client.tail_job_logs(self.id):
            log += text
            for line in text.splitlines(keepends=True):
                if not line.startswith(RESULT_MARK):
                    show(line)
        return log


def submit_job(recipe: Recipe, address: str, run_id: str | None = None) -> Job:
    """Send `recipe` to the cluster whose dashboard is at `address`, unless the same job is there already.

    `run_id`: the id it has there; the same id is the same job, whatever became of it. None: made of the recipe, so that
    one that is sent twice trains once; one that is over is sent anew.

    Relative paths of the recipe are taken from here: run_dir, start_from and data must lie where the cluster's nodes
    see them too.
    Raises ValueError when nothing answers at `address`.
    """
    client = submission_client(address)
    content = as_sent(recipe)
    there = {info.submission_id: not info.status.is_terminal() for info in client.list_jobs() if info.submission_id}
    job_id, known = choose_id(content, run_id, there)
    if known:
        return Job(client, job_id, known)
    with tempfile.TemporaryDirectory(prefix="expertmesh-submit-") as folder:
        working = Path(folder) / "job"
        working.mkdir()
        (working / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        known = _submit(
            client,
            submission_id=job_id,
            # The cluster's PATH may lead to another Python; where it has ours (same host, same image), take that.
            entrypoint=f"p={shlex.quote(sys.executable)}; [ -x $p ] || p=python; exec $p {shlex.join(COMMAND)}",
            runtime_env={"working_dir": str(working), "py_modules": [str(_our_code(Path(folder)))]},
            metadata={"name": recipe.name, "run_dir": content["run_dir"]},
        )
    return Job(client, job_id, known)


def choose_id(content: dict[str, Any], run_id: str | None, there: dict[str, bool]) -> tuple[str, bool]:
    """The id of a job that is sent as `content`, and whether it is one of those that are `there` (True: not over)."""
    if run_id is not None:
        return run_id, run_id in there
    text = json.dumps(content, sort_keys=True)
    base = f"{content['name']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    numbered = (f"{base}-{number}" for number in itertools.count(2))
    job_id = next(job_id for job_id in itertools.chain([base], numbered) if there.get(job_id, True))
    return job_id, job_id in there


def as_sent(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a file that says the same in another folder, inside a job."""
    content = recipe.model_dump(mode="json", exclude={"model"} if recipe.start_from else None)
    content["run_dir"] = str(recipe.run_folder)
    if recipe.start_from:
        content["start_from"] = str(Path(recipe.start_from).absolute())
    for key in ("source", "tokenizer"):
        value = content["data"][key]
        if value and value != "stdlib":
            content["data"][key] = str(Path(value).absolute())
    content["cluster"] |= {"launcher": "ray", "address": "auto"}
    return content


def _submit(client: Any, **job: Any) -> bool:
    """Submit it; returns whether somebody else has just done so."""
    deadline = time.monotonic() + NO_AGENT_RETRY_S
    while True:
        try:
            client.submit_job(**job)
            return False
        except RuntimeError as error:
            if "already exists" in str(error):
                return True
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)


def _our_code(folder: Path) -> Path:
    """A folder `expertmesh` of links to our four, wherever they are installed: Ray follows links when it packs."""
    from importlib.util import find_spec

    package = folder / "expertmesh"
    package.mkdir()
    for name in ("kernels", "parallel", "system", "launch"):
        spec = find_spec(f"expertmesh.{name}")
        assert spec is not None and spec.submodule_search_locations
        (package / name).symlink_to(Path(next(iter(spec.submodule_search_locations))).resolve())
    return package
