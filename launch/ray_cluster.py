"""Ray, and the only file that imports it: a cluster to be on, and pools of long-lived workers on it.

Ray is the control plane: it places processes, starts them, tells of their death and carries requests. Tensors travel by
torch.distributed, and no Ray call is made within a training step or a model's forward.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Ray reads these while it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's own future default, asked for now: workers without a GPU request keep the visibility that the user set.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# A call that comes when we are on no cluster any more fails; Ray would start one for it, or attach to a stranger's.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

_TOKEN_FILE = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
if os.environ.get("RAY_AUTH_TOKEN") or _TOKEN_FILE.exists():
    # Ray's servers look for a token by themselves, its clients only when told to; a server without auth ignores it.
    os.environ.setdefault("RAY_AUTH_MODE", "token")

import ray
from ray.exceptions import AuthenticationError, OutOfMemoryError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from expertmesh.launch.room import Wanted, told_of
from expertmesh.launch.worker_failed import WorkerFailed, in_a_line


def _to_our_log(data: dict[str, Any], ignore_prefix: bool) -> None:
    logging.getLogger(__name__).debug("%s: %s", data["pid"], " ".join(data["lines"]))


# Ray prints what it has to say of workers that died to standard output, where our results are; no setting of it stops
# that. Who died is told by its calls.
ray._private.worker.print_to_stdstream = _to_our_log

PLACEMENT_TIMEOUT_S = 60
LOOK_EVERY_S = 1  # at the head, and while workers are placed at the nodes that are left
SPREAD_S = 2.0  # from one worker's death to its peers' errors: 0.05 s seen on one machine
OBJECT_STORE_BYTES = 128 * 2**20  # of an own cluster: no tensor ever goes through it
_FOLDER = "expertmesh-ray-"


def _start(folder: str, cpus: int) -> None:
    """Start a Ray of our own. It gives itself 30 s, which a machine that is busy may need twice."""
    for last in (False, True):
        try:
            with _own_signals():
                ray.init(
                    address="local",
                    _temp_dir=folder,
                    _node_ip_address="127.0.0.1",
                    num_cpus=cpus,
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                )
            return
        except Exception as error:  # Ray raises no narrower one where its processes do not come up in time
            ray.shutdown()
            if last or isinstance(error, ValueError):
                reason = " ".join(str(error).split())[:200]
                raise RuntimeError(f"Ray did not start on this machine: {reason}") from error


class NoCluster(RuntimeError):
    """No Ray cluster answers where one was said to be: wrong input."""

    exit_code = 2


@contextmanager
def cluster(address: str | None, cpus: int) -> Iterator[str]:
    """Be on the Ray cluster at `address`; None: start one for this process alone, with `cpus` slots, and end it after.

    Yields the address by which workers reach this process.

    An own cluster never attaches to somebody else's and keeps its files in a folder of its own.
    """
    if address is not None:
        try:
            with _own_signals():
                ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise NoCluster(
                f"no Ray cluster answers at {address} (ray start --head prints its address): {reason}"
            ) from None
        try:
            yield ray.util.get_node_ip_address()
        finally:
            ray.shutdown()
        return
    _sweep_folders()
    folder = tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-")  # short: unix sockets allow about 107 bytes
    try:
        _start(folder, cpus)
        try:
            yield "127.0.0.1"
        finally:
            ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def watched_head(seconds: float, lost: Callable[[str], None]) -> Iterator[None]:
    """Have `lost` called in a thread, with a line that says so, once the cluster's head has not answered for `seconds`.

    Calls of Ray hang meanwhile, cannot be interrupted, and after 60 s end the process. The system takes connections for
    a process that is stopped, too; but a head that is at work says something first, as gRPC does (with TLS it is us).
    """
    address = ray.get_runtime_context().gcs_address
    host, port = address.rsplit(":", 1)
    speaks = os.environ.get("RAY_USE_TLS", "0") == "0"
    done = threading.Event()

    def answers() -> bool:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=LOOK_EVERY_S) as line:
                return not speaks or bool(line.recv(1))
        except OSError:
            return False

    def look() -> None:
        seen = time.monotonic()
        while not done.wait(LOOK_EVERY_S):
            if answers():
                seen = time.monotonic()
            elif time.monotonic() - seen > seconds:
                return lost(f"the head of the Ray cluster, {address}, has not answered for {seconds:g} s")

    thread = threading.Thread(target=look, name="watch the head", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the process's way to end: Ray would have SIGTERM exit at once, past whoever puts things away."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def _sweep_folders() -> None:
    """Remove what killed processes left behind: folders of own clusters whose process is gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        owner = folder.name.removeprefix(_FOLDER).split("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(folder, ignore_errors=True)


def submission_client(address: str) -> Any:
    """Ray's client for jobs at the dashboard `address`. Raises ValueError when none answers, or not to us."""
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)  # it tells of every package that it uploads
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise ValueError(
            f"{address} wants a token: set RAY_AUTH_TOKEN_PATH to a file with the cluster's (ray get-auth-token there)"
        ) from None
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(f"no Ray dashboard answers at {address}: {' '.join(str(error).split())[:200]}") from None


def gpus_for(workers: int) -> int:
    """GPUs to give each of `workers`: one where the cluster has enough, else none."""
    return int(ray.cluster_resources().get("GPU", 0) >= workers)


class Pool:
    """`workers` actors of one role, and `spares` after them, in one placement group; later ones in groups of their own.

    Each is `role(rank, *arguments)`; its methods run in threads, so that one can be asked while another is at work.
    `gpus`: of each worker; None: one where the cluster has enough for them. `where` and `strategy` say which nodes they
    may be on, and how they share them (see `Wanted`).
    """

    def __init__(
        self,
        name: str,
        role: type,
        workers: int,
        cpus: float,
        *arguments: Any,
        spares: int = 0,
        gpus: int | None = None,
        where: dict[str, str] | None = None,
        strategy: str = "PACK",
    ) -> None:
        self.name = name
        gpus = gpus_for(workers) if gpus is None else gpus
        self._wanted = Wanted(name, workers, {"CPU": cpus} | ({"GPU": gpus} if gpus else {}), where or {}, strategy)
        self._actor, self._arguments = ray.remote(role), arguments
        self._resources = {"num_cpus": cpus, "num_gpus": gpus}
        self._places: list[tuple[PlacementGroup, int]] = []  # of each rank: the group and the bundle
        self._ended: set[int] = set()
        self._waiters, self._waiters_changed = 0, threading.Condition()  # threads that wait for workers to start
        self._no_more = False
        self.workers: list[Any] = []
        self.grow(workers, spares)

    def grow(self, workers: int, spares: int = 0) -> list[int]:
        """The ranks of so many more workers. Raises WorkerFailed where there is no place for them."""
        wanted, count = self._wanted._replace(workers=workers, spares=spares), workers + spares
        wanted.check_room(_alive())
        name = f"{self.name}-{secrets.token_hex(4)}"  # Ray wants each group's to be its own
        selector = [wanted.where] * count if wanted.where else None
        group = placement_group([wanted.each] * count, wanted.strategy, name, bundle_label_selector=selector)
        with self._waiting():
            try:
                self._await_group(group, wanted, time.monotonic() + PLACEMENT_TIMEOUT_S)
            except WorkerFailed:
                remove_placement_group(group)
                raise
        ranks = list(range(len(self.workers), len(self.workers) + count))
        self._places += [(group, bundle) for bundle in range(count)]
        self.workers += [self._place(rank) for rank in ranks]
        return ranks

    def end(self, rank: int) -> None:
        """End a worker for good; its place is given back with the last of those that came with it."""
        self.kill(rank)
        self._ended.add(rank)
        group, _ = self._places[rank]
        if all(other in self._ended for other, (its, _) in enumerate(self._places) if its is group):
            remove_placement_group(group)

    def _place(self, rank: int) -> Any:
        group, bundle = self._places[rank]
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        options = {**self._resources, "max_concurrency": 8, "scheduling_strategy": place}
        return self._actor.options(**options).remote(rank, *self._arguments)

    def check_room(self) -> None:
        """Raise WorkerFailed when the nodes that are left could not hold the workers, however empty they were."""
        self._wanted.check_room(_alive())

    def await_started(self, ranks: Sequence[int]) -> None:
        """Wait until these workers have started, or have a place and PLACEMENT_TIMEOUT_S are over.

        A new worker may be placed on a node that is lost, as long as Ray does not know: once it does, Ray gives that
        bundle another node, and the worker is placed again.
        Raises WorkerFailed when the nodes that are left have no room, or none that came free in time.
        """
        deadline = time.monotonic() + PLACEMENT_TIMEOUT_S
        with self._waiting():
            starting = {self.call(rank, "__ray_ready__"): (rank, _names()) for rank in ranks}
            while starting and time.monotonic() < deadline:
                for call in self.wait(list(starting), LOOK_EVERY_S):
                    rank, nodes = starting.pop(call)
                    if self._failure(rank, call) and (left := _names()) != nodes:
                        self.workers[rank] = self._place(rank)
                        starting[self.call(rank, "__ray_ready__")] = rank, left
                self._check_still_waited_for()
                self.check_room()
            for rank, _ in starting.values():
                self._await_group(self._places[rank][0], self._wanted, deadline)

    def _await_group(self, group: PlacementGroup, wanted: Wanted, deadline: float) -> None:
        """Wait until each bundle has its node. Raises WorkerFailed where none has room, or none comes free in time."""
        while not group.wait(LOOK_EVERY_S):
            self._check_still_waited_for()
            wanted.check_room(nodes := _alive())
            if time.monotonic() > deadline:
                told = told_of(nodes, ray._private.state.available_resources_per_node())
                raise WorkerFailed(f"{wanted}; they did not come free within {PLACEMENT_TIMEOUT_S} s: {told}")

    def wait_no_more(self) -> None:
        """Have each thread that waits for workers raise WorkerFailed, now or when it comes; return once none waits.

        Before the process leaves the cluster: some of Ray's calls never return when that happens below them.
        """
        self._no_more = True
        with self._waiters_changed:
            self._waiters_changed.wait_for(lambda: not self._waiters)

    def _check_still_waited_for(self) -> None:
        if self._no_more:
            raise WorkerFailed(f"workers of pool {self.name} are waited for no more")

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        with self._waiters_changed:
            self._check_still_waited_for()
            self._waiters += 1
        try:
            yield
        finally:
            with self._waiters_changed:
                self._waiters -= 1
                self._waiters_changed.notify_all()

    def replace(self, rank: int) -> None:
        """A new worker in the place of one that is dead, or will be."""
        ray.kill(self.workers[rank])
        self.workers[rank] = self._place(rank)

    def kill(self, rank: int) -> None:
        """End a worker at once; one that is stopped ends within 5 s."""
        ray.kill(self.workers[rank])

    def call(self, rank: int, method: str, *arguments: Any) -> ray.ObjectRef:
        """Call `method` on one worker, without waiting."""
        return getattr(self.workers[rank], method).remote(*arguments)

    def answer(self, rank: int, call: ray.ObjectRef, seconds: float) -> Any:
        """What a call gave; None when it takes longer than `seconds`. Raises WorkerFailed."""
        done, _ = ray.wait([call], timeout=seconds)
        return self._result(rank, call) if done else None

    @staticmethod
    def wait(calls: list[ray.ObjectRef], seconds: float, count: int = 1) -> list[ray.ObjectRef]:
        """Wait until `count` of `calls` have ended, or `seconds` have passed; return those that have."""
        done, _ = ray.wait(calls, num_returns=count, timeout=seconds)
        return done

    @staticmethod
    def when_over(call: ray.ObjectRef, tell: Callable[[], None]) -> None:
        """Have `tell` called, by a thread of Ray's, once a call has ended."""
        call.future().add_done_callback(lambda _: tell())

    def start(self, method: str, *arguments: Any) -> list[ray.ObjectRef]:
        """Call `method` on every worker, without waiting; `finished` looks after the calls."""
        return [getattr(worker, method).remote(*arguments) for worker in self.workers]

    async def ask(self, rank: int, method: str, *arguments: Any) -> Any:
        """Call `method` on one worker from an event loop."""
        with self._naming(rank):
            return await getattr(self.workers[rank], method).remote(*arguments)

    async def stream(self, rank: int, method: str) -> AsyncIterator[Any]:
        """What the generator `method` of one worker yields, as it comes."""
        with self._naming(rank):
            async for item in getattr(self.workers[rank], method).options(num_returns="streaming").remote():
                yield await item

    def finished(self, calls: list[ray.ObjectRef], seconds: float) -> bool:
        """Wait up to `seconds` for all calls; raise WorkerFailed as soon as one has failed.

        Workers that lose a peer fail too, with an error of the connection. So a failure is given a moment to spread,
        and the worker that died is named before those that raised.
        """
        with self._waiting():
            done, waiting = ray.wait(calls, num_returns=len(calls), timeout=seconds)
            if any(self._failure(calls.index(call), call) for call in done):
                done, _ = ray.wait(calls, num_returns=len(calls), timeout=SPREAD_S)
                failures = [failure for call in done if (failure := self._failure(calls.index(call), call))]
                raise max(failures, key=lambda failure: failure.died)
            return not waiting

    def _failure(self, rank: int, call: ray.ObjectRef) -> WorkerFailed | None:
        try:
            self._result(rank, call)
        except WorkerFailed as failure:
            return failure
        return None

    def _result(self, rank: int, call: ray.ObjectRef) -> Any:
        with self._naming(rank):
            return ray.get(call)

    @contextmanager
    def _naming(self, rank: int) -> Iterator[None]:
        """Say of Ray's errors which worker it was, in a line."""
        try:
            yield
        except RayTaskError as error:
            raise WorkerFailed(f"{self.name} {rank} failed: {_cause(error)}", False, error.cause) from error
        except (RayActorError, OutOfMemoryError) as error:
            raise WorkerFailed(f"{self.name} {rank} died: killed, out of memory, or crashed", died=True) from error

    def stop(self) -> None:
        """End all workers and give their places back."""
        for rank in range(len(self.workers)):
            if rank not in self._ended:
                self.end(rank)


def _cause(error: RayTaskError) -> str:
    return in_a_line(error.cause) if error.cause else str(error)


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _names() -> set[str]:
    return {node["NodeID"] for node in _alive()}
