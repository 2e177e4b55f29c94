"""From the config of an expert to the module that holds a shard of such experts, and to what frames them."""

from __future__ import annotations

from collections.abc import Sequence

from expertmesh.system.model.experts import ExpertFrame, MLPExperts, RoutedExperts, SwiGLUExperts
from expertmesh.system.model.experts_config import (
    MLPConfig,
    ModulatedConfig,
    SparkConfig,
    StructuredConfig,
    SwiGLUConfig,
)
from expertmesh.system.model.modulated_experts import ModulatedExperts, ModulatedFrame
from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.model.quantised_experts import QuantisedExperts
from expertmesh.system.model.spark_experts import SparkExperts
from expertmesh.system.model.structured_experts import StructuredExperts


def build_experts(config: MoEConfig, hidden_size: int, shard: Sequence[int]) -> RoutedExperts:
    """The FFN experts of `shard` of a layer of `config`; weights are uninitialised."""
    experts = _of_kind(config, hidden_size, shard)
    experts.num_experts = config.ffn_experts
    return experts


def _of_kind(config: MoEConfig, hidden_size: int, shard: Sequence[int]) -> RoutedExperts:
    expert = config.expert
    if isinstance(expert, SwiGLUConfig):
        if config.quantization:
            return QuantisedExperts(expert, config.quantization.scheme, hidden_size, shard)
        return SwiGLUExperts(expert, hidden_size, shard)
    if isinstance(expert, MLPConfig):
        return MLPExperts(expert, hidden_size, shard)
    if isinstance(expert, StructuredConfig):
        return StructuredExperts(expert, hidden_size, shard)
    if isinstance(expert, SparkConfig):
        return SparkExperts(expert, hidden_size, shard)
    if isinstance(expert, ModulatedConfig):
        return ModulatedExperts(hidden_size, shard)
    raise AssertionError(f"no experts of kind {expert.kind}")


def build_frame(config: MoEConfig, hidden_size: int) -> ExpertFrame:
    """What a layer of `config` has around dispatch and combine."""
    if isinstance(config.expert, ModulatedConfig):
        return ModulatedFrame(config.expert, hidden_size)
    return ExpertFrame()
