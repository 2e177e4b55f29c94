"""How a checkpoint is served."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field, model_validator

from expertmesh.parallel.dispatch_config import WireName
from expertmesh.parallel.recipe_section import RecipeSection
from expertmesh.system.model.config import ModelConfig

if TYPE_CHECKING:  # settings are read without torch
    from expertmesh.system.model.skip_ffn import SkipRule


class Skipping(NamedTuple):
    """FFN skipping of a model: the rule, and from which token of an answer on."""

    rule: SkipRule
    after: int


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
    skip_ffn_above: float | None = Field(
        None, description="cosine of a token before and after an FFN from which on it goes past some; null: past none"
    )
    skip_ffn_layers: int = Field(2, ge=1, description="FFNs that it goes past before the cosine is measured again")
    skip_ffn_cold: int = Field(4, ge=0, description="first and last layers whose FFN no token goes past")
    skip_ffn_after: int = Field(2, ge=0, description="first tokens of an answer that go past no FFN")
    exchange_timeout_s: float = Field(60.0, gt=0, description="longest wait for an FFN worker's answer")

    recover_s: float = Field(60.0, ge=0, description="longest wait for a new FFN worker where one died")
    restarts: int = Field(8, ge=0, description="workers started again before those that are left go on alone")

    @model_validator(mode="after")
    def _pages_are_of_one_kind(self) -> ServeConfig:
        if self.skip_ffn_above is not None and self.prefix_cache:
            raise ValueError("skip_ffn_above goes with prefix_cache=false: a prompt's pages are not those of an answer")
        return self

    def skipping(self, model: ModelConfig) -> Skipping | None:
        """Which tokens of this model go past FFNs. Raises ValueError for one that has none to go past."""
        if self.skip_ffn_above is None:
            return None
        if model.block == "parallel" or model.depth is not None:
            raise ValueError("serve.skip_ffn_above: it goes with block=sequential and without depth")
        from expertmesh.system.model.skip_ffn import SkipRule

        warm = range(self.skip_ffn_cold, model.layers - self.skip_ffn_cold)
        if len(warm) < 2:
            ends = f"serve.skip_ffn_cold={self.skip_ffn_cold} at both ends"
            raise ValueError(f"{ends}: of {model.layers} layers that leaves no FFN to go past")
        return Skipping(SkipRule(self.skip_ffn_above, self.skip_ffn_layers, warm), self.skip_ffn_after)

    def room(self, context_length: int) -> int:
        """Tokens of the longest request, answer included."""
        pages = context_length if self.cache_tokens is None else -(-self.cache_tokens // self.page_size)
        return min(context_length, pages * self.page_size)
