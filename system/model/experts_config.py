"""The kinds of feed-forward networks, as data: what one routed expert is, and what stands in a dense layer.

swiglu       down(silu(gate x) * up x); with `nested`, prefixes of its width are models of their own (MatFormer)
mlp          down(act(up x))                                                   (DeepSpeed-MoE, ModuleFormer, GPT)
structured   a SwiGLU of factored matrices                                                       (StructuredFFN)
spark        a gate of which a threshold keeps the largest units only                        (Spark Transformer)
modulated    scale and shift of features that all experts share                                          (MoFME)
versatile    one SwiGLU used in slices or several times over; dense layers only                   (VersatileFFN)
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from expertmesh.parallel.recipe_section import RecipeSection, kind_or


class NetworkConfig(RecipeSection):
    """What every kind says about itself once the width of the model is known."""

    def num_params(self, hidden_size: int) -> int:
        raise NotImplementedError

    def check(self, hidden_size: int) -> None:
        """Raise ValueError where the network does not fit a model of that width."""


class SwiGLUConfig(NetworkConfig):
    """down(silu(gate x) * up x) without biases (arXiv 2002.05202)."""

    kind: Literal["swiglu"] = "swiglu"
    hidden_size: int = Field(512, ge=1)
    nested: tuple[float, ...] = Field(
        (), description="shares of the width that are trained to work alone, in rising order and ending with 1"
    )

    def num_params(self, hidden_size: int) -> int:
        return 3 * hidden_size * self.hidden_size

    def width(self, share: float) -> int:
        """Hidden units of the nested network of that share."""
        return round(self.hidden_size * share)

    @model_validator(mode="after")
    def _shares_are_whole_and_rise(self) -> SwiGLUConfig:
        shares = self.nested
        if not shares:
            return self
        if list(shares) != sorted(set(shares)) or shares[0] <= 0 or shares[-1] != 1:
            raise ValueError(f"nested={list(shares)}: shares of the width rise from above 0 to 1")
        odd = [share for share in shares if not (self.hidden_size * share).is_integer()]
        if odd:
            raise ValueError(f"nested={odd[0]:g} of hidden_size={self.hidden_size} is no whole number of units")
        return self


class MLPConfig(NetworkConfig):
    """down(act(up x)) without biases."""

    kind: Literal["mlp"]
    hidden_size: int = Field(ge=1)
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"

    def num_params(self, hidden_size: int) -> int:
        return 2 * hidden_size * self.hidden_size


class StructuredConfig(NetworkConfig):
    """A SwiGLU whose three matrices are products of two narrow or blocky ones (arXiv 2406.16450)."""

    kind: Literal["structured"]
    hidden_size: int = Field(ge=1)
    form: Literal["low_rank", "block_dense", "block_shuffle"]
    rank: int | None = Field(None, ge=1, description="width between the two factors; block_shuffle has none")
    blocks: int = Field(1, ge=1, description="blocks of a block-diagonal factor")
    guided: bool = Field(False, description="a dense twin helps through the first half of training, then is dropped")

    @property
    def inner_blocks(self) -> int:
        """Blocks of the factor that is applied first."""
        return self.blocks

    @property
    def outer_blocks(self) -> int:
        return self.blocks if self.form == "block_shuffle" else 1

    def between(self, inputs: int, outputs: int) -> int:
        """Numbers between the two factors that stand for one [outputs, inputs] matrix."""
        return min(inputs, outputs) if self.rank is None else self.rank

    def factor_params(self, inputs: int, outputs: int) -> int:
        return self.between(inputs, outputs) * (inputs // self.inner_blocks + outputs // self.outer_blocks)

    def num_params(self, hidden_size: int) -> int:
        factors = 2 * self.factor_params(hidden_size, self.hidden_size)
        factors += self.factor_params(self.hidden_size, hidden_size)
        return factors + self.guided * 3 * hidden_size * self.hidden_size

    def check(self, hidden_size: int) -> None:
        if hidden_size % self.blocks:
            raise ValueError(f"blocks={self.blocks} does not divide model.hidden_size={hidden_size}")

    @model_validator(mode="after")
    def _form_has_its_sizes(self) -> StructuredConfig:
        if (self.rank is None) != (self.form == "block_shuffle"):
            raise ValueError(f"rank={self.rank}: low_rank and block_dense need a rank, block_shuffle has none")
        if self.form == "low_rank" and self.blocks != 1:
            raise ValueError(f"blocks={self.blocks}: low_rank has no blocks")
        for key, width in (("hidden_size", self.hidden_size), ("rank", self.rank)):
            if width is not None and width % self.blocks:
                raise ValueError(f"blocks={self.blocks} does not divide {key}={width}")
        return self


class SparkConfig(NetworkConfig):
    """gelu(top(gate a)) * up b, of which about `kept` units are not 0 (Spark Transformer, arXiv 2506.06644).

    The token's first `predictor_width` numbers are a, the rest b; without it both are the whole token (Gemma 3n).
    """

    kind: Literal["spark"]
    hidden_size: int = Field(ge=2)
    kept: int = Field(ge=1, description="units that the threshold keeps, on average")
    predictor_width: int | None = Field(None, ge=1)

    def num_params(self, hidden_size: int) -> int:
        """One input matrix split over the two parts of a token, or two whole ones."""
        read = 2 * hidden_size if self.predictor_width is None else hidden_size
        return self.hidden_size * (read + hidden_size)

    def check(self, hidden_size: int) -> None:
        if self.predictor_width is not None and self.predictor_width >= hidden_size:
            raise ValueError(
                f"predictor_width={self.predictor_width} must be below model.hidden_size={hidden_size}: "
                "the other numbers of the token are read by up"
            )

    @model_validator(mode="after")
    def _some_are_kept(self) -> SparkConfig:
        if not self.kept < self.hidden_size:
            raise ValueError(f"kept={self.kept} must be below hidden_size={self.hidden_size}; swiglu keeps all")
        return self


class ModulatedConfig(NetworkConfig):
    """scale(h) * h + shift(h) of features h that all experts of a layer share, and an adaptor after (MoFME)."""

    kind: Literal["modulated"]
    adaptor_size: int = Field(ge=1, description="inner width of the adaptor")

    def num_params(self, hidden_size: int) -> int:
        return 2 * (hidden_size + 1) * hidden_size


class VersatileConfig(NetworkConfig):
    """One SwiGLU used two ways: in slices of which a token picks some, and whole up to `loops` times (VersatileFFN)."""

    kind: Literal["versatile"]
    hidden_size: int = Field(ge=1)
    slices: int = Field(8, ge=1)
    top_k: int = Field(2, ge=1)
    loops: int = Field(4, ge=1)
    first_temperature: float = Field(5.0, gt=0, description="of the draw of a number of loops while training")
    temperature_decay: float = Field(0.99984, gt=0, le=1, description="factor on it each step")
    last_temperature: float = Field(0.1, gt=0, description="it falls no lower")

    def num_params(self, hidden_size: int) -> int:
        return 3 * hidden_size * self.hidden_size + (self.slices + self.loops) * hidden_size

    def temperature(self, step: int) -> float:
        """While training step `step`, counted from 1."""
        return max(self.first_temperature * self.temperature_decay ** (step - 1), self.last_temperature)

    @model_validator(mode="after")
    def _slices_are_equal(self) -> VersatileConfig:
        if self.hidden_size % self.slices:
            raise ValueError(f"slices={self.slices} does not divide hidden_size={self.hidden_size}")
        if self.top_k > self.slices:
            raise ValueError(f"top_k={self.top_k} is more than slices={self.slices}")
        return self


AnyExpert = Annotated[
    SwiGLUConfig | MLPConfig | StructuredConfig | SparkConfig | ModulatedConfig,
    Field(discriminator="kind"),
    kind_or("swiglu"),
]
AnyDense = Annotated[SwiGLUConfig | MLPConfig | VersatileConfig, Field(discriminator="kind"), kind_or("swiglu")]
