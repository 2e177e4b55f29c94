"""The three that start a training job's workers, by `cluster.launcher`; what they have in common is `Crew`.

ray            actors on a Ray cluster, or on a Ray of the job's own
processes      processes of this host
environment    nobody here: torchrun or Slurm has started this command once a rank, and looks after that
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from expertmesh.launch.crew import Crew, PoolCrew
from expertmesh.launch.process_pool import ProcessPool
from expertmesh.launch.recipe import Recipe
from expertmesh.launch.roles import TrainerRole
from expertmesh.launch.started_ranks import FirstRank


def place_told(recipe: Recipe) -> str:
    """Where the job's workers are to be, in words for a person."""
    address, spares = recipe.cluster.address, recipe.fault.spares
    where = {
        "ray": f"on the Ray cluster at {address}" if address else "on a Ray of its own",
        "processes": "on this host",
        "environment": "that torchrun or Slurm has started",
    }
    more = f" and {spares} spares" if spares else ""
    return f"{recipe.parallel.world_size} workers{more} {where[recipe.cluster.launcher]}"


@contextmanager
def crew_of(recipe: Recipe, first_rank: FirstRank | None, lost: Callable[[str], None]) -> Iterator[Crew]:
    """The workers of a job, none of them started yet, until they are ended.

    `first_rank`: of the launcher `environment`. `lost`: called from a thread, with a line that says so, when the
    cluster can no longer be asked for anything.
    """
    if recipe.cluster.launcher == "environment":
        assert first_rank is not None, "it is there before the data is prepared"
        with first_rank.own.at_work():
            yield first_rank
        return
    if recipe.cluster.launcher == "ray":
        with _on_ray(recipe, lost) as crew:
            yield crew
        return
    cpus = _share_of_cores(recipe)
    make = partial(ProcessPool, "trainer", TrainerRole, logs=recipe.run_folder / "logs")
    crew = PoolCrew("127.0.0.1", make, cpus, cpus * recipe.processes, recipe.fault.spares)
    try:
        yield crew
    finally:
        crew.stop()


@contextmanager
def _on_ray(recipe: Recipe, lost: Callable[[str], None]) -> Iterator[Crew]:
    from expertmesh.launch.ray_cluster import Pool, cluster, watched_head

    place, spares = recipe.cluster, recipe.fault.spares
    cpus = place.cpus_per_worker or 1 if place.address else _share_of_cores(recipe)
    slots = cpus * recipe.processes
    make = partial(Pool, "trainer", TrainerRole)
    with cluster(place.address, slots) as host:
        if place.address:
            make = partial(make, where=place.where, strategy=place.strategy)
        crew = PoolCrew(host, make, cpus, None if place.address else slots, spares)
        with watched_head(place.head_s, lost):
            try:
                yield crew
            finally:
                crew.stop()


def _share_of_cores(recipe: Recipe) -> int:
    """Of each worker on this host."""
    return recipe.cluster.cpus_per_worker or max(1, (os.cpu_count() or 1) // recipe.parallel.world_size)
