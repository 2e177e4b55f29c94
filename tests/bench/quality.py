"""MoE++ against a plain mixture of experts, and tau against the work done: real training runs, printed as a table.

    python tests/bench/quality.py [--steps 800] [--seeds 0 1 2] [--taus 0.1 0.25 0.5 0.75 1.0]

The quickstart's model, data and batches on one rank. "plain" is the same model without zero-computation experts and
gating residuals: the same FFN experts, tokens and seed. Held-out loss in nats per token.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch.distributed as dist

from expertmesh.kernels.device import Device
from expertmesh.launch.recipe import load_recipe
from expertmesh.parallel.groups import Groups, build_groups
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.train.dataset import TokenDataset, prepare_tokens
from expertmesh.system.train.trainer import Record, Trainer

PLAIN = ["zero_experts=0", "copy_experts=0", "constant_experts=0", "gating_residual=false"]


class Outcome(NamedTuple):
    """Of one training run."""

    held_out_loss: float
    ffn_experts_per_token: float  # mean over layers and the last quarter of the steps


def train(folder: Path, data: Path, groups: Groups, steps: int, seed: int, moe: list[str]) -> Outcome:
    """One run in this process; `groups` of one rank."""
    changes = [f"train.steps={steps}", f"train.seed={seed}", f"train.validate_every={steps}"]
    recipe = load_recipe("quickstart", [*changes, "parallel.dp=1", "parallel.ep=1", *(f"model.moe.{m}" for m in moe)])
    shutil.copytree(data, folder / "data")
    model = recipe.model.model_copy(update={"vocab_size": TokenDataset(folder / "data").vocab_size})
    records: list[Record] = []
    settings: dict[str, Any] = {}
    Trainer(model, recipe.train, folder, groups, Device("cpu", "gloo"), settings, None).run(records.append)
    losses = [record["loss"] for record in records if record["kind"] == "validation"]
    used = [record["ffn_experts_per_token"] for record in records if record["kind"] == "step"]
    return Outcome(losses[-1], fmean(used[-max(steps // 4, 1) :]))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=800)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--taus", type=float, nargs="+", default=[0.1, 0.25, 0.5, 0.75, 1.0])
    asked = options.parse_args()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")  # DeepSpeed asks the environment
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    groups = build_groups(ParallelSizes())
    with tempfile.TemporaryDirectory() as scratch:
        data, recipe = Path(scratch, "data"), load_recipe("quickstart", [])
        given = recipe.data
        prepare_tokens(given.source, given.tokenizer, given.vocab_size, given.max_bytes, given.validation_share, data)

        def run(name: str, seed: int, moe: list[str]) -> Outcome:
            outcome = train(Path(scratch, f"{name}-{seed}"), data, groups, asked.steps, seed, moe)
            print(
                f"{name:16} seed {seed}   held-out {outcome.held_out_loss:.4f}   "
                f"FFN experts a token {outcome.ffn_experts_per_token:.3f}",
                flush=True,
            )
            return outcome

        for name, moe in (("plain", PLAIN), ("MoE++ tau=0.75", [])):
            losses = [run(name, seed, moe).held_out_loss for seed in asked.seeds]
            spread = stdev(losses) if len(losses) > 1 else 0.0
            print(f"{name:16} mean {fmean(losses):.4f}, standard deviation {spread:.4f}")
        for tau in asked.taus:
            run(f"tau={tau}", asked.seeds[0], [f"tau={tau}"])


if __name__ == "__main__":
    main()
