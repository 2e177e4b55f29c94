"""Our layer in a user's own model under `deepspeed.initialize`: the updates of one rank, whatever the ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from numerics import assert_close
from ranks import run_ranks
from torch import nn

from expertmesh.parallel.deepspeed_build import prepare_build
from expertmesh.system.model.moe_config import MoEConfig, SharedExpertConfig

WIDTH, RATE, STEPS = 16, 1e-2, 4
MOE = MoEConfig(ffn_experts=4, expert={"hidden_size": 8}, shared=SharedExpertConfig(hidden_size=8))
# Adam's first updates hide a gradient that is wrong by a factor; with SGD they show it.
OPTIMIZER = {"type": "SGD", "params": {"lr": RATE, "momentum": 0.9}}

SNIPPET = """
import deepspeed
from expertmesh.system.inside.deepspeed import MoELayer
from expertmesh.system.model.moe_config import MoEConfig
deepspeed.init_distributed()
model.moe = MoELayer(MoEConfig(ffn_experts=4, top_k=2), hidden_size=16, ep_size=2)
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
y, router_loss, load = model.moe(x)  # add router_loss to what is minimised
"""


class Model(nn.Module):
    """What a user may write: two of our layers, chained, among layers of torch."""

    def __init__(self, ep_size: int) -> None:
        from expertmesh.system.inside.deepspeed import MoELayer
        from expertmesh.system.inside.guest import Chain

        super().__init__()
        chain = Chain()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.first = MoELayer(MOE, WIDTH, ep_size, chain)
        self.second = MoELayer(MOE, WIDTH, ep_size, chain)
        self.leave = nn.Linear(WIDTH, 1)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        y_BSD = self.enter(x_BSD).tanh()
        total = y_BSD.new_zeros(())
        for moe in (self.first, self.second):
            out_BSD, router_loss, _ = moe(y_BSD)
            y_BSD, total = y_BSD + out_BSD, total + router_loss
        return (self.leave(y_BSD) - x_BSD.sum(-1, keepdim=True)).square().mean() + total


def built(ep_size: int) -> Model:
    torch.manual_seed(0)
    return Model(ep_size)


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 6, WIDTH, generator=torch.Generator().manual_seed(step))


def reference() -> tuple[list[float], Model]:
    """One process, torch's own SGD."""
    model = built(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def engine_of(stage: int, **changes: Any):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": OPTIMIZER,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # left out, DeepSpeed clips at 1
        "zero_optimization": {"stage": stage},
        **changes,
    }
    model = built(2)
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def train(engine: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = engine(batch(step).chunk(2)[dist.get_rank()])
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / 2)
    return losses


def check(folder: Path) -> None:
    prepare_build()
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    expected, alone = reference()
    held = dict(alone.named_parameters())
    for stage in (0, 1, 2):
        engine = engine_of(stage)
        assert train(engine, range(STEPS)) == pytest.approx(expected, rel=1e-5), f"stage {stage}"
        for name, parameter in engine.module.named_parameters():
            whole = held[name]
            mine = whole.chunk(2)[dist.get_rank()] if ".experts." in name else whole
            assert_close(parameter, mine, max_error=1e-4, rms_error=1e-5, what=f"stage {stage}: {name}")

    # DeepSpeed's own checkpoint holds every expert of both ranks, and whoever loads it goes on with the same losses.
    saved = engine_of(1)
    train(saved, range(2))
    saved.save_checkpoint(str(folder), tag="two")
    after = train(saved, range(2, STEPS))
    dist.barrier()
    files = sorted(path.name for path in (folder / "two").glob("layer_*_expert_*"))
    assert len(files) == 2 * MOE.ffn_experts, files
    torch.manual_seed(5)
    loaded = engine_of(1)
    with torch.no_grad():
        for parameter in loaded.module.parameters():
            parameter.zero_()
    loaded.load_checkpoint(str(folder), tag="two")
    assert train(loaded, range(2, STEPS)) == after

    other_order = built(2).first
    other_order._expert_rank = 1 - dist.get_rank()
    with pytest.raises(ValueError, match="built for the other order"):
        other_order.set_deepspeed_parallelism()
    with pytest.raises(ValueError, match="was not told yet who has the others"):
        other_order(torch.randn(3, WIDTH))
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": OPTIMIZER}
    space: dict[str, Any] = {"model": nn.Linear(WIDTH, 1), "x": torch.randn(3, WIDTH), "config": config}
    exec(SNIPPET, space)
    assert space["y"].shape == (3, WIDTH) and int(space["load"].sum()) == 2 * 3 * 2


def test_two_expert_parallel_ranks_make_the_updates_of_one(tmp_path):
    run_ranks(check, 2, tmp_path, timeout=600)


def test_a_layer_of_several_ranks_wants_them_first():
    from expertmesh.system.inside.deepspeed import MoELayer

    with pytest.raises(ValueError, match="call deepspeed.init_distributed"):
        MoELayer(MOE, WIDTH, ep_size=2)


def test_names_that_checkpoints_would_drop_are_refused():
    from expertmesh.system.inside.deepspeed import MoELayer

    model = nn.ModuleDict({"my_experts": MoELayer(MOE, WIDTH)})
    with pytest.raises(ValueError, match="my_experts: a layer under a name with 'expert' in it is lost"):
        model.state_dict()
