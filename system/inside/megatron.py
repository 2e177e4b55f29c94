"""Our MoE layer, zero-computation experts and all, inside a Megatron-Core GPTModel:

    from expertmesh.system.inside.megatron import moe_layer_spec
    spec = moe_layer_spec(MoEConfig(ffn_experts=8, top_k=2))
    model = GPTModel(config, spec, vocab_size, max_sequence_length)    # config.num_moe_experts = 8

Megatron's process groups, loss scaling and data-parallel gradients stay Megatron's: expert parameters carry its mark
(`allreduce`), router losses go through its own autoscaler and appear in its own log of auxiliary losses.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, save_to_aux_losses_tracker
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from expertmesh.system.inside.guest import Chain, GuestMoE, expert_part
from expertmesh.system.model.moe_config import MoEConfig


def moe_layer_spec(moe: MoEConfig, layer: ModuleSpec | None = None) -> ModuleSpec:
    """A spec of a transformer layer whose feed-forward half is our MoE layer. For one model: its layers are chained.

    Args:
        moe: the layer; see `moe_config.py`.
        layer: Megatron's spec of the layer around it; None: its local one, on a CPU with torch's own attention, since
            Megatron's asks for CUDA.
    """
    if layer is None:
        layer = get_gpt_layer_local_spec()
        if not torch.cuda.is_available():
            layer.submodules.self_attention.submodules.core_attention = TorchAttention
    layer = copy.deepcopy(layer)
    layer.submodules.mlp = ModuleSpec(module=MegatronMoE, params={"moe": moe, "chain": Chain()})
    return layer


class MegatronMoE(MegatronModule):
    """Stands where Megatron's MoELayer would, with the same in and out.

    Raises:
        ValueError: where Megatron's config asks for what our layer cannot do there, in one line.
    """

    def __init__(self, config: TransformerConfig, moe: MoEConfig, chain: Chain) -> None:
        super().__init__(config)
        _check(config, moe)
        expert = parallel_state.get_expert_model_parallel_group()
        shard = expert_part(moe, expert.rank(), expert.size())
        self.guest = GuestMoE(moe, config.hidden_size, shard, chain, config.init_method_std)
        device = "cpu" if config.use_cpu_initialization else f"cuda:{torch.cuda.current_device()}"
        self.guest.to(device=device, dtype=config.params_dtype)
        self.token_group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        self.guest.connect(expert, self.token_group, torch.device(device).type)
        self.layer_number: int | None = None
        for parameter in self.guest.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        for parameter in self.guest.moe.experts.parameters():
            parameter.sequence_parallel = False  # type: ignore[attr-defined]
            parameter.allreduce = expert.size() == 1  # type: ignore[attr-defined]

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron's, from 1."""
        self.layer_number = layer_number

    def forward(self, hidden_SBD: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, None]:
        """[S, B, D] in and out; None stands for a bias."""
        assert padding_mask is None, "padding is not told apart from tokens"
        y_TD, losses = self.guest(hidden_SBD.flatten(0, 1))
        if self.training and torch.is_grad_enabled():
            total = losses.total * (len(y_TD) if self.config.calculate_per_token_loss else 1)
            y_TD = MoEAuxLossAutoScaler.apply(y_TD, total)
            for name, loss in (("load_balancing_loss", losses.balance), ("z_loss", losses.z)):
                save_to_aux_losses_tracker(
                    name, loss, self.layer_number, self.config.num_layers, avg_group=self.token_group
                )
        return y_TD.view_as(hidden_SBD), None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """For Megatron's checkpoints: an expert parameter is one tensor of all experts, cut over expert ranks.

        So any number of these loads what any other saved. Megatron's own default would keep one rank's experts.
        """
        expert = parallel_state.get_expert_model_parallel_group()
        dense = dict(self.state_dict(prefix="", keep_vars=True))
        experts = {name: dense.pop(name) for name in list(dense) if name.startswith("guest.moe.experts.")}
        groups = {
            "tp_group": parallel_state.get_tensor_model_parallel_group(),
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        sharded = make_sharded_tensors_for_checkpoint(dense, prefix, **groups)
        replica = (0, 0, parallel_state.get_expert_data_parallel_rank())
        for name, parameter in experts.items():
            cut = (0, expert.rank(), expert.size())
            sharded[prefix + name] = ShardedTensor.from_rank_offsets(prefix + name, parameter, cut, replica_id=replica)
        # Megatron stacks what layers have in common, and the first has no gating residual: each keeps its own names.
        for name, tensor in sharded.items():
            tensor.key = f"{prefix}layer_{self.layer_number}.{name.removeprefix(prefix)}"
        return sharded


def _check(config: TransformerConfig, moe: MoEConfig) -> None:
    if config.num_moe_experts is not None and config.num_moe_experts != moe.ffn_experts:
        raise ValueError(f"num_moe_experts={config.num_moe_experts} is not moe.ffn_experts={moe.ffn_experts}")
    if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        raise ValueError("tensor_model_parallel_size above 1 needs sequence_parallel: each token on one rank")
    if parallel_state.get_expert_tensor_parallel_world_size() > 1:
        raise ValueError("expert_tensor_parallel_size must be 1: experts are not sliced inside Megatron")
    if moe.gating_residual and config.pipeline_model_parallel_size > 1:
        raise ValueError("moe.gating_residual=true: router logits do not cross Megatron's pipeline stages")
    if moe.gating_residual and config.recompute_granularity is not None:
        raise ValueError("moe.gating_residual=true: recompute would cut its gradient off; set one of them off")


class TorchAttention(MegatronModule):
    """Causal scaled dot-product attention by torch, for Megatron's core attention, which asks for CUDA."""

    def __init__(self, config: TransformerConfig, *_: Any, **__: Any) -> None:
        super().__init__(config)

    def forward(self, q_SBHd: torch.Tensor, k_SBHd: torch.Tensor, v_SBHd: torch.Tensor, *_: Any, **__: Any) -> Any:
        """[S, B, heads * d]; masks other than the causal one are not looked at."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (q_SBHd, k_SBHd, v_SBHd))
        y_BHSd = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return y_BHSd.permute(2, 0, 1, 3).flatten(2)
