"""Our MoE layer, zero-computation experts and all, in any torch model under a plain `deepspeed.initialize`:

    from expertmesh.system.inside.deepspeed import MoELayer
    model.moe = MoELayer(MoEConfig(ffn_experts=8, top_k=2), hidden_size=64, ep_size=2)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    y, router_loss, load = model.moe(x)    # add router_loss to what is minimised

It takes the place of `deepspeed.moe.layer.MoE`, and is one: by that class alone DeepSpeed tells expert parameters. It
reduces them among the ranks that hold the same experts, at ZeRO stages 0, 1 and 2. (At stage 3 it refuses all of them.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.utils import groups
from torch import nn

from expertmesh.system.inside.guest import Chain, GuestMoE, expert_part
from expertmesh.system.model.moe_config import MoEConfig

# Where DeepSpeed's checkpoints look for an expert. It saves those on other paths for rank 0 alone, and says nothing.
EXPERTS = "deepspeed_moe.experts.deepspeed_experts"


class MoELayer(DeepSpeedMoE):
    """Zero-computation experts where the token is, FFN experts on `ep_size` ranks.

    Args:
        config: the layer; see `moe_config.py`.
        ep_size: ranks that hold every expert once; `deepspeed.init_distributed` comes before a layer of several.
        chain: one for all layers of a model, if they have gating residuals; None: this layer has none before it.
        standard_deviation: of the initial weights.

    Raises:
        ValueError: for what a guest cannot do (guest.py), and sizes that do not divide.
    """

    def __init__(
        self,
        config: MoEConfig,
        hidden_size: int,
        ep_size: int = 1,
        chain: Chain | None = None,
        standard_deviation: float = 0.02,
    ) -> None:
        nn.Module.__init__(self)  # DeepSpeed's own would build its layer
        if ep_size > 1 and not dist.is_initialized():
            raise ValueError(f"ep_size={ep_size}: call deepspeed.init_distributed() before building the model")
        self.ep_size, self.expert_group_name = ep_size, f"ep_size_{ep_size}"
        self._expert_rank = dist.get_rank() % ep_size if ep_size > 1 else 0  # DeepSpeed's order of ranks
        shard = expert_part(config, self._expert_rank, ep_size)
        self.num_experts, self.num_local_experts = config.ffn_experts, len(shard)
        self.guest = GuestMoE(config, hidden_size, shard, chain or Chain(), standard_deviation)
        for parameter in self.guest.moe.experts.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.expert_group_name  # type: ignore[attr-defined]
        self.register_state_dict_post_hook(_to_deepspeed_names)
        self.register_load_state_dict_pre_hook(_from_deepspeed_names)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by `deepspeed.initialize`."""
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
        expert = groups._get_expert_parallel_group(self.expert_group_name)
        if expert.rank() != self._expert_rank:
            raise ValueError("use_data_before_expert_parallelism=true: our layers are built for the other order")
        device = next(self.guest.parameters()).device.type
        self.guest.connect(expert, groups._get_data_parallel_group(), device)

    def forward(
        self, hidden_states: torch.Tensor, used_token: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[..., D] to [..., D]; the router's losses by their weights; int64 [N] slots that chose each expert."""
        assert used_token is None, "all tokens are used"
        y_TD, losses = self.guest(hidden_states.flatten(0, -2))
        return y_TD.view_as(hidden_states), losses.total, losses.load_N


def _to_deepspeed_names(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Expert by expert, on the path where DeepSpeed looks for them. It drops any other name that says "expert"."""
    assert isinstance(layer, MoELayer)
    if "expert" in prefix:
        raise ValueError(f"{prefix[:-1]}: a layer under a name with 'expert' in it is lost in DeepSpeed's checkpoints")
    for name, parameter in layer.guest.moe.experts.named_parameters():
        whole = state.pop(f"{prefix}guest.moe.experts.{name}", parameter.detach())
        for expert, part in enumerate(whole):
            state[f"{prefix}{EXPERTS}.{expert}.{name}"] = part
    for key in [key for key in state if key.startswith(f"{prefix}guest.") and "expert" in key]:
        state[key.replace("expert", "ffn")] = state.pop(key)


def _from_deepspeed_names(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(layer, MoELayer)
    for name, parameter in layer.guest.moe.experts.named_parameters():
        parts = [state.pop(f"{prefix}{EXPERTS}.{expert}.{name}", None) for expert in range(len(parameter))]
        if all(part is not None for part in parts):
            state[f"{prefix}guest.moe.experts.{name}"] = torch.stack(parts) if parts else parameter.detach()
    for name, _parameter in layer.guest.named_parameters(prefix="guest"):
        told = f"{prefix}{name.replace('expert', 'ffn')}"
        if "expert" in name and told in state:
            state[prefix + name] = state.pop(told)
