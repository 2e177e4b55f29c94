"""SIGINT and SIGTERM, Ctrl-C and a scheduler's notice, for a process that has something to save first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def asked_to_end() -> Iterator[threading.Event]:
    """Set when SIGINT or SIGTERM comes; a second one ends at once, with KeyboardInterrupt."""
    ending = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield ending
        return

    def note(number: int, frame: Any) -> None:
        if ending.is_set():
            raise KeyboardInterrupt
        ending.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
