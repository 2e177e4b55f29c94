"""Which collective this process entered last, and whether it is still in it: what a hang is told from.

The training thread writes one value, another reads it when it likes: no lock, no system call, nothing to be formatted.
"""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """A point of a rank's way from collective to collective."""

    collective: str = ""  # that was entered last, such as "layer 3 dispatch"; none yet
    inside: bool = False  # it waits there for others

    def __str__(self) -> str:
        if self.inside:
            return f"in {self.collective}"
        return f"outside of any collective{f', after {self.collective}' if self.collective else ''}"


class Here:
    """Where this process is."""

    place = Place()


HERE = Here()


class inside:
    """`with inside("layer 3 dispatch"):` around what waits for other ranks."""

    __slots__ = ("_collective",)

    def __init__(self, collective: str) -> None:
        self._collective = collective

    def __enter__(self) -> None:
        HERE.place = Place(self._collective, True)

    def __exit__(self, *error: object) -> None:
        HERE.place = Place(self._collective)
