"""From the config of an expert to the module that holds a shard of such experts."""

from __future__ import annotations

from expertmesh.system.model.experts import MLPExperts, RoutedExperts, SwiGLUExperts
from expertmesh.system.model.experts_config import MLPConfig, SwiGLUConfig
from expertmesh.system.model.moe_config import MoEConfig


def build_experts(config: MoEConfig, hidden_size: int, shard: range) -> RoutedExperts:
    """The FFN experts of `shard` of a layer of `config`; weights are uninitialised."""
    expert = config.expert
    if isinstance(expert, SwiGLUConfig):
        return SwiGLUExperts(expert, hidden_size, shard)
    if isinstance(expert, MLPConfig):
        return MLPExperts(expert, hidden_size, shard)
    raise AssertionError(f"no experts of kind {expert.kind}")
