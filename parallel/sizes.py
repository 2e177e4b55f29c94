"""The degrees of parallelism that a recipe asks for, and the arithmetic that says whether they fit together."""

from __future__ import annotations

from pydantic import Field, model_validator

from expertmesh.parallel.dispatch_config import DispatchConfig
from expertmesh.parallel.recipe_section import RecipeSection


class ParallelSizes(RecipeSection):
    """How many ranks share the batch and how many share the experts.

    Attention and all dense weights are replicated on `dp` ranks. Each of them holds the experts of one of `ep` equal
    parts; `dp / ep` ranks hold the same part.
    """

    dp: int = Field(1, ge=1, description="data parallel: ranks that split the batch; the world size follows from it")
    ep: int = Field(1, ge=1, description="expert parallel: ranks that split the experts; divides dp")
    dispatch: DispatchConfig = DispatchConfig()

    @property
    def world_size(self) -> int:
        return self.dp

    @model_validator(mode="after")
    def _nodes_are_equal(self) -> ParallelSizes:
        per_node = self.dispatch.ranks_per_node
        if per_node is not None and self.ep % per_node:
            fits = [size for size in range(1, self.ep + 1) if self.ep % size == 0]
            raise ValueError(
                f"dispatch.ranks_per_node={per_node} does not divide ep={self.ep}; it may be one of {fits}"
            )
        return self

    @model_validator(mode="after")
    def _experts_fold_into_data(self) -> ParallelSizes:
        if self.dp % self.ep:
            fits = [size for size in range(1, self.dp + 1) if self.dp % size == 0]
            raise ValueError(f"ep={self.ep} does not divide dp={self.dp}; with dp={self.dp}, ep may be one of {fits}")
        return self
