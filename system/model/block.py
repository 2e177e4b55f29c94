"""One block of the decoder: an attention half and an FFN half, in the order that the config says."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from expertmesh.kernels.routing import Routing
from expertmesh.system.model.attention import Attention
from expertmesh.system.model.attention_config import AttentionConfig, MixtureAttentionConfig, MLAConfig
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.context import Context, Decisions
from expertmesh.system.model.dense import DenseMLP, DenseSwiGLU
from expertmesh.system.model.depth import DepthRouted
from expertmesh.system.model.experts_config import MLPConfig, SwiGLUConfig, VersatileConfig
from expertmesh.system.model.gate import LinearGate
from expertmesh.system.model.latent_attention import LatentAttention
from expertmesh.system.model.mixture_attention import MixtureAttention
from expertmesh.system.model.moe import MoE
from expertmesh.system.model.versatile import VersatileFFN


class Block(nn.Module):
    """Attention half: norm, attention, residual, norm, router, zero-computation and shared experts, dense layers.

    FFN half: `mlp.experts`, the routed experts; on a worker of the attention pool it holds none.
    """

    def __init__(self, config: ModelConfig, self_attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = build_norm(config)
        self.self_attn = self_attn
        self.post_attention_layernorm = build_norm(config)
        self.mlp = mlp

    def forward(self, x_TD: torch.Tensor, previous: Routing | None, context: Context) -> tuple[torch.Tensor, Decisions]:
        """`previous`: what the MoE layer before decided."""
        y_TD, attentions = self.self_attn(self.input_layernorm(x_TD), context)
        x_TD = x_TD + y_TD
        if context.skip is None:
            x_TD, experts = self.second_half(x_TD, previous, context)
        else:
            x_TD, experts = context.skip(self.second_half, x_TD, previous, context)
        return x_TD, Decisions(experts, attentions)

    def second_half(
        self, x_TD: torch.Tensor, previous: Routing | None, context: Context
    ) -> tuple[torch.Tensor, Routing | None]:
        """What becomes of the token after attention."""
        y_TD, experts = self.mlp(self.post_attention_layernorm(x_TD), previous, context)
        return x_TD + y_TD, experts


class VersatileBlock(Block):
    """Its dense network norms and adds by itself, as often as it loops (versatile.py)."""

    def second_half(
        self, x_TD: torch.Tensor, previous: Routing | None, context: Context
    ) -> tuple[torch.Tensor, Routing | None]:
        return self.mlp(x_TD, self.post_attention_layernorm, context), None


class ParallelBlock(nn.Module):
    """Both halves read the same norm of the token, and are added to it together (GPT-J, BAM: arXiv 2408.08274)."""

    def __init__(self, config: ModelConfig, self_attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = build_norm(config)
        self.self_attn = self_attn
        self.mlp = mlp

    def forward(self, x_TD: torch.Tensor, previous: Routing | None, context: Context) -> tuple[torch.Tensor, Decisions]:
        normed_TD = self.input_layernorm(x_TD)
        attended_TD, attentions = self.self_attn(normed_TD, context)
        y_TD, experts = self.mlp(normed_TD, previous, context)
        return x_TD + attended_TD + y_TD, Decisions(experts, attentions)


def build_norm(config: ModelConfig) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(config.hidden_size, eps=config.norm_eps)


def build_attention(config: ModelConfig) -> nn.Module:
    attention, width, eps = config.attention, config.hidden_size, config.norm_eps
    if isinstance(attention, AttentionConfig):
        return Attention(attention, width, eps)
    if isinstance(attention, MLAConfig):
        return LatentAttention(attention, width, eps)
    if isinstance(attention, MixtureAttentionConfig):
        return MixtureAttention(attention, width)
    raise AssertionError(f"no attention of kind {attention.kind}")


def build_feed_forward(config: ModelConfig, layer: int, shard: range) -> nn.Module:
    if layer not in config.dense_layers:
        return MoE(config.moe_of(layer), config.hidden_size, layer, shard, layer > config.moe_layers[0])
    dense = config.dense
    if isinstance(dense, SwiGLUConfig):
        return DenseSwiGLU(dense, config.hidden_size)
    if isinstance(dense, MLPConfig):
        return DenseMLP(dense, config.hidden_size)
    if isinstance(dense, VersatileConfig):
        return VersatileFFN(dense, config.hidden_size)
    raise AssertionError(f"no dense network of {dense}")


def block_shape(config: ModelConfig, layer: int) -> type[Block] | type[ParallelBlock]:
    if config.block == "parallel":
        return ParallelBlock
    versatile = layer in config.dense_layers and isinstance(config.dense, VersatileConfig)
    return VersatileBlock if versatile else Block


class Elsewhere(nn.Module):
    """Stands where another pipeline rank has a part of the model, so that names and numbers are those of the whole."""


def build_blocks(config: ModelConfig, shards: Sequence[range], held: Collection[int]) -> nn.ModuleList:
    """The blocks of layers `held`, each at its place; `shards` are the FFN experts of each layer that are held here."""
    blocks: list[nn.Module] = []
    depth, router = config.depth, None
    for layer, shard in enumerate(shards):
        if layer not in held:
            blocks.append(Elsewhere())
            continue
        shape = block_shape(config, layer)
        if config.share_layers and blocks:  # WideNet (arXiv 2107.11817): all but the norms is that of the first
            block: nn.Module = shape(config, blocks[0].self_attn, blocks[0].mlp)
        else:
            block = shape(config, build_attention(config), build_feed_forward(config, layer, shard))
        if depth and layer in depth.layers:
            if router is None or not depth.shared_router:
                router = LinearGate(config.hidden_size, 2)
            block = DepthRouted(depth, block, router)
        blocks.append(block)
    return nn.ModuleList(blocks)
