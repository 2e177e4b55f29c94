"""Where the experts of an FFN pool lie, by the load that was measured, and which copy of an expert serves a token.

A pool begins with contiguous shares. Later each worker may hold `serve.expert_copies` experts of a layer besides its
share: copies of those that have the most to do (EPLB, parallel/eplb.py), so that all workers have as much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from expertmesh.parallel.eplb import place_by_load
from expertmesh.parallel.placement import Placement, place_on_fewest, place_slots

Loads = Mapping[int, Sequence[int]]  # of each layer with FFN experts: rows of each expert
Placements = Mapping[int, Placement]  # of layers whose experts do not lie in contiguous shares

ROWS_WORTH_READING = 8  # of an expert: with fewer, its weights take longer to read than the rows to compute
PAYS = 0.1  # of the busiest worker's load; less is not worth the loading of experts


def place(loads: Loads, workers: int, copies: int) -> dict[int, Placement]:
    """For each layer that had any load: as even a placement as there is with `copies` more experts a worker."""
    return {
        layer: place_by_load(load_E, workers * min(-(-len(load_E) // workers) + copies, len(load_E)), workers)
        for layer, load_E in loads.items()
        if any(load_E)
    }


def busiest(loads: Loads, workers: int, placements: Placements) -> float:
    """The busiest worker's load beside the mean, layers one after the other: 1 is even, `workers` the worst."""
    most = mean = 0.0
    for layer, load_E in loads.items():
        placement = placements.get(layer) or Placement.contiguous(len(load_E), workers)
        most += max(placement.load_of_ranks(load_E))
        mean += sum(load_E) / workers
    return most / mean if mean else 1.0


def choose_copies(experts_TK: torch.Tensor, placement: Placement, source: int) -> torch.Tensor:
    """Slots for experts: rows are shared out among copies where they are many, else each expert wakes one copy."""
    few = experts_TK.numel() < ROWS_WORTH_READING * placement.num_experts
    return (place_on_fewest if few else place_slots)(experts_TK, placement, source)
