"""The layers that ours is measured against, each as its makers ship it and with the weights of the case.

A peer is imported when it is built. What it needed to run on this machine is in its note, which the table shows.

    transformers    Mixtral's and Qwen3-MoE's block, with each experts implementation that runs without a GPU
    DeepSpeed       its MoE layer on one rank, no token dropped; the expert network is the user's: a SwiGLU
    Megatron-Core   its MoELayer on one rank: all-gather dispatcher, SequentialMLP
    torch           sorted rows through grouped_mm, and through a loop over the experts
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from expertmesh.launch.bench.cases import DTYPES, Case, Problem
from expertmesh.launch.bench.layer import Layer, shard_of
from expertmesh.parallel.token_split import TokenSplit

MEMORY_SHARE = 0.25  # of this machine's memory: what one peer may take for the copies that it makes of the weights


class Peer(NamedTuple):
    """A layer of somebody else."""

    what: str
    build: Callable[[Problem], Layer]
    """Raises ImportError where it is not installed."""
    renormalises: Callable[[int], bool] = lambda top_k: True
    """Whether the weights of that many chosen experts add up to 1."""
    unfit: Callable[[Case], str] = lambda case: ""
    """Why it cannot be run at this size."""
    note: str = ""


def all_peers() -> list[Peer]:
    hugging_face = []
    for name, block in (("Mixtral", _mixtral), ("Qwen3-MoE", _qwen3)):
        for experts in ("eager", "grouped_mm", "batched_mm"):
            unfit = _too_many_copies if experts == "batched_mm" else lambda case: ""
            hugging_face.append(Peer(f"HF {name}, {experts}", _hugging_face(block, experts), unfit=unfit))
    return [
        *hugging_face,
        Peer("DeepSpeed MoE", deepspeed_layer, lambda top_k: top_k > 1, note="one rank, no token dropped"),
        Peer(
            "Megatron-Core MoELayer",
            megatron_layer,
            lambda top_k: top_k > 1,
            note="stub: router logits by linear(), its own need Transformer Engine and CUDA; groups of one gloo rank",
        ),
        Peer("torch grouped_mm", _plain(_by_grouped_mm)),
        Peer("torch loop over experts", _plain(_by_loop)),
    ]


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone, where there is none: Megatron-Core asks it for its size."""
    if dist.is_initialized():
        yield
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _too_many_copies(case: Case) -> str:
    """batched_mm copies an expert's weights for each row; training takes as much again for their gradients."""
    copies = 2 * case.rows * 3 * case.hidden_size * case.ffn_size * DTYPES[case.dtype].itemsize
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if copies <= MEMORY_SHARE * memory:
        return ""
    return f"not run: a copy of the weights for each row takes {copies / 1e9:.0f} GB"


def _stacked(problem: Problem) -> dict[str, list[nn.Parameter]]:
    weights = problem.weights
    tensors = {"router": weights.router_ND, "gate_up": weights.gate_up_EGD, "down": weights.down_EDF}
    return {name: [nn.Parameter(tensor)] for name, tensor in tensors.items()}


# transformers


def _mixtral(case: Case) -> tuple[Any, Any]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=case.hidden_size,
        intermediate_size=case.ffn_size,
        num_local_experts=case.experts,
        num_experts_per_tok=case.top_k,
    )
    return config, MixtralSparseMoeBlock


def _qwen3(case: Case) -> tuple[Any, Any]:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=case.hidden_size,
        moe_intermediate_size=case.ffn_size,
        num_experts=case.experts,
        num_experts_per_tok=case.top_k,
        norm_topk_prob=True,
    )
    return config, Qwen3MoeSparseMoeBlock


def _hugging_face(block_of: Callable[[Case], tuple[Any, Any]], experts: str) -> Callable[[Problem], Layer]:
    def build(problem: Problem) -> Layer:
        config, block = block_of(problem.case)
        config._experts_implementation = experts
        with torch.device("meta"):
            module = block(config)
        parameters = _stacked(problem)
        module.gate.weight = parameters["router"][0]
        module.experts.gate_up_proj, module.experts.down_proj = parameters["gate_up"][0], parameters["down"][0]
        return Layer(module, lambda x_TD: module(x_TD[None])[0], parameters)

    return build


# DeepSpeed


class _SwiGLU(nn.Module):
    """The expert that DeepSpeed is given: as a user would write one."""

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * ffn_size, bias=False)
        self.down = nn.Linear(ffn_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


def deepspeed_layer(problem: Problem, rank: int = 0, ranks: int = 1) -> Layer:
    """As `rank` of `ranks` of the default process group, which share the experts."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.moe.layer import MoE

    case, weights = problem.case, shard_of(problem.weights, rank, ranks)
    with torch.device("meta"):
        module = MoE(
            case.hidden_size,
            _SwiGLU(case.hidden_size, case.ffn_size),
            num_experts=case.experts,
            ep_size=ranks,
            k=case.top_k,
            min_capacity=0,  # its top-1 gate refuses batches of fewer tokens
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,  # or the second expert is drawn by lot
        )
    router = module.deepspeed_moe.gate.wg.weight = nn.Parameter(weights.router_ND)
    gate_up = [nn.Parameter(weight) for weight in weights.gate_up_EGD]
    down = [nn.Parameter(weight) for weight in weights.down_EDF]
    for expert, *matrices in zip(module.deepspeed_moe.experts.deepspeed_experts, gate_up, down, strict=True):
        expert.gate_up.weight, expert.down.weight = matrices
    if ranks > 1:
        from expertmesh.parallel.deepspeed_build import prepare_build

        prepare_build()
        import deepspeed

        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        module.set_deepspeed_parallelism()
    return Layer(module, lambda x_TD: module(x_TD)[0], {"router": [router], "gate_up": gate_up, "down": down})


# Megatron-Core


def megatron_layer(problem: Problem, rank: int = 0, ranks: int = 1) -> Layer:
    """As `rank` of `ranks` of the default process group, which share the experts and have as many tokens each."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
    from megatron.core.transformer.transformer_config import TransformerConfig

    class Router(TopKRouter):
        def gating(self, input: torch.Tensor) -> torch.Tensor:
            return functional.linear(input.float(), self.weight.float())

    class Dispatcher(MoEAllGatherTokenDispatcher):
        routing_map: torch.Tensor

        def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            gather = TokenSplit(self.tp_ep_group).gather  # Megatron's own asks CUDA for buffers
            self.routing_map = gather(self.routing_map)
            return gather(hidden_states), gather(probs)

        def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return TokenSplit(self.tp_ep_group).reduce_scatter(hidden_states)

    case, weights = problem.case, shard_of(problem.weights, rank, ranks)
    dtype = DTYPES[case.dtype]
    config = TransformerConfig(
        num_layers=1,
        num_attention_heads=1,
        hidden_size=case.hidden_size,
        ffn_hidden_size=case.ffn_size,
        moe_ffn_hidden_size=case.ffn_size,
        num_moe_experts=case.experts,
        moe_router_topk=case.top_k,
        moe_router_pre_softmax=case.top_k == 1,  # it insists
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        gradient_accumulation_fusion=False,
        # bias_activation_fusion compiles the SwiGLU: 40 s once, and no faster on a CPU at 512 tokens.
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
    )
    world = dist.group.WORLD
    alone = world if ranks == 1 else dist.new_group([rank], use_local_synchronization=True)
    names = ("tp", "cp", "expt_tp", "expt_dp", "tp_cp")
    groups = ProcessGroupCollection(**dict.fromkeys(names, alone), ep=world, tp_ep=world, tp_dp_cp=world)
    parts = get_moe_module_spec(use_te=False, num_experts=case.experts, moe_grouped_gemm=False).submodules
    module = MoELayer(config, MoESubmodules(router=Router, experts=parts.experts), 1, groups)
    module.router.weight.data = weights.router_ND
    if ranks > 1:
        dispatcher = module.token_dispatcher
        indices = dispatcher.local_expert_indices
        module.token_dispatcher = Dispatcher(dispatcher.num_local_experts, indices, config, groups)
    gate_up = [expert.linear_fc1.weight for expert in module.experts.local_experts]
    down = [expert.linear_fc2.weight for expert in module.experts.local_experts]
    for parameters, tensors in ((gate_up, weights.gate_up_EGD), (down, weights.down_EDF)):
        for parameter, tensor in zip(parameters, tensors, strict=True):
            parameter.data = tensor
    named = {"router": [module.router.weight], "gate_up": gate_up, "down": down}
    return Layer(module, lambda x_TD: module(x_TD[:, None])[0][:, 0], named)


# plain torch


def _by_grouped_mm(
    rows_RD: torch.Tensor, counts_E: torch.Tensor, gate_up_EGD: torch.Tensor, down_EDF: torch.Tensor
) -> torch.Tensor:
    grouped_mm = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    gate_RF, up_RF = grouped_mm(rows_RD, gate_up_EGD.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    return grouped_mm(functional.silu(gate_RF) * up_RF, down_EDF.transpose(1, 2), offs=ends_E)


def _by_loop(
    rows_RD: torch.Tensor, counts_E: torch.Tensor, gate_up_EGD: torch.Tensor, down_EDF: torch.Tensor
) -> torch.Tensor:
    outputs = []
    for rows, gate_up_GD, down_DF in zip(
        rows_RD.split(counts_E.tolist()), gate_up_EGD.unbind(0), down_EDF.unbind(0), strict=True
    ):
        if len(rows):
            gate, up = (rows @ gate_up_GD.T).chunk(2, dim=-1)
            outputs.append((functional.silu(gate) * up) @ down_DF.T)
    return torch.cat(outputs)


Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _plain(experts: Experts) -> Callable[[Problem], Layer]:
    """What a person writes around the experts: a float32 router, a sort, index_add."""

    def build(problem: Problem) -> Layer:
        parameters, top_k = _stacked(problem), problem.case.top_k
        router, gate_up, down = (parameters[name][0] for name in ("router", "gate_up", "down"))

        def forward(x_TD: torch.Tensor) -> torch.Tensor:
            logits_TE = x_TD.float() @ router.float().T
            weights_TK, experts_TK = logits_TE.softmax(-1).topk(top_k, dim=-1)
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
            order_R = experts_TK.flatten().argsort(stable=True)
            tokens_R = order_R // top_k
            counts_E = torch.bincount(experts_TK.flatten(), minlength=len(gate_up))
            rows_RD = experts(x_TD.index_select(0, tokens_R), counts_E, gate_up, down)
            rows_RD = rows_RD * weights_TK.flatten()[order_R, None].to(rows_RD.dtype)
            return torch.zeros_like(x_TD).index_add(0, tokens_R, rows_RD)

        return Layer(nn.ParameterList([router, gate_up, down]), forward, parameters)

    return build
