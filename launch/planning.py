"""A training job on paper: what `expertmesh plan train` says of a recipe before any worker starts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from expertmesh.launch.find_checkpoint import find_checkpoint
from expertmesh.launch.recipe import Recipe, check_together
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.plan.activations import activation_bytes
from expertmesh.system.plan.membership import members
from expertmesh.system.plan.rehearsal import calls_of, play, to_rehearse
from expertmesh.system.plan.training_plan import plan_training

LARGEST = 4096  # ranks of a world that is rehearsed; making Megatron's groups takes as long as that


def plan_recipe(recipe: Recipe, rank: int, check: bool) -> dict[str, Any]:
    """What `--json` prints. Raises ValueError where the recipe does not fit, RuntimeError where ranks disagree."""
    model, sizes, train = recipe.model, recipe.parallel, recipe.train
    if recipe.start_from is not None:
        model = find_checkpoint(Path(recipe.start_from)).config
        check_together(recipe, model)
    if model.vocab_size is None:
        model = model.model_copy(update={"vocab_size": recipe.data.vocab_size})
        check_together(recipe, model)
    if not 0 <= rank < sizes.world_size:
        raise ValueError(f"--rank {rank}: the recipe has ranks 0 to {sizes.world_size - 1}")
    if check and sizes.world_size > LARGEST:
        raise ValueError(f"--check: {sizes.world_size} ranks are more than the {LARGEST} that can be rehearsed")
    stages = plan_training(model, sizes, train)
    result: dict[str, Any] = {
        "world_size": sizes.world_size,
        "parallel": sizes.model_dump(),
        "parameters": model.num_params(),
        "micro_batches": train.micro_batches,
        "rank": rank,
        "groups": members(sizes, rank) | _of_narrower_layers(model, sizes, rank),
        "stages": [
            stage._asdict() | {"activation_bytes": None, "memory_bytes": stage.memory_bytes} for stage in stages
        ],
    }
    if not check:
        return result
    ranks = to_rehearse(sizes)
    # As few micro-batches as show every part of the order: the rest repeats it.
    micro_batches = min(train.micro_batches, 2 * sizes.pp if sizes.pp > 1 else 1)
    length = 2 * sizes.cp * sizes.tp
    with warnings.catch_warnings(action="ignore"):  # Megatron's, of parts that it would find on a GPU
        for stage, kept in zip(result["stages"], activation_bytes(model, sizes, train) or [], strict=False):
            stage |= {"activation_bytes": kept, "memory_bytes": stage["memory_bytes"] + kept}
        orders = {each: calls_of(each, sizes, model, micro_batches, length, train.zero_stage) for each in ranks}
    if problem := play(orders):
        raise RuntimeError(f"{recipe.name}: {problem}")
    return result | {"check": {"ranks": ranks, "calls": {each: len(calls) for each, calls in orders.items()}}}


def _of_narrower_layers(model: ModelConfig, sizes: ParallelSizes, rank: int) -> dict[str, list[int]]:
    """Groups of layers whose experts are on fewer ranks than others'."""
    found = {}
    for experts in model.moe.experts_of_layers:
        own = sizes.with_expert_degree(experts)
        if own.ep < sizes.ep:
            groups = members(own, rank)
            found.update({f"{name}, {experts} experts": groups.get(name, [rank]) for name in ("expert", "expert_data")})
    return found


def told(result: dict[str, Any]) -> list[str]:
    """The same in lines, for people."""
    lines = [
        f"{result['parameters'] / 1e6:,.1f} M parameters on {result['world_size']} ranks, "
        f"{result['micro_batches']} micro-batches a step; a rank of each pipeline stage, in MB:",
        "stage  layers        weights  gradients  optimizer  activations      all   sent a step",
    ]
    for stage in result["stages"]:
        layers = " ".join(f"{first}-{after - 1}" for first, after in stage["layers"])
        memory = [stage[f"{what}_bytes"] for what in ("weight", "gradient", "optimizer", "activation", "memory")]
        sent = ", ".join(
            f"{what} {'not counted' if count is None else f'{count / 1e6:.2f}'}"
            for what, count in stage["sent_bytes"].items()
            if count != 0
        )
        figures = " ".join(
            f"{'?' if size is None else f'{size / 1e6:.1f}':>{width}}"
            for size, width in zip(memory, (10, 10, 10, 12, 8), strict=True)
        )
        lines.append(f"{stage['pipeline_rank']:5}  {layers:10} {figures}   {sent or 'nothing'}")
    for name, ranks in result["groups"].items():
        between = str(ranks) if len(ranks) <= 16 else f"{ranks[0]}, {ranks[1]}, ... {ranks[-1]} ({len(ranks)})"
        lines.append(f"rank {result['rank']} {name}: {between}")
    if check := result.get("check"):
        calls = max(check["calls"].values())
        lines.append(f"{len(check['ranks'])} ranks rehearsed, up to {calls} collectives and messages each: all agree")
    return lines
