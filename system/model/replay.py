"""Which experts a pass used, kept, so that another pass uses the same ones.

In reinforcement learning one engine generates and another trains. Their numbers differ in the last bits, so some tokens
go to other experts, and the policy that is trained is not the one that acted. A trainer that replays the choices of the
generating pass computes weights and gradients from its own logits, for the experts that acted (R3, arXiv 2510.11370).

    choices = recorded(output.decisions)                    of the pass that generated
    write_choices(path, {step: choices})                    or hand it over as it is
    model(tokens, context._replace(replay=choices))         or LanguageModelLoss(...)(tokens, replay=choices)

What a full expert drops is decided anew, from the same choices; so is what routers of attention heads and depth say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from expertmesh.system.model.context import Decisions

Choices = dict[int, torch.Tensor]
"""int64 [T, K] by layer: the ids of the experts that each token chose, the first choice first."""


def recorded(decisions: Sequence[Decisions]) -> Choices:
    """The choices of one pass; `decisions` of each layer, as `Transformer` returns them."""
    return {layer: d.experts.chosen_TK for layer, d in enumerate(decisions) if d.experts is not None}


def write_choices(path: Path, steps: Mapping[int, Choices]) -> None:
    """The choices of some steps in one safetensors file, as int16: 2 bytes a choice."""
    tensors = {
        f"{step}.{layer}": chosen_TK.to("cpu", torch.int16).contiguous()
        for step, choices in steps.items()
        for layer, chosen_TK in choices.items()
    }
    aside = path.with_name(f"{path.name}.part")
    save_file(tensors, aside)
    aside.rename(path)


def read_choices(path: Path) -> dict[int, Choices]:
    """By step: what `write_choices` wrote."""
    steps: dict[int, Choices] = {}
    for name, chosen_TK in load_file(path).items():
        step, layer = map(int, name.split("."))
        steps.setdefault(step, {})[layer] = chosen_TK.long()
    return steps


def choices_of_layer(replay: Mapping[int, torch.Tensor], layer: int, tokens: int, top_k: int) -> torch.Tensor:
    """[T, K] what this layer chose then.

    Raises:
        ValueError: if that was nothing, or of another size.
    """
    if layer not in replay:
        raise ValueError(f"replay has no choices for layer {layer}; it has them for layers {sorted(replay)}")
    if replay[layer].shape != (tokens, top_k):
        was = "x".join(map(str, replay[layer].shape))
        raise ValueError(f"replay of layer {layer} is of {was} choices, the pass makes {tokens}x{top_k}")
    return replay[layer]
