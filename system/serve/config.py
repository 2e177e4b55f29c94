"""How a checkpoint is served."""

from __future__ import annotations

from pydantic import Field

from expertmesh.parallel.recipe_section import RecipeSection


class ServeConfig(RecipeSection):
    """Settings of every attention worker, or of the one process when serving joined."""

    max_running: int = Field(8, ge=1, description="requests that compute at once on one worker; others wait")
    micro_batches: int = Field(1, ge=1, le=8, description="parts of a step in flight to the FFN pool at once")
    exchange_timeout_s: float = Field(60.0, gt=0, description="longest wait for an FFN worker's answer")
