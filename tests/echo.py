"""A role that needs no torch, for tests of what runs roles; a module of its own, which its process imports quickly."""

from __future__ import annotations

import os
import threading
from typing import Any


class Unsendable(RuntimeError):
    """Its pickle cannot be read: it wants two arguments, and keeps one."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)


class Echo:
    def __init__(self, place: int, greeting: str) -> None:
        self._told = (place, greeting)
        self._go_on = threading.Event()

    def told(self) -> tuple[int, str]:
        return self._told

    def pid(self) -> int:
        return os.getpid()

    def environment(self, name: str) -> str:
        return os.environ[name]

    def wait(self) -> str:
        self._go_on.wait()
        return "waited"

    def go_on(self) -> None:
        self._go_on.set()

    def fail(self, message: str) -> None:
        raise ValueError(message)

    def fail_unsendably(self) -> None:
        raise Unsendable(3, "[brackets]\nand lines")

    def send(self, what: Any) -> Any:
        print("was sent", what, flush=True)
        return what

    def leave(self, code: int) -> None:
        os._exit(code)
