"""A worker's process as process_pool.py starts it: an object of a role, whose methods are called from outside.

Each call is made in a thread of its own, so that a worker that trains can be asked what it has recorded. When whoever
started it is gone, it ends at once.

    python -m expertmesh.launch.worker_process SOCKET    the number of an open socket
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any


def main(socket: int) -> None:
    calls, sending = Connection(socket), threading.Lock()
    sys.path[:] = calls.recv()
    role, arguments = calls.recv()
    worker = role(*arguments)

    def answer(number: int, method: str, arguments: tuple[Any, ...]) -> None:
        failure, result = None, None
        try:
            result = getattr(worker, method)(*arguments)
        except BaseException as error:
            traceback.print_exc()
            failure = _as_sent(error)
        with sending:
            calls.send((number, failure, result))

    while True:
        try:
            call = calls.recv()
        except (EOFError, OSError):
            os._exit(1)
        threading.Thread(target=answer, args=call, daemon=True).start()


def _as_sent(error: BaseException) -> BaseException:
    """The error, or where it cannot be sent, one that says the same."""
    try:
        sent: BaseException = pickle.loads(pickle.dumps(error))
        return sent
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
