"""Layouts that a running job may change to: of another expert-parallel size, or of fewer workers.

A checkpoint of one layout is resumed by any other, so a change costs a re-formation and no step.
"""

from __future__ import annotations

from collections.abc import Callable

from expertmesh.parallel.sizes import ParallelSizes


def scaled(sizes: ParallelSizes, experts_parallel: int) -> ParallelSizes:
    """`sizes` with experts over `experts_parallel` ranks and as many copies of each as before; dp follows.

    Raises ValueError where the degrees of attention do not fit that many ranks.
    """
    copies = sizes.stage_size // (sizes.etp * sizes.ep)
    stage, attention = sizes.etp * experts_parallel * copies, sizes.tp * sizes.cp
    if stage % attention:
        raise ValueError(
            f"--experts-parallel {experts_parallel}: {stage} workers are no multiple of tp x cp = {attention}"
        )
    return ParallelSizes(**sizes.model_dump() | {"ep": experts_parallel, "dp": stage // attention})


def smaller_layouts(sizes: ParallelSizes, allowed: Callable[[ParallelSizes], bool]) -> tuple[ParallelSizes, ...]:
    """Layouts of fewer workers that `allowed` says the job can have, the largest first: less dp, then less ep."""
    found = []
    for dp in range(sizes.dp - 1, 0, -1):
        for ep in range(min(sizes.ep, sizes.tp * sizes.cp * dp // sizes.etp), 0, -1):
            try:
                candidate = ParallelSizes(**sizes.model_dump() | {"dp": dp, "ep": ep})
            except ValueError:
                continue
            if allowed(candidate):
                found.append(candidate)
                break
    return tuple(found)
