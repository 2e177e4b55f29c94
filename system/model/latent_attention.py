"""Multi-head latent attention: a narrow vector c makes the keys and values of all heads.

    k_h = [U_h c | r],  v_h = V_h c          r: a rotary part that all heads share;  p = softmax(q_h k_h / sqrt(n + r))

With a cache, c and r alone are kept, and U_h and V_h are absorbed by what is around them (DeepSeek-V2, arXiv
2405.04434, section 2.1.2): all heads then look at one key of their own kind, and its value is its beginning:

    q_h k_h = [U_h' q_h | q_h rotary] [c | r]          sum of p V_h c = V_h (sum of p c)

For DeepSeek-V3's 128 heads that is 576 numbers a token and layer, not 40,960.
"""

from __future__ import annotations

import torch
from torch import nn

from expertmesh.kernels.routing import Routing
from expertmesh.system.model.attend import Look
from expertmesh.system.model.attention import Queries
from expertmesh.system.model.attention_config import MLAConfig
from expertmesh.system.model.context import Context
from expertmesh.system.model.rotary import rotate_interleaved


class LatentAttention(Queries):
    """DeepSeek-V2 (arXiv 2405.04434, section 2.1); names as Hugging Face's DeepSeek-V3 has them.

    Each head's key is a part made from the latent vector, without position, and a rotary part that all heads share.
    """

    def __init__(self, config: MLAConfig, hidden_size: int, norm_eps: float) -> None:
        query = config.heads * (config.nope_head_dim + config.rope_head_dim)
        super().__init__(hidden_size, query, config.query_rank, False, norm_eps)
        self.config = config
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, config.kv_rank + config.rope_head_dim, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(config.kv_rank, eps=norm_eps)
        made = config.nope_head_dim + config.value_head_dim
        self.kv_b_proj = nn.Linear(config.kv_rank, config.heads * made, bias=False)
        self.o_proj = nn.Linear(config.heads * config.value_head_dim, hidden_size, bias=False)

    def forward(self, x_TD: torch.Tensor, context: Context) -> tuple[torch.Tensor, Routing | None]:
        config, positions_T = self.config, context.positions_T
        nope, rope = config.nope_head_dim, config.rope_head_dim
        q_THx = self.queries(x_TD).unflatten(-1, (config.heads, -1))
        q_nope_THn, q_rope_THr = q_THx.split([nope, rope], dim=-1)
        latent_TC, k_rope_Tr = self.kv_a_proj_with_mqa(x_TD).split([config.kv_rank, rope], dim=-1)
        latent_TC = self.kv_a_layernorm(latent_TC)
        q_rope_THr = rotate_interleaved(q_rope_THr, positions_T, config.rope_theta)
        k_rope_T1r = rotate_interleaved(k_rope_Tr[:, None], positions_T, config.rope_theta)
        if context.attend.cached:
            o_THe = self._absorbed(q_nope_THn, q_rope_THr, latent_TC, k_rope_T1r, context)
            return self.o_proj(o_THe.flatten(1)), None
        kv_THx = self.kv_b_proj(latent_TC).unflatten(-1, (config.heads, -1))
        k_nope_THn, v_THe = kv_THx.split([nope, config.value_head_dim], dim=-1)
        q_THd = torch.cat([q_nope_THn, q_rope_THr], dim=-1)
        k_THd = torch.cat([k_nope_THn, k_rope_T1r.expand(-1, config.heads, -1)], dim=-1)
        return self.o_proj(context.attend(context.layer, q_THd, k_THd, v_THe, Look()).flatten(1)), None

    def _absorbed(
        self,
        q_nope_THn: torch.Tensor,
        q_rope_THr: torch.Tensor,
        latent_TC: torch.Tensor,
        k_rope_T1r: torch.Tensor,
        context: Context,
    ) -> torch.Tensor:
        """o_THe from keys and values as narrow as the latent vector."""
        config = self.config
        nope, rope, rank = config.nope_head_dim, config.rope_head_dim, config.kv_rank
        made_HxC = self.kv_b_proj.weight.view(config.heads, nope + config.value_head_dim, rank)
        keys_HnC, values_HeC = made_HxC.split([nope, config.value_head_dim], dim=1)
        q_THd = torch.cat([torch.einsum("thn,hnc->thc", q_nope_THn, keys_HnC), q_rope_THr], dim=-1)
        # An `Attend` divides by the root of the width that it sees.
        q_THd = q_THd * ((rank + rope) / (nope + rope)) ** 0.5
        latent_T1C = latent_TC[:, None]
        k_T1d = torch.cat([latent_T1C, k_rope_T1r], dim=-1)
        o_THC = context.attend(context.layer, q_THd, k_T1d, latent_T1C, Look())
        return torch.einsum("thc,hec->the", o_THC, values_HeC)
