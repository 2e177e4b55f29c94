"""How a foreign checkpoint's tensors are made of ours: each of one, of several of ours, or of an entry of one.

    ours                                              theirs
    layers.2.mlp.gate.weight  [N, D]                  model.layers.2.moe.gate.weight       [N, D]
    layers.2.mlp.experts.0.up_proj.weight  [F, D]  }  model.layers.2.moe.up_proj.weight    [E, F, D]       stacked
    layers.2.mlp.experts.1.up_proj.weight  [F, D]  }
    layers.2.mlp.experts.0.gate_proj.weight [F, D] }  ...experts.0.up_proj.weight          [2F, D]         joined
    layers.2.mlp.experts.0.up_proj.weight  [F, D]  }
    layers.2.mlp.zero_computation.constant [C, D]  {  ...experts.16.constant               [D]             an entry
                                                   {  ...experts.17.constant               [D]

All of it lies along the first dimension, so what becomes a part of another tensor is a run of its bytes, both ways.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import NamedTuple

from expertmesh.system.convert.stream import Copy, Part
from expertmesh.system.model.checkpoint import CheckpointError

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


class Piece(NamedTuple):
    """One of our tensors, or an entry of its first dimension."""

    name: str
    shape: Shape
    entry: int | None = None  # None: all of the tensor


class Theirs(NamedTuple):
    """One tensor of a foreign checkpoint: pieces of ours, one after the other."""

    name: str
    shape: Shape
    pieces: tuple[Piece, ...]  # none: their code never uses it; it is written as zeros


def ours_from_theirs(layout: list[Theirs], parts: dict[str, Part], shapes: Shapes) -> list[Copy]:
    """Each of our tensors of `shapes`, from the foreign tensors in `parts`."""
    found: defaultdict[str, list[tuple[int, Part]]] = defaultdict(list)
    for theirs in layout:
        first = 0
        for piece in theirs.pieces:
            found[piece.name].append((piece.entry or 0, parts[theirs.name].cut(first, piece.shape)))
            first += math.prod(piece.shape)
    in_order = {name: tuple(part for _, part in sorted(pieces, key=lambda p: p[0])) for name, pieces in found.items()}
    return [_copy(name, shape, in_order[name]) for name, shape in shapes.items()]


def theirs_from_ours(layout: list[Theirs], parts: dict[str, Part], spare_dtype: str) -> list[Copy]:
    """Each foreign tensor, from ours in `parts`; one that is never used gets `spare_dtype`."""
    copies = []
    for theirs in layout:
        pieces = tuple(
            part if entry is None else part.cut(entry * math.prod(shape), shape)
            for part, shape, entry in ((parts[p.name], p.shape, p.entry) for p in theirs.pieces)
        )
        spare = Copy(theirs.name, spare_dtype, theirs.shape, ())
        copies.append(_copy(theirs.name, theirs.shape, pieces) if pieces else spare)
    return copies


def _copy(name: str, shape: Shape, parts: tuple[Part, ...]) -> Copy:
    dtypes = sorted({part.dtype for part in parts})
    if len(dtypes) > 1:
        raise CheckpointError(f"{parts[0].stored.path}: parts of {name} are {' and '.join(dtypes)}, not of one dtype")
    return Copy(name, dtypes[0], shape, parts)
