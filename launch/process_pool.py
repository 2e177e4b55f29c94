"""Workers as plain processes of this host, without Ray; what runs in each is worker_process.py.

Each has a socket to us, on which calls and answers go as pickles. A thread of ours reads the answers of one worker. The
socket closes when its process ends, whatever ended it: so a death is known at once, and a worker knows of ours.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from contextlib import suppress
from itertools import count, islice
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import torch

from expertmesh.launch.worker_failed import WorkerFailed, in_a_line

REAPED_S = 5.0  # for the system to take a killed process away: one with a GPU gives its memory back first
COMMAND = [sys.executable, "-P", "-m", "expertmesh.launch.worker_process"]  # -P: the user's folder is no place for code


class ProcessPool:
    """`workers` processes of one role, and `spares` after them, as `Pool` of ray_cluster.py has them on a cluster.

    Each is `role(place, *arguments)`; its methods run in threads, so that one can be asked while another is at work.
    """

    def __init__(
        self, name: str, role: type, workers: int, cpus: float, *arguments: Any, spares: int = 0, logs: Path
    ) -> None:
        """`cpus`: threads of each, at least one. What a process prints goes to its file in `logs`.

        Raises WorkerFailed where there are GPUs, but too few.
        """
        self._name, self._role, self._arguments, self._logs = name, role, arguments, logs
        self._workers, self._spares, self._threads = workers, spares, max(1, int(cpus))
        self.check_room()
        logs.mkdir(parents=True, exist_ok=True)
        self._processes = [self._start(place) for place in range(workers + spares)]

    def check_room(self) -> None:
        """Raise WorkerFailed where this host has GPUs, but not one for each; cores may be shared."""
        gpus = torch.cuda.device_count()
        if 0 < gpus < self._workers + self._spares:
            more = f" and {self._spares} spares" if self._spares else ""
            asks = f"pool {self._name} asks for {self._workers} workers{more} with a GPU each"
            raise WorkerFailed(f"{asks}; this host has {gpus} (CUDA_VISIBLE_DEVICES= does without)")

    def _start(self, place: int) -> _Process:
        log = self._logs / f"{self._name}-{place}.log"
        return _Process(f"{self._name} {place}", self._role, (place, *self._arguments), self._threads, log)

    def await_started(self, places: Sequence[int]) -> None:
        """They have started when they are made."""

    def call(self, place: int, method: str, *arguments: Any) -> Future[Any]:
        """Call `method` on one worker, without waiting. One thread makes all calls."""
        return self._processes[place].call(method, arguments)

    def answer(self, place: int, call: Future[Any], seconds: float) -> Any:
        """What a call gave; None when it takes longer than `seconds`. Raises WorkerFailed."""
        try:
            return call.result(seconds)
        except TimeoutError:  # ours; a worker's own comes in a WorkerFailed
            return None

    @staticmethod
    def wait(calls: list[Future[Any]], seconds: float, count: int = 1) -> list[Future[Any]]:
        """Wait until `count` of `calls` have ended, or `seconds` have passed; return those that have."""
        with suppress(TimeoutError):
            for _ in islice(as_completed(calls, seconds), count):
                pass
        return [call for call in calls if call.done()]

    @staticmethod
    def when_over(call: Future[Any], tell: Callable[[], None]) -> None:
        """Have `tell` called, by the thread that listens, once a call has ended."""
        call.add_done_callback(lambda _: tell())

    def replace(self, place: int) -> None:
        """A new worker in the place of one that is dead, or will be."""
        self.kill(place)
        self._processes[place] = self._start(place)

    def kill(self, place: int) -> None:
        """End a worker at once, also one that is stopped."""
        self._processes[place].kill()

    def stop(self) -> None:
        """End all workers."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.listener.join(REAPED_S)


class _Process:
    """One worker from its start to its end."""

    def __init__(self, name: str, role: type, arguments: tuple[Any, ...], threads: int, log: Path) -> None:
        self._name = name
        self._socket, theirs = Pipe()
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        try:
            with open(log, "ab") as file, theirs:
                self._process = subprocess.Popen(
                    [*COMMAND, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    env=environment,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C is for us: they are asked to save and leave
                )
        except OSError as error:
            raise WorkerFailed(f"{name} could not be started: {in_a_line(error)}") from error
        self._numbers, self._calls = count(), dict[int, Future[Any]]()
        self._death: WorkerFailed | None = None
        self._lock = threading.Lock()  # of the two above: what is called after its death has failed, too
        self.listener = threading.Thread(target=self._listen, name=f"answers of {name}", daemon=True)
        self.listener.start()
        self._send(sys.path)  # what we can import, it can
        self._send((role, arguments))

    def call(self, method: str, arguments: tuple[Any, ...]) -> Future[Any]:
        call, number = Future[Any](), next(self._numbers)
        with self._lock:
            if self._death is not None:
                call.set_exception(self._death)
                return call
            self._calls[number] = call
        self._send((number, method, arguments))
        return call

    def _send(self, message: Any) -> None:
        with suppress(OSError):  # it is gone, which the listener tells
            self._socket.send(message)

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                number, error, answer = self._socket.recv()
                with self._lock:
                    call = self._calls.pop(number)
                if error is None:
                    call.set_result(answer)
                else:
                    call.set_exception(WorkerFailed(f"{self._name} failed: {in_a_line(error)}", False, error))
        self.kill()
        code = self._process.wait()
        why = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        with self._lock:
            self._death = WorkerFailed(f"{self._name} died: {why}", died=True)
        for call in self._calls.values():
            call.set_exception(self._death)
        self._socket.close()

    def kill(self) -> None:
        self._process.kill()
