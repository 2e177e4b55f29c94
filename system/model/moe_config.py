"""A mixture-of-experts layer as data: which experts it has, how tokens choose among them, what training adds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, model_validator

from expertmesh.kernels.scheme import Scheme
from expertmesh.parallel.recipe_section import RecipeSection, kind_or
from expertmesh.system.model.experts_config import AnyExpert, MLPConfig, ModulatedConfig, SwiGLUConfig


class GateConfig(RecipeSection):
    """A router of two layers in place of one matrix: hidden_size numbers of a token, an activation, the logits."""

    hidden_size: int = Field(ge=1, description="released MoE++: 8 times the experts; ModuleFormer: 256")
    activation: Literal["tanh", "gelu"] = "tanh"
    bias: bool = Field(False, description="of the first layer")

    def num_params(self, hidden_size: int, experts: int) -> int:
        return self.hidden_size * (hidden_size + self.bias + experts)


class GroupsConfig(RecipeSection):
    """Group-limited routing (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): a token uses experts of few groups."""

    count: int = Field(ge=1, description="equal groups that the experts fall into, in order")
    chosen: int = Field(ge=1, description="groups whose experts one token may use")


class CapacityConfig(RecipeSection):
    """How many slots of one training sequence an expert serves; the others are dropped. Serving drops nothing.

    An expert's share of the K * S slots of a sequence is even, but for zero-computation experts, which have 1/tau
    times that of FFN experts (MoE++, arXiv 2410.07348, equation 8).
    """

    factor: float = Field(1.25, gt=0, description="capacity over an expert's share; MoE++ takes 1.1")
    minimum: int = Field(0, ge=0, description="no expert serves fewer; DeepSpeed takes 4")
    order: Literal["position", "random"] = Field(
        "position", description="who is served: first choices before second ones, then by position or by lot"
    )


class QuantizationConfig(RecipeSection):
    """How the routed experts of a checkpoint are held. They serve, and are not trained."""

    scheme: Scheme


Mixing = Literal["sum", "sigmoid", "softmax", "mean"]


class _Shared(RecipeSection):
    """An expert that every token uses, beside the routed ones."""

    mixing: Mixing = Field(
        "sum",
        description="how its answer joins the routed one: added; weighted by a sigmoid of the token (Qwen2-MoE); "
        "both weighted by a learned softmax (DeepSpeed's residual MoE); the mean of the two (AdaMoE)",
    )

    def _mixing_params(self, hidden_size: int) -> int:
        return {"sigmoid": hidden_size, "softmax": 2 * (hidden_size + 1)}.get(self.mixing, 0)


class SharedExpertConfig(_Shared):
    """A SwiGLU."""

    kind: Literal["swiglu"] = "swiglu"
    hidden_size: int = Field(ge=1)

    def num_params(self, hidden_size: int) -> int:
        return 3 * hidden_size * self.hidden_size + self._mixing_params(hidden_size)


class SharedMLPConfig(MLPConfig, _Shared):
    """down(act(up x)), as DeepSpeed-MoE has it."""

    def num_params(self, hidden_size: int) -> int:
        return super().num_params(hidden_size) + self._mixing_params(hidden_size)


AnyShared = Annotated[SharedExpertConfig | SharedMLPConfig, Field(discriminator="kind"), kind_or("swiglu")]


class MoEConfig(RecipeSection):
    """One MoE layer as MoE++ has it (arXiv 2410.07348): FFN experts, and experts that cost next to nothing.

    Expert ids run over the FFN experts, then constant, copy and zero experts.
    """

    ffn_experts: int = Field(8, ge=0, description="or a list: of each MoE layer (DeepSpeed's pyramid)")
    pyramid: tuple[NonNegativeInt, ...] = Field((), description="FFN experts of each MoE layer, where they differ")
    expert: AnyExpert = SwiGLUConfig()
    quantization: QuantizationConfig | None = Field(None, description="set by `convert quantize`, in a checkpoint")
    zero_experts: int = Field(1, ge=0, description="experts that answer 0")
    copy_experts: int = Field(1, ge=0, description="experts that answer their input")
    constant_experts: int = Field(2, ge=0, description="experts that mix their input with a learned vector")
    shared: AnyShared | None = None
    top_k: int = Field(2, ge=1)
    gate: GateConfig | None = Field(None, description="null: one matrix")
    gate_mode: Literal["paper", "released", "mixtral", "sigmoid"] = "paper"
    gate_scale: float = Field(1.0, gt=0, description="factor on the weights of the chosen experts")
    logits_norm: float | None = Field(None, gt=0, description="standard deviation that a token's logits are given")
    noise: Literal["none", "jitter", "gumbel", "gumbel_second", "normal"] = Field(
        "none",
        description="while training: of the token (1%), of the choice, of all choices but the first, of the logits",
    )
    scale_adapter: bool = Field(False, description="a second map of the token that is added to the weights (AdaMoE)")
    selection_bias: bool = Field(False, description="a bias per expert that decides who is chosen, not how much")
    bias_update_rate: float = Field(0.001, gt=0, description="step of that bias towards an even load, each update")
    groups: GroupsConfig | None = None
    gating_residual: bool = Field(True, description="add a learned map of the previous MoE layer's router logits")
    capacity: CapacityConfig | None = Field(None, description="null: nothing is dropped")
    tau: float = Field(0.75, gt=0, description="weight of zero-computation experts in the balance loss")
    balance_loss: Literal["heterogeneous", "switch", "gshard", "mutual_information"] = "heterogeneous"
    balance_over: Literal["micro_batch", "sequence", "global_batch"] = Field(
        "micro_batch",
        description="tokens whose load is to be even: of a micro-batch on all ranks; of each sequence by itself "
        "(DeepSeek-V3); of all micro-batches of an update so far (Qwen3)",
    )
    balance_loss_weight: float = Field(0.01, ge=0)
    z_loss_weight: float = Field(0.0, ge=0, description="of the squared log-sum-exp of the router's logits")

    @property
    def experts_of_layers(self) -> tuple[int, ...]:
        """FFN experts of each MoE layer; of all, where they are alike."""
        return self.pyramid or (self.ffn_experts,)

    @property
    def zero_computation_experts(self) -> int:
        return self.constant_experts + self.copy_experts + self.zero_experts

    @property
    def num_experts(self) -> int:
        return self.ffn_experts + self.zero_computation_experts

    @property
    def expert_names(self) -> list[str]:
        """A name for each expert id, as shown in reports."""
        kinds = (
            ("ffn", self.ffn_experts),
            ("constant", self.constant_experts),
            ("copy", self.copy_experts),
            ("zero", self.zero_experts),
        )
        return [f"{kind} {i}" for kind, count in kinds for i in range(count)]

    def num_params(self, hidden_size: int, ffn_experts: int) -> int:
        """Parameters with `ffn_experts` of the FFN experts counted; without gating residuals."""
        width, experts = hidden_size, self.num_experts
        router = experts * width if self.gate is None else self.gate.num_params(width, experts)
        router += self.selection_bias * experts + self.scale_adapter * experts * width
        constants = self.constant_experts * 3 * width
        shared = self.shared.num_params(width) if self.shared else 0
        frame = 0
        if isinstance(self.expert, ModulatedConfig):  # two maps before the experts, the adaptor after them
            frame = 2 * width * width + self.expert.adaptor_size * (2 * width + 1) + width
        return router + constants + shared + frame + ffn_experts * self.expert.num_params(width)

    @model_validator(mode="before")
    @classmethod
    def _read_list(cls, content: Any) -> Any:
        """`ffn_experts` may be given as a list; a layer without one of its own has the most."""
        listed = content.get("ffn_experts") if isinstance(content, dict) else None
        if isinstance(listed, list | tuple) and listed and all(isinstance(count, int) for count in listed):
            return {**content, "ffn_experts": max(listed), "pyramid": tuple(listed)}
        return content

    @model_validator(mode="after")
    def _choices_are_possible(self) -> MoEConfig:
        fewest = min(self.experts_of_layers) + self.zero_computation_experts
        if self.top_k > fewest:
            raise ValueError(f"top_k={self.top_k} is more than all {fewest} experts of a layer")
        if self.pyramid and self.ffn_experts != max(self.pyramid):
            raise ValueError(f"ffn_experts={self.ffn_experts} is not the most of pyramid={list(self.pyramid)}")
        if self.pyramid and self.gating_residual:
            raise ValueError(f"gating_residual=true: layers of {list(self.pyramid)} experts do not fit each other")
        if self.scale_adapter and self.gate_mode != "paper":
            raise ValueError(f"scale_adapter goes with gate_mode=paper, not {self.gate_mode}")
        if self.noise == "gumbel_second" and self.top_k < 2:
            raise ValueError(f"noise=gumbel_second leaves the first choice alone, so top_k={self.top_k} has none of it")
        if self.balance_over != "micro_batch" and self.balance_loss == "mutual_information":
            raise ValueError(
                f"balance_over={self.balance_over} goes with losses of a load, not balance_loss=mutual_information"
            )
        if self.logits_norm is not None and fewest < 2:
            raise ValueError(f"logits_norm={self.logits_norm:g}: one expert's logit has no standard deviation")
        return self

    @model_validator(mode="after")
    def _swiglu_alone_is_quantised(self) -> MoEConfig:
        expert = self.expert
        if self.quantization and not (isinstance(expert, SwiGLUConfig) and not expert.nested):
            raise ValueError(f"quantization: experts are {expert.kind}; supported: swiglu without nested networks")
        return self

    @model_validator(mode="after")
    def _sigmoid_alone_has_groups(self) -> MoEConfig:
        if self.gate_mode != "sigmoid" and (self.groups or self.selection_bias):
            raise ValueError(f"groups and selection_bias go with gate_mode=sigmoid, not {self.gate_mode}")
        if self.gate_mode == "sigmoid" and self.noise.startswith("gumbel"):
            raise ValueError(f"noise={self.noise} goes with the softmax gates, not gate_mode=sigmoid")
        if self.groups is None:
            return self
        count, chosen = self.groups.count, self.groups.chosen
        for experts in {layer + self.zero_computation_experts for layer in self.experts_of_layers}:
            if experts % count or experts // count < 2:
                raise ValueError(f"groups.count={count} must cut {experts} experts into equal groups of 2 or more")
            if chosen > count or chosen * (experts // count) < self.top_k:
                raise ValueError(
                    f"groups.chosen={chosen} of {count} groups leave fewer than top_k={self.top_k} experts"
                )
        return self
