"""The degrees of parallelism that a recipe asks for, and the arithmetic that says whether they fit together.

Attention and experts choose their own degrees over the same ranks (parallel folding, arXiv 2504.14960, section 3.2):

    attention, dense weights    tp  x cp x dp             ranks of one pipeline stage, pp of them
    experts                     etp x ep x expert-dp      the same ranks, cut another way

    tp=2 dp=2, ep=4:    rank                0    1    2    3
                        heads, vocabulary   half half half half
                        sequences           a    a    b    b
                        experts             1st  2nd  3rd  4th quarter

Layers of fewer experts, or of a number that ep does not divide, have a smaller degree of their own (PR-MoE,
arXiv 2201.05596, section 4.1) and more copies; no rank is without experts, and none has more than another:

    dp=4, ep=4:         rank                0    1    2    3
                        layer of 4          1    2    3    4
                        layer of 2          1    2    1    2
                        layer of 6          123  456  123  456
"""

from __future__ import annotations

import math

from pydantic import Field, model_validator

from expertmesh.parallel.dispatch_config import DispatchConfig
from expertmesh.parallel.recipe_section import RecipeSection


class ParallelSizes(RecipeSection):
    """How many ranks share each thing."""

    tp: int = Field(1, ge=1, description="tensor parallel: ranks that split heads, hidden units, vocabulary and tokens")
    pp: int = Field(1, ge=1, description="pipeline parallel: ranks that split the layers")
    cp: int = Field(1, ge=1, description="context parallel: ranks that split each sequence in attention too")
    ep: int = Field(
        1, ge=1, description="expert parallel: ranks that split the experts of a layer, or of those that it divides"
    )
    etp: int = Field(1, ge=1, description="expert tensor parallel: ranks that split the hidden units of each expert")
    dp: int = Field(1, ge=1, description="data parallel: ranks that split the batch")
    interleave: int = Field(1, ge=1, description="runs of layers on each pipeline rank; more: less waiting, more sends")
    dispatch: DispatchConfig = DispatchConfig()

    @property
    def world_size(self) -> int:
        return self.pp * self.stage_size

    @property
    def stage_size(self) -> int:
        """Ranks that hold the same layers."""
        return self.tp * self.cp * self.dp

    @property
    def stages(self) -> int:
        """Runs of layers that a micro-batch goes through, one after the other."""
        return self.pp * self.interleave

    def with_expert_degree(self, experts: int) -> ParallelSizes:
        """The same as a layer of that many experts has it."""
        return self.model_copy(update={"ep": expert_degree(experts, self.ep)})

    @model_validator(mode="after")
    def _runs_need_a_pipeline(self) -> ParallelSizes:
        if self.interleave > 1 and self.pp == 1:
            raise ValueError(f"interleave={self.interleave} needs a pipeline: take pp of 2 or more, or interleave=1")
        return self

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
    def _experts_fold_into_attention(self) -> ParallelSizes:
        stage, ranks = self.stage_size, _product(tp=self.tp, cp=self.cp, dp=self.dp)
        if stage % self.etp:
            raise ValueError(
                f"etp={self.etp} does not divide {ranks}; with {ranks}, etp may be one of {divisors(stage)}"
            )
        if stage % (self.etp * self.ep):
            beside = ranks if self.etp == 1 else f"{ranks} and etp={self.etp}"
            raise ValueError(
                f"{_product(etp=self.etp, ep=self.ep)} does not divide {ranks}; "
                f"with {beside}, ep may be one of {divisors(stage // self.etp)}"
            )
        return self


def expert_degree(experts: int, ep: int) -> int:
    """Over how many of `ep` ranks the experts of a layer lie: as many of them as can hold equally many."""
    return math.gcd(experts, ep)


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _product(**degrees: int) -> str:
    """Those above 1 as "tp=2 x dp=4 = 8"; one alone as "dp=4"; the last if there are none."""
    told = {key: size for key, size in degrees.items() if size > 1} or dict([list(degrees.items())[-1]])
    factors = " x ".join(f"{key}={size}" for key, size in told.items())
    return factors if len(told) == 1 else f"{factors} = {math.prod(told.values())}"
