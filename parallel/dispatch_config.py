"""How a recipe chooses the road of expert rows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from expertmesh.parallel.recipe_section import RecipeSection

WireName = Literal["native", "bf16", "fp8"]
"""Formats of rows between ranks: see wire.py."""


class DispatchConfig(RecipeSection):
    """Between expert-parallel ranks. No `kind` changes a bit of what is computed; `wire` rounds, `chunks` regroups."""

    kind: Literal["all_to_all", "all_gather", "hierarchical"] = Field(
        "all_to_all", description="straight to the ranks wanted; to all ranks; or once to each node, and on from there"
    )
    wire: WireName = Field("native", description="what rows and their gradients are rounded to on their way")
    chunks: int = Field(1, ge=1, description="parts of a rank's tokens: one is computed while the next is on its way")
    ranks_per_node: int | None = Field(None, ge=1, description="expert-parallel ranks of a node; null: those of a host")
