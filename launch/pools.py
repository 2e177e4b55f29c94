"""How many workers a service has, and which numbers a model can be served with."""

from __future__ import annotations

from typing import NamedTuple

from expertmesh.system.model.config import ModelConfig
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.draft import build_drafter


class Pools(NamedTuple):
    """How many workers hold the two halves of the model."""

    attention: int
    ffn: int


def check_pools(model: ModelConfig, config: ServeConfig, attention: int | None, ffn: int | None) -> Pools | None:
    """The pools that were asked for; None: joined. Raises ValueError for what the model cannot be served with."""
    build_drafter(config, model)
    config.skipping(model)
    if attention is None and ffn is None:
        return None
    pools = Pools(1 if attention is None else attention, 1 if ffn is None else ffn)
    if min(pools) < 1:
        raise ValueError(f"--attention {pools.attention} --ffn {pools.ffn}: each pool needs at least one worker")
    if pools.ffn > model.moe.ffn_experts:
        raise ValueError(f"--ffn {pools.ffn}: the model has {model.moe.ffn_experts} FFN experts a layer to share out")
    if model.share_layers and (config.expert_copies or config.rebalance_s):
        raise ValueError("serve.expert_copies, serve.rebalance_s: all layers of this model have the same experts")
    return pools
