"""Our layer in Megatron-Core's own GPTModel: what is trained does not depend on how many ranks share the experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from numerics import assert_close
from ranks import run_ranks

from expertmesh.system.model.moe_config import MoEConfig, SharedExpertConfig

VOCAB, LENGTH, WIDTH = 64, 12, 32
MOE = MoEConfig(
    ffn_experts=4,
    top_k=2,
    expert={"hidden_size": 16},
    shared=SharedExpertConfig(hidden_size=8),
    balance_loss_weight=0.3,
    z_loss_weight=0.1,
)

SNIPPET = """
from expertmesh.system.inside.megatron import moe_layer_spec
from expertmesh.system.model.moe_config import MoEConfig
from megatron.core.models.gpt.gpt_model import GPTModel
spec = moe_layer_spec(MoEConfig(ffn_experts=4, expert={"hidden_size": 16}, top_k=2))
model = GPTModel(config, spec, vocab_size=64, max_sequence_length=12)  # config.num_moe_experts=4
"""


def megatron_config(ep: int, **changes: Any):
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        **{
            "num_layers": 2,
            "hidden_size": WIDTH,
            "num_attention_heads": 4,
            "ffn_hidden_size": 64,
            "num_moe_experts": 4,
            "expert_model_parallel_size": ep,
            "expert_tensor_parallel_size": 1,
            "use_cpu_initialization": True,
            "add_bias_linear": False,
            "gradient_accumulation_fusion": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            **changes,
        }
    )


def start(ep: int) -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ep, expert_tensor_parallel_size=1)


class Run(NamedTuple):
    loss: float
    gradients: dict[str, torch.Tensor]
    router_losses: dict[str, torch.Tensor]
    placed: dict[str, tuple[Any, Any]]  # global shape and offset of each expert parameter in a checkpoint


def backward(ep: int, tokens_BS: torch.Tensor, by_hand: bool = False) -> Run:
    """One pass; `by_hand` adds the router losses to the loss in place of Megatron's autoscaler."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.moe import moe_utils

    from expertmesh.system.inside.megatron import MegatronMoE, moe_layer_spec

    start(ep)
    torch.manual_seed(0)
    model = GPTModel(megatron_config(ep), moe_layer_spec(MOE), VOCAB, LENGTH)
    layers = [layer.mlp for layer in model.decoder.layers]
    assert all(isinstance(layer, MegatronMoE) for layer in layers)
    totals: list[torch.Tensor] = []
    for layer in layers:
        layer.guest.register_forward_hook(lambda module, given, out: totals.append(out[1].total))
    moe_utils.clear_aux_losses_tracker()
    moe_utils.MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(0.0 if by_hand else 1.0))
    positions_BS = torch.arange(LENGTH).expand_as(tokens_BS)
    loss = model(tokens_BS, positions_BS, None, labels=tokens_BS.roll(-1, 1)).mean()
    (loss + sum(totals) if by_hand else loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert getattr(parameter, "allreduce", True) == (ep == 1 or ".experts." not in name)
    placed = {name: (tensor.global_shape, tensor.global_offset)
              for name, tensor in model.sharded_state_dict().items() if ".experts." in name}  # fmt: skip
    tracker = moe_utils.get_moe_layer_wise_logging_tracker()
    losses = {name: entry["values"].clone() for name, entry in tracker.items()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    sharded = model.sharded_state_dict()
    assert set(sharded) >= set(gradients), "a checkpoint holds every parameter"
    ours = [tensor.key for name, tensor in sharded.items() if ".guest." in name]
    assert len(set(ours)) == len(ours), "and of each layer its own"
    return Run(float(loss), gradients, losses, placed)


def mean(tensor: torch.Tensor) -> torch.Tensor:
    summed = tensor.clone()
    dist.all_reduce(summed)
    return summed / dist.get_world_size()


def check_ranks() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tokens_BS = torch.randint(0, VOCAB, (2 * ranks, LENGTH), generator=torch.Generator().manual_seed(1))
    mine_BS = tokens_BS.chunk(ranks)[rank]
    whole = backward(1, tokens_BS)  # each rank has the whole batch: what one rank alone would do
    for ep in (1, 2):
        part = backward(ep, mine_BS)
        assert float(mean(torch.tensor(part.loss))) == pytest.approx(whole.loss, rel=1e-6)
        for name, losses_L in part.router_losses.items():
            assert_close(mean(losses_L), whole.router_losses[name], what=name)
        for name, gradient in part.gradients.items():
            expected = whole.gradients[name]
            if ep == 2 and ".experts." in name:
                # Of the tokens of both ranks already; Megatron divides by the data-parallel size.
                assert_close(gradient / ranks, expected.chunk(2)[rank], max_error=1e-4, rms_error=1e-5, what=name)
                shape = (4, *gradient.shape[1:])
                assert part.placed[name] == (shape, (2 * rank, *[0] * (gradient.ndim - 1)))
            else:
                assert_close(mean(gradient), expected, max_error=1e-4, rms_error=1e-5, what=name)
    assert any("gate_map" in name for name in whole.gradients), "the second layer reads the first one's logits"
    by_hand = backward(1, tokens_BS, by_hand=True)
    for name, gradient in by_hand.gradients.items():
        assert_close(gradient, whole.gradients[name], max_error=1e-4, rms_error=1e-5, what=f"by hand: {name}")

    space = {"config": megatron_config(2)}
    start(2)
    exec(SNIPPET, space)
    assert space["model"](mine_BS, torch.arange(LENGTH).expand_as(mine_BS), None).shape == (2, LENGTH, VOCAB)


def test_gpt_model_on_two_ranks():
    run_ranks(check_ranks, 2, timeout=600)


def check_refusals() -> None:
    from megatron.core.models.gpt.gpt_model import GPTModel

    from expertmesh.system.inside.megatron import moe_layer_spec

    start(1)

    def refused(moe: MoEConfig, message: str, **changes: Any) -> None:
        with pytest.raises(Exception, match=message):  # Megatron wraps what a layer raises
            GPTModel(megatron_config(1, **changes), moe_layer_spec(moe), VOCAB, LENGTH)

    refused(MOE, "num_moe_experts=8 is not moe.ffn_experts=4", num_moe_experts=8)
    refused(MOE, "recompute would cut its gradient off", recompute_granularity="selective")
    refused(MOE.model_copy(update={"noise": "jitter"}), "noise=jitter works in our own trainer only")
    refused(MOE.model_copy(update={"capacity": {"factor": 1.0}}), "capacity works in our own trainer only")


def test_what_cannot_be_is_said_at_once():
    run_ranks(check_refusals, 1)
