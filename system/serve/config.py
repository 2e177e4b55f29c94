"""How a checkpoint is served."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from expertmesh.parallel.recipe_section import RecipeSection
from expertmesh.parallel.wire import WireName


class ServeConfig(RecipeSection):
    """Settings of every attention worker, or of the one process when serving joined."""

    max_running: int = Field(32, ge=1, description="requests that hold pages at once on one worker; others wait")
    step_tokens: int = Field(512, ge=1, description="tokens computed at once; longer prompts are computed in bites")
    page_size: int = Field(16, ge=1, description="tokens of a page of the cache")
    cache_tokens: int | None = Field(
        None, ge=1, description="tokens that the cache holds; null: max_running whole contexts, or what memory allows"
    )
    prefix_cache: bool = Field(True, description="requests that begin alike share the pages of their beginning")
    micro_batches: int = Field(3, ge=1, le=4, description="parts of the work in flight to the FFN pool at once")
    micro_batch_tokens: int | None = Field(
        None, ge=1, description="fewest tokens worth a micro-batch of their own; null: 8 rows for each FFN expert"
    )
    wire: Literal["routed", "broadcast"] = Field(
        "routed", description="a token goes to the FFN workers that hold its experts, or to all of them"
    )
    wire_format: WireName = Field("native", description="of tokens on their way to the FFN pool; answers keep theirs")
    drafts: Literal["none", "lookup", "nested"] = Field(
        "none", description="tokens guessed ahead: from the text itself, or by a nested model at a part of its width"
    )
    draft_tokens: int = Field(4, ge=1, le=16, description="tokens guessed ahead at most")
    draft_width: float | None = Field(
        None, gt=0, lt=1, description="share of its width at which a nested model guesses; null: the smallest"
    )
    expert_copies: int = Field(
        0, ge=0, description="experts of a layer that an FFN worker may hold besides its share: copies of busy ones"
    )
    rebalance_s: float | None = Field(
        None, gt=0, description="seconds after which experts are placed anew by their load, if it pays; null: never"
    )
    exchange_timeout_s: float = Field(60.0, gt=0, description="longest wait for an FFN worker's answer")

    recover_s: float = Field(60.0, ge=0, description="longest wait for a new FFN worker where one died")
    restarts: int = Field(8, ge=0, description="workers started again before those that are left go on alone")

    def room(self, context_length: int) -> int:
        """Tokens of the longest request, answer included."""
        pages = context_length if self.cache_tokens is None else -(-self.cache_tokens // self.page_size)
        return min(context_length, pages * self.page_size)
