"""What is raised of a worker that failed, whoever started it."""

from __future__ import annotations


class WorkerFailed(RuntimeError):
    """A worker of a pool raised or died, or could not be placed; the message is one line that names it."""

    def __init__(self, message: str, died: bool = False, cause: BaseException | None = None) -> None:
        super().__init__(message)
        self.died = died
        self.cause = cause  # what the worker raised


def in_a_line(error: BaseException) -> str:
    """The kind of an error and what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
