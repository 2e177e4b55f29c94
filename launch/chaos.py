"""Failures on purpose: that a job survives the loss of a worker should be seen before the night on which it matters.

    chaos.kill="trainer:1@step=5"    worker 1 is killed as it begins step 5 (SIGKILL: no goodbye)
    chaos.stop="trainer:1@step=5"    it is stopped and hangs (SIGSTOP): no connection breaks, and Ray notices nothing
    chaos.nan="trainer:1@step=5"     its first weights become NaN, and with them the loss of all workers

A kill and a stop come once: what is looked at is how the job goes on. A NaN comes each time that the batch of its step
is trained on, as one that data causes would.
"""

from __future__ import annotations

import os
import re
import signal
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field, field_validator

from expertmesh.parallel.recipe_section import RecipeSection

if TYPE_CHECKING:  # settings are read without torch
    from torch import nn

_PLACE = re.compile(r"trainer:(\d+)@step=(\d+)")


class Place(NamedTuple):
    """Where a drill comes."""

    rank: int
    step: int


def parse_place(text: str) -> Place:
    """ "trainer:1@step=5" -> Place(1, 5). Raises ValueError."""
    found = _PLACE.fullmatch(text)
    if found is None or int(found[2]) < 1:
        raise ValueError("a drill reads trainer:RANK@step=STEP, such as trainer:1@step=5; steps count from 1")
    return Place(int(found[1]), int(found[2]))


class ChaosConfig(RecipeSection):
    """A recipe's drills."""

    kill: str | None = Field(None, description="a worker to kill, such as trainer:1@step=5")
    stop: str | None = Field(None, description="a worker to stop, so that it hangs")
    nan: str | None = Field(None, description="a worker whose weights get a NaN")

    @field_validator("kill", "stop", "nan")
    @classmethod
    def _reads_as_a_place(cls, text: str | None) -> str | None:
        if text is not None:
            parse_place(text)
        return text

    def places(self) -> dict[str, Place]:
        """The drills that are asked for, by key."""
        return {key: parse_place(text) for key, text in self.model_dump().items() if text is not None}

    def survived(self, rank: int) -> ChaosConfig:
        """What is left when worker `rank` was lost."""
        lost = [key for key, place in self.places().items() if key != "nan" and place.rank == rank]
        return self.model_copy(update=dict.fromkeys(lost))


def strike(chaos: ChaosConfig, rank: int, step: int, skip: frozenset[int], model: nn.Module) -> None:
    """Do to this process what a drill has for `rank` before `step`. `skip`: steps whose batches are left out."""
    here = {key for key, place in chaos.places().items() if place == (rank, step)}
    if "nan" in here and step not in skip:
        next(model.parameters()).data.fill_(float("nan"))
    for key, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
        if key in here:
            os.kill(os.getpid(), number)
